from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from albireo.data.files import open_files
from albireo.errors import DataError


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_one_file(tmp_path: Path) -> None:
    fill(tmp_path, {"wiki.test.raw": "one\ntwo\n"})
    source = open_files(tmp_path / "wiki.test.raw", "my data")
    assert source.splits == ("train",)
    assert list(source.documents()) == ["one\n", "two\n"]
    assert source.size_bytes("train") == 8
    assert source.describe() == "my data: train 1 file, 0.00 MB"
    with pytest.raises(DataError, match="my data has no validation split; it has train"):
        list(source.documents("validation"))


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    fill(tmp_path, {
        "b.txt": "b\n", "a.jsonl": json.dumps({"text": "from json"}), "sub/c.txt": "c\n", ".hidden.txt": "no\n",
        ".git/config": "no\n", "empty.txt": "",
    })  # fmt: skip
    source = open_files(tmp_path, "folder")
    assert list(source.documents()) == ["from json", "b\n", "c\n"]
    assert source.size_bytes("train") is None
    assert "left aside" not in source.describe()


def test_names_make_the_splits_and_the_line_says_what_is_left(tmp_path: Path) -> None:
    fill(tmp_path, {
        "wiki.train.raw": "t\n", "wiki.valid.raw": "v\n", "wiki.test.raw": "x\n", "README": "r\n", "a.png": b"\x89PNG\0",
    })  # fmt: skip
    source = open_files(tmp_path, "wiki")
    assert source.splits == ("train", "validation")
    assert list(source.documents("train")) == ["t\n"]
    assert list(source.documents("validation")) == ["v\n"]
    assert source.describe().endswith("left aside: README, wiki.test.raw, a.png (3 files)")


def test_the_fingerprint_is_of_the_content_and_of_how_it_is_read(tmp_path: Path) -> None:
    first = fill(tmp_path / "1", {"a.txt": "one\n", "b.txt": "two\n"})
    moved = fill(tmp_path / "2", {"x.txt": "one\n", "y.txt": "two\n"})
    changed = fill(tmp_path / "3", {"a.txt": "one\n", "b.txt": "tw0\n"})
    joined = fill(tmp_path / "4", {"a.txt": "one\ntwo\n"})
    assert open_files(first, "1").fingerprint() == open_files(moved, "2").fingerprint()
    prints = {open_files(folder, "x").fingerprint() for folder in (first, changed, joined)}
    rows = fill(tmp_path / "5", {"a.json": '{"text": "a", "body": "b"}', "a.txt": '{"text": "a", "body": "b"}'})
    prints |= {open_files(rows / "a.json", "x", field).fingerprint() for field in ("text", "body")}
    prints.add(open_files(rows / "a.txt", "x").fingerprint())
    assert len(prints) == 6
    assert (
        open_files(rows / "a.txt", "x", "text").fingerprint() == open_files(rows / "a.txt", "x", "body").fingerprint()
    )


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "growing.txt"
    file.write_text("one\n")
    source = open_files(file, "growing")
    source.fingerprint()
    file.write_text("one\ntwo\n")
    with pytest.raises(DataError, match="was changed while it was being read"):
        list(source.documents())


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, {"data/a.txt": "a\n", "elsewhere/b.txt": "b\n"})
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert list(open_files(tmp_path / "data", "linked").documents()) == ["a\n", "b\n"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"the folder x holds no text files; give a folder with"),
        ({".hidden.txt": "a"}, "holds no text files;"),
        ({"a.png": b"\x89PNG\0\0", "b.png": b"\0"}, r"holds no text files \(2 files there are not text\)"),
        ({"a.txt": "", "b.txt": ""}, r"the train data of x is empty \(0 bytes\)"),
        ({"train.txt": "a", "valid.txt": ""}, r"the validation data of x is empty"),
    ],
)
def test_folders_that_hold_nothing(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_files(fill(tmp_path / "folder", {"sub/.keep": "", **files}), "x")


def test_white_space_is_no_text(tmp_path: Path) -> None:
    fill(tmp_path, {"blank.txt": "\n \t\n", "blank.jsonl": '{"text": " "}\n'})
    for name in ("blank.txt", "blank.jsonl"):
        with pytest.raises(DataError, match=f"the train data of {name} holds no text, only white space"):
            list(open_files(tmp_path / name, name).documents())


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_files(tmp_path / "pipe", "pipe")
    with pytest.raises(DataError, match="holds no text files"):
        open_files(tmp_path, "folder")


def test_a_link_to_nowhere_is_said(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": "a\n"})
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        open_files(tmp_path, "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    fill(tmp_path, {"a.txt": "a\n"})
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list(open_files(tmp_path / "a.txt", "a").documents())
