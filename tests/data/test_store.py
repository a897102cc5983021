from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from filelock import FileLock

from albireo.data.store import built_once, default_cache_folder, key_of
from albireo.errors import DataError
from albireo.log import Log

CONTENT = b"0123456789" * 100


class Builder:
    """Builds an entry of two files and counts how often it had to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "data.bin").write_bytes(CONTENT)
        (folder / "more.txt").write_text("more")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_an_entry_is_built_once_and_found_again(tmp_path: Path) -> None:
    builder = Builder()
    entry = built_once(tmp_path / "new" / "cache", "things", "key", builder)
    assert (entry / "data.bin").read_bytes() == CONTENT
    assert built_once(tmp_path / "new" / "cache", "things", "key", builder) == entry
    assert builder.times == 1
    assert built_once(tmp_path / "new" / "cache", "things", "other", builder) != entry
    assert builder.times == 2
    assert sorted(path.name for path in entry.parent.iterdir() if path.suffix != ".lock") == ["key", "other"]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shortened": (lambda entry: os.truncate(entry / "data.bin", 10), "data.bin has 10 bytes, not 1000"),
    "emptied": (lambda entry: os.truncate(entry / "data.bin", 0), "data.bin has 0 bytes"),
    "altered": (lambda entry: flip(entry / "data.bin"), "the checksum of data.bin differs"),
    "lost": (lambda entry: (entry / "more.txt").unlink(), "more.txt"),
    "manifest lost": (lambda entry: (entry / "entry.json").unlink(), "entry.json"),
    "manifest torn": (lambda entry: os.truncate(entry / "entry.json", 20), "JSONDecodeError"),
    "manifest a list": (lambda entry: (entry / "entry.json").write_text("[]"), "TypeError"),
    "manifest empty": (lambda entry: (entry / "entry.json").write_text('{"format": 1, "files": {}}'), "another format"),
    "manifest wrong": (lambda entry: (entry / "entry.json").write_text('{"format": 1, "files": [1]}'), "AttributeError"),
    "manifest newer": (lambda entry: (entry / "entry.json").write_text('{"format": 2, "files": {"a": 1}}'), "another format"),
    "manifest bytes": (lambda entry: (entry / "entry.json").write_bytes(b"\xff\xfe\x00"), "Error"),
    "a file instead": (lambda entry: (shutil.rmtree(entry), entry.write_text("x")), "NotADirectoryError"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_said_and_built_again(tmp_path: Path, damage: str) -> None:
    builder, stream = Builder(), StringIO()
    entry = built_once(tmp_path, "things", "key", builder)
    harm, reason = DAMAGES[damage]
    harm(entry)
    assert built_once(tmp_path, "things", "key", builder, log=Log(stream=stream)) == entry
    assert builder.times == 2
    assert (entry / "data.bin").read_bytes() == CONTENT
    assert stream.getvalue().startswith(f"warning: the cached things in {entry} are damaged (")
    assert reason in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_building_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "data.bin").write_bytes(CONTENT)
        raise DataError("the reason")

    with pytest.raises(DataError, match=r"^the reason$"):
        built_once(tmp_path, "things", "key", fail)
    assert [path.name for path in (tmp_path / "things").iterdir() if path.suffix != ".lock"] == []
    builder = Builder()
    built_once(tmp_path, "things", "key", builder)
    assert builder.times == 1


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    partial = tmp_path / "things" / "key.partial"
    partial.mkdir(parents=True)
    (partial / "old.bin").write_bytes(b"half")
    entry = built_once(tmp_path, "things", "key", Builder())
    assert not partial.exists()
    assert not (entry / "old.bin").exists()


def test_threads_that_come_together_build_once(tmp_path: Path) -> None:
    builder, barrier, entries = Builder(), threading.Barrier(6), []

    def ask() -> None:
        barrier.wait()
        entries.append(built_once(tmp_path, "things", "key", builder))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.times == 1
    assert len(set(entries)) == 1
    assert len(entries) == 6


SCRIPT = """
import sys
from pathlib import Path
from albireo.data.store import built_once
from albireo.log import Log

def build(folder):
    with open(sys.argv[2], "a") as note:
        note.write("built\\n")
    (folder / "data.bin").write_bytes(b"x" * 1000)

print(built_once(Path(sys.argv[1]), "things", "key", build, log=Log()))
"""


def test_processes_that_come_together_build_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), str(tmp_path / "note")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    (tmp_path / "cache" / "things").mkdir(parents=True)
    with FileLock(tmp_path / "cache" / "things" / "key.lock"):  # both have arrived before either may begin
        ranks = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
        for rank in ranks:
            assert "waiting for another process" in rank.stderr.readline()
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    assert (tmp_path / "note").read_text() == "built\n"


def test_whoever_waits_says_so(tmp_path: Path) -> None:
    stream, entered = StringIO(), threading.Event()
    (tmp_path / "things").mkdir()
    lock = FileLock(tmp_path / "things" / "key.lock", thread_local=False)
    lock.acquire()

    class Says(Log):
        def line(self, text: str = "") -> None:
            super().line(text)
            entered.set()

    waiting = threading.Thread(
        target=built_once, args=(tmp_path, "things", "key", Builder()), kwargs={"log": Says(stream=stream)}
    )
    waiting.start()
    assert entered.wait(30)
    lock.release()
    waiting.join()
    assert "waiting for another process" in stream.getvalue()
    assert (tmp_path / "things" / "key" / "data.bin").exists()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"the cache folder .*file cannot be written \(.*\); name another by --cache .*ALBIREO_CACHE"
    ):
        built_once(tmp_path / "file", "things", "key", Builder())

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        built_once(tmp_path, "things", "key", disk_full)


def test_the_manifest_holds_sizes_and_checksums(tmp_path: Path) -> None:
    manifest = json.loads((built_once(tmp_path, "things", "key", Builder()) / "entry.json").read_text())
    assert manifest["files"]["data.bin"]["bytes"] == 1000
    assert sorted(manifest["files"]) == ["data.bin", "more.txt"]


def test_keys_tell_all_parts_apart() -> None:
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("ab", "c", 1), key_of("ab", "c", "1")}) == 4
    assert key_of("a", 1) == key_of("a", 1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("ALBIREO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_folder() == Path("/home/someone/.cache/albireo")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_folder() == Path("/home/someone/.cache/albireo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_folder() == Path("/caches/albireo")
    monkeypatch.setenv("ALBIREO_CACHE", "~/mine")
    assert default_cache_folder() == Path("/home/someone/mine")
