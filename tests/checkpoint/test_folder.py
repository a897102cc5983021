from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from albireo.checkpoint import replace_folder, settle_folder
from albireo.errors import CheckpointError
from albireo.files import FileOperations


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "sub" / "b.txt").write_text(text)

    return write


def content(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.rglob("*.txt"))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class NoExchange(FileOperations):
    """As on a filesystem that cannot swap two names."""

    def exchange(self, first: Path, second: Path) -> bool:
        return False


@pytest.mark.parametrize("kind", [FileOperations, NoExchange])
def test_a_folder_is_made_then_replaced(tmp_path: Path, kind: type[FileOperations]) -> None:
    target = tmp_path / "run" / "model"
    replace_folder(target, writer("old"), kind())
    assert content(target) == ["old", "old"]
    replace_folder(target, writer("new"), kind())
    assert content(target) == ["new", "new"]
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; what was there stays"),
        (SafetensorError("I/O error"), "I/O error; what was there stays"),
    ],
)
def test_a_write_that_fails_leaves_the_old_folder(tmp_path: Path, error: Exception, message: str) -> None:
    def fail(folder: Path) -> None:
        writer("new")(folder)
        raise error

    target = tmp_path / "model"
    replace_folder(target, writer("old"))
    with pytest.raises(CheckpointError, match=message):
        replace_folder(target, fail)
    assert content(target) == ["old", "old"]
    assert names(tmp_path) == ["model"]


def test_an_error_of_the_writers_own_passes_through(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        replace_folder(tmp_path / "model", fail)
    assert names(tmp_path) == []


def test_a_file_or_a_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(CheckpointError, match=f"{name} is not a folder"):
            replace_folder(tmp_path / name, writer("new"))


class CrashingFiles(FileOperations):
    """Ends the process, as a kill does, just before an operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def about_to(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(77)


class CrashingNoExchange(CrashingFiles, NoExchange):
    pass


@pytest.mark.usefixtures("instant_sync")
@pytest.mark.parametrize(("kind", "gaps"), [(CrashingFiles, 0), (CrashingNoExchange, 1)])
def test_a_crash_at_each_operation_leaves_the_old_or_the_new_folder(
    tmp_path: Path, kind: type[CrashingFiles], gaps: int
) -> None:
    if gaps == 0 and not FileOperations().exchange(_folder(tmp_path / "x"), _folder(tmp_path / "y")):
        pytest.skip("this filesystem cannot swap two names")
    missing, seen = 0, set()
    for at in range(1, 60):
        target = tmp_path / str(at) / "model"
        replace_folder(target, writer("old"))
        child = os.fork()
        if child == 0:
            try:
                replace_folder(target, writer("new"), kind(at))
            finally:
                os._exit(0)
        crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
        missing += not target.exists()
        settled = target.exists()
        settle_folder(target)
        assert content(target) in (["old", "old"], ["new", "new"])
        assert names(target.parent) == ["model"]
        seen.add((settled, content(target)[0]))
        replace_folder(target, writer("again"))
        assert content(target) == ["again", "again"]
        if not crashed:
            break
    assert at > 10
    assert {(True, "old"), (True, "new")} <= seen
    assert missing == gaps


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
