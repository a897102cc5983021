from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from albireo.files import FileOperations


class Recorder(FileOperations):
    def __init__(self, chunk_bytes: int = 4) -> None:
        super().__init__(chunk_bytes)
        self.seen: list[tuple[str, str]] = []

    def about_to(self, operation: str, path: Path) -> None:
        self.seen.append((operation, path.name))


def test_a_file_is_written_in_chunks_and_synced(tmp_path: Path) -> None:
    files = Recorder()
    files.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"
    assert [operation for operation, _ in files.seen] == ["create", "write", "write", "write", "sync"]


def test_writing_again_leaves_nothing_of_the_old_content(tmp_path: Path) -> None:
    FileOperations().write_bytes(tmp_path / "a", b"a long content")
    FileOperations().write_bytes(tmp_path / "a", b"short")
    assert (tmp_path / "a").read_bytes() == b"short"


def test_what_the_system_did_not_take_is_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    FileOperations().write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_file_that_failed_is_not_synced(tmp_path: Path) -> None:
    files = Recorder()

    def write() -> None:
        with files.new_file(tmp_path / "a"):
            raise KeyError("x")

    with pytest.raises(KeyError):
        write()
    assert ("sync", "a") not in files.seen


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "a").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"):
        FileOperations().write_bytes(tmp_path / "a", b"x")
    assert (tmp_path / "other").read_text() == "other"


def test_missing_parents_are_made_and_each_is_synced_into_its_own(tmp_path: Path) -> None:
    files = Recorder()
    files.make_directory(tmp_path / "a" / "b")
    files.make_directory(tmp_path / "a" / "b")
    assert files.seen == [
        ("make directory", "a"),
        ("sync directory", tmp_path.name),
        ("make directory", "b"),
        ("sync directory", "a"),
    ]


def test_removing_a_tree_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("x")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "outside")
    FileOperations().remove_tree(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "outside" / "kept").exists()


def test_folders_change_names_in_one_step_or_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "in a").touch()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "in b").touch()
    swapped = FileOperations().exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "in b").exists() == swapped
    assert (tmp_path / "a" / "in a").exists() != swapped
    assert (tmp_path / "b" / "in a").exists() == swapped


def test_an_exchange_with_nothing_raises_or_says_no(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with contextlib.suppress(FileNotFoundError):
        assert not FileOperations().exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_dir()


def test_a_filesystem_that_syncs_no_folders_is_put_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        def fsync(_descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    FileOperations().sync_directory(tmp_path)
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        FileOperations().sync_directory(tmp_path)


def test_a_tree_is_synced_to_its_last_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    files = Recorder()
    files.sync_tree(tmp_path / "a")
    assert files.seen == [("sync", "file"), ("sync directory", "b"), ("sync directory", "a")]
