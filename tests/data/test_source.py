from __future__ import annotations

from pathlib import Path

import pytest

from albireo.data import open_source
from albireo.errors import DataError


def test_every_kind_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("a local folder\n")
    (tmp_path / "data.jsonl").write_text('{"body": "a record"}\n')
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "synthetic" / "a.txt").write_text("mine\n")
    assert list(open_source("owner/name").documents()) == ["a local folder\n"]
    assert list(open_source("data.jsonl", text_field="body").documents()) == ["a record"]
    assert open_source("synthetic", seed=3).fingerprint() != open_source("synthetic", seed=4).fingerprint()
    assert list(open_source("./synthetic").documents()) == ["mine\n"]


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home\n")
    assert list(open_source("~/a.txt").documents()) == ["at home\n"]


@pytest.mark.parametrize(
    "name", ["gone.txt", "./gone", "/gone/away", "~/gone", "a/b/gone.jsonl", "gone/", "../gone", "owner/name.parquet"]
)
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match=f"^no such file or folder: {name}$"):
        open_source(name)


@pytest.mark.parametrize("name", ["gone", "a/b/c/d", "a//b"])
def test_what_cannot_be_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .* is named owner/name/config"):
        open_source(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no data was named"),
        (" ", "no data was named"),
        ("a\0b.txt", "no such file or folder|cannot be a file"),  # by the version of Python
        ("x" * 5000, "cannot be a file: .*too long"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(name)


def test_real_text(shared_data: Path) -> None:
    file = shared_data / "wikitext-2-raw" / "wiki.test.raw"
    source = open_source(str(file))
    # Its line breaks are "\r\n", which reading a text file anywhere makes "\n".
    assert "".join(source.documents()) == file.read_text(encoding="utf-8")
    assert source.size_bytes("train") == file.stat().st_size
    assert open_source(str(file.parent)).fingerprint() == source.fingerprint()


def test_real_records(shared_data: Path) -> None:
    file = shared_data / "alpaca" / "alpaca_en_demo.json"
    assert len(list(open_source(str(file), text_field="output").documents())) == 999
    with pytest.raises(DataError, match=r'record 1 has no field "text"; its fields are: input, instruction, output'):
        list(open_source(str(file)).documents())
