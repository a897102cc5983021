"""The run folder: made, refused, read back, and locked against a second writer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from albireo.errors import RunFolderError
from albireo.files import FileOperations
from albireo.training.run_folder import RunFolder, replace_file

NOON = datetime(2026, 3, 1, 12, 0, 5)  # noqa: DTZ001


class StopAt(FileOperations):
    """Ends with an error instead of the n-th operation, as a kill at that moment would."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def about_to(self, operation: str, path: Path) -> None:
        if self.left == 0:
            raise InterruptedError(4, f"stopped before {operation}")
        self.left -= 1


def test_default_folder_carries_name_and_time_and_is_unique(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.create(name="opt-tiny", now=NOON).path for _ in range(3)]
    assert paths == [Path("runs") / f"opt-tiny-20260301-120005{end}" for end in ("", "-2", "-3")]
    assert all(path.is_dir() for path in paths)


def test_default_folder_of_a_hub_name_is_one_folder_deep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create(name="facebook/opt 125m", now=NOON).path == Path("runs/facebook-opt-125m-20260301-120005")


def test_default_time_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = datetime.now().astimezone().replace(microsecond=0)
    name = RunFolder.create().path.name
    made = datetime.strptime(name, "opt-tiny-%Y%m%d-%H%M%S").astimezone()
    assert before <= made <= datetime.now().astimezone()


def test_parents_are_made_and_paths_are_the_contracts(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "b")
    assert run.path.is_dir()
    names = [
        path.relative_to(run.path).as_posix()
        for path in (
            run.config_path,
            run.metrics_path,
            run.loss_plot_path,
            run.summary_path,
            run.checkpoints_path,
            run.model_path,
        )
    ]
    assert names == ["config.json", "metrics.jsonl", "loss.png", "summary.json", "checkpoints", "model"]


def test_config_and_summary_come_back(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    config = {"model": {"name": "tiny"}, "steps": 60, "note": "é", "clip": None}
    run.write_config(config)
    run.write_summary({"status": "finished"})
    assert RunFolder.open(run.path).read_config() == config
    assert run.config_path.read_text(encoding="utf-8").startswith('{\n  "model": {\n    "name": "tiny"\n  },\n')
    assert json.loads(run.summary_path.read_text()) == {"status": "finished"}


def test_a_folder_with_a_run_is_refused_and_resume_is_named(tmp_path):
    path = tmp_path / "run"
    RunFolder.create(path).write_config({"steps": 1})
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(path)
    assert str(caught.value) == (
        f"{path} already holds a run; go on with it by --resume {path}, or choose another --output"
    )
    assert RunFolder.open(path).read_config() == {"steps": 1}


@pytest.mark.parametrize("part", ["metrics.jsonl", "checkpoints"])
def test_parts_of_a_run_without_its_config_are_refused(tmp_path, part):
    (tmp_path / part).mkdir()
    with pytest.raises(RunFolderError, match=rf"holds {part} of a run but no config\.json.*another --output"):
        RunFolder.create(tmp_path)


def test_other_files_in_the_folder_do_no_harm(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path).write_config({})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_killed_before_its_config_can_be_started_again(tmp_path):
    RunFolder.create(tmp_path / "run")
    RunFolder.create(tmp_path / "run").write_config({"steps": 2})


def test_two_runs_that_found_the_folder_empty_do_not_mix(tmp_path):
    first, second = (RunFolder.create(tmp_path / "run") for _ in range(2))
    first.write_config({"from": "first"})
    first.write_config({"from": "first", "again": True})
    with pytest.raises(RunFolderError, match="already holds a run"):
        second.write_config({"from": "second"})
    assert first.read_config() == {"from": "first", "again": True}


def test_a_resumed_run_may_write_its_config_anew(tmp_path):
    RunFolder.create(tmp_path / "run").write_config({"steps": 1})
    run = RunFolder.open(tmp_path / "run")
    run.write_config({"steps": 2})
    assert run.read_config() == {"steps": 2}


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(file / below)
    assert str(caught.value).startswith(f"cannot make the run folder {file / below}: {file}")
    assert str(caught.value).endswith("is a file")
    assert file.read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)  # tests may run as root, whom no mode stops
    with pytest.raises(RunFolderError, match=r"cannot write in the run folder .*: Permission denied"):
        RunFolder.create(tmp_path)


def test_a_parent_that_cannot_be_written_is_refused():
    with pytest.raises(RunFolderError, match=r"cannot make the run folder /proc/albireo/run: "):
        RunFolder.create("/proc/albireo/run")


def test_open_needs_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "it has no config.json"),
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "file", "it is a file, not a run's folder"),
    ):
        with pytest.raises(RunFolderError) as caught:
            RunFolder.open(path)
        assert str(caught.value) == f"no run in {path}: {reason}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "steps": 1,\n  "clip" 2\n}', r"config\.json is damaged at line 3, column 10: Expecting ':'"),
        (b'{"steps": ', r"config\.json is damaged at line 1, column 11"),
        (b"", r"config\.json is damaged at line 1, column 1"),
        (b'{"name": "\xff"}', r"config\.json is damaged: .*utf-8.*it must be JSON in UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", r"config\.json is damaged: .*digits"),
        (b"[" * 100_000, r"config\.json is damaged"),
        (b"[1]", r"config\.json must hold a JSON object, but holds a list"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        RunFolder.open(tmp_path).read_config()


def test_a_write_stopped_anywhere_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "config.json"
    counter = StopAt(1000)
    replace_file(path, b"first", counter)
    operations = 1000 - counter.left
    assert operations >= 5  # create, write, sync, rename, sync directory
    left_behind = []
    for number in range(operations):
        path.write_bytes(b"old")
        with pytest.raises(RunFolderError, match=r"^cannot write .*config\.json: stopped before "):
            replace_file(path, b"new", StopAt(number))
        left_behind.append(path.read_bytes())
    assert left_behind == [b"old"] * (operations - 1) + [b"new"]  # the rename is the change, one sync comes after it
    replace_file(path, b"new", FileOperations())
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot write .*config\.json: "):
        replace_file(tmp_path / "config.json", b"")


def test_numbers_that_json_cannot_hold_are_a_bug_and_leave_no_file(tmp_path):
    run = RunFolder.create(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_summary({"loss": float("nan")})
    assert not run.summary_path.exists()


def test_a_second_writer_is_refused_until_the_first_lets_go(tmp_path):
    run, other = RunFolder.create(tmp_path), RunFolder.create(tmp_path)
    with run.lock(), pytest.raises(RunFolderError) as caught, other.lock(timeout_seconds=0):
        pytest.fail("two writers")
    assert str(caught.value) == (
        f"another process is writing the run in {tmp_path}; wait until it has ended, or choose another --output"
    )
    with other.lock(timeout_seconds=0):
        pass


def test_the_lock_goes_when_the_block_fails(tmp_path):
    run = RunFolder.create(tmp_path)
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock(timeout_seconds=0):
        pass


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    run = RunFolder.create(tmp_path)
    run.lock_path.unlink()
    run.lock_path.mkdir()
    with pytest.raises(RunFolderError, match="cannot lock the run folder"), run.lock(timeout_seconds=0):
        pytest.fail("locked")


def test_the_lock_of_another_process_holds_and_dies_with_it(tmp_path):
    run = RunFolder.create(tmp_path)
    code = (
        "import sys; from albireo.training.run_folder import RunFolder\n"
        "with RunFolder.create(sys.argv[1]).lock():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(RunFolderError, match="another process"), run.lock(timeout_seconds=0):
                pytest.fail("two writers")
        finally:
            holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with run.lock(timeout_seconds=0):
        pass
