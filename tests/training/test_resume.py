"""A run that was stopped goes on to the very bits of one that never was."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_texts import write_text
from train_server import Ended, TrainServer

from albireo.errors import RunFolderError
from albireo.training.metrics import read_metrics
from albireo.training.plan import plan_run

FULL = os.environ.get("ALBIREO_TEST_FULL") == "1"
# A small text that several epochs go over: 3 samples of accumulation, batches that straddle epochs, dropout masks.
FLAGS = ["--batch-size", "2", "--accumulate", "3", "--sequence-length", "16", "--steps", "9", "--eval-every", "3"]
SAVES = ["--save-every", "2", "--keep", "2", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", lines=60)


@pytest.fixture(scope="module")
def flags(text: Path, cache_folder: Path) -> list[str]:
    return ["train", "opt", "--data", str(text), "--cache", str(cache_folder), *FLAGS, *SAVES]


@pytest.fixture(scope="module")
def undisturbed(train_server: TrainServer, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = train_server.run([*flags, "--output", str(folder)])
    assert ended.code == 0, ended.errors
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of the exported model and of the last checkpoint, as bytes."""
    tensors: dict[str, bytes] = {}
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    for file in [folder / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]:
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                tensors[f"{file.name}/{name}"] = opened.get_tensor(name).tobytes()
    return tensors


def losses(folder: Path) -> tuple[list[tuple[int, float, float, float]], list[tuple[int, float]]]:
    train, evaluations = read_metrics(folder / "metrics.jsonl")
    return (
        [(row.step, row.loss, row.lr, row.grad_norm) for row in train],
        [(row.step, row.eval_loss) for row in evaluations],
    )


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    assert losses(folder) == losses(undisturbed)
    ours, theirs = weights(folder), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    left = [path for path in folder.rglob("*") if ".tmp" in path.name or "trash" in path.name or ".new" in path.name]
    assert left == []


def assert_said_in_a_line(ended: Ended) -> None:
    assert "Traceback" not in ended.errors, ended.errors


def resume(server: TrainServer, folder: Path, flags: list[str]) -> None:
    """Go on with a run, as a user would: by its folder alone, or anew if it never began."""
    if (folder / "config.json").exists():
        ended = server.run(["train", "opt", "--resume", str(folder)])
    else:
        ended = server.run([*flags, "--output", str(folder)])
    assert ended.code == 0, ended.errors


def test_two_runs_of_the_same_flags_are_the_same_to_the_bit(
    train_server: TrainServer, flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    assert train_server.run([*flags, "--output", str(tmp_path / "run")]).code == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("after_rows", [1, 6])
def test_ctrl_c_saves_and_says_how_to_go_on(
    train_server: TrainServer, flags: list[str], undisturbed: Path, tmp_path: Path, after_rows: int
) -> None:
    folder = tmp_path / "run"
    process = train_server.start([*flags, "--output", str(folder)])
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b'"lr"') < after_rows:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process, signal.SIGINT)
    ended = train_server.wait()
    if ended.code != 0:  # it may have been at its last step
        assert ended.code == 130, ended.errors
        line = ended.errors.strip().splitlines()[-1]
        assert line.startswith("albireo: stopped and saved at step ")
        assert line.endswith(f"go on with: albireo train opt --resume {folder}")
        assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
        assert (folder / "loss.png").exists()
    assert_said_in_a_line(ended)
    resume(train_server, folder, flags)
    assert_same_run(folder, undisturbed)


def test_a_finished_run_that_is_resumed_changes_nothing(
    train_server: TrainServer, flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert train_server.run([*flags, "--output", str(folder)]).code == 0
    before = weights(folder)
    ended = train_server.run(["train", "opt", "--resume", str(folder)])
    assert ended.code == 0, ended.errors
    assert weights(folder) == before
    assert_same_run(folder, undisturbed)


def test_more_steps_can_be_asked_for(train_server: TrainServer, flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    constant = [*flags, "--schedule", "constant", "--warmup", "0", "--output", str(folder)]
    assert train_server.run([*constant, "--steps", "4"]).code == 0
    ended = train_server.run(["train", "opt", "--resume", str(folder), "--steps", "9"])
    assert ended.code == 0, ended.errors
    straight = tmp_path / "straight"
    assert train_server.run([*constant[:-1], str(straight), "--steps", "9"]).code == 0
    assert losses(folder)[0] == losses(straight)[0]
    assert weights(folder) == weights(straight)


def operations_of(server: TrainServer, flags: list[str], folder: Path) -> list[str]:
    """List every change to the disk of one whole run."""
    listed = folder / "operations.txt"
    assert server.run([*flags, "--output", str(folder / "listed")], operations=listed).code == 0
    return listed.read_text().splitlines()


def test_a_crash_at_any_file_operation_loses_nothing(
    train_server: TrainServer, flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    operations = operations_of(train_server, flags, tmp_path)
    second_save = [number for number, line in enumerate(operations) if "step-00000004" in line]
    wanted = list(range(len(operations))) if FULL else [*second_save[::4], len(operations) - 1]
    assert len(operations) > 50
    for number in wanted:
        folder = tmp_path / f"crash-{number}"
        ended = train_server.run([*flags, "--output", str(folder)], crash_at=number)
        assert ended.code == 137, f"before operation {number}, {operations[number]}: {ended.errors}"
        resume(train_server, folder, flags)
        assert_same_run(folder, undisturbed)


def test_a_kill_at_any_moment_loses_nothing(
    train_server: TrainServer, flags: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    generator = random.Random(11)
    begin = time.monotonic()
    assert train_server.run([*flags, "--output", str(tmp_path / "timed")]).code == 0
    whole_seconds = time.monotonic() - begin
    for number in range(30 if FULL else 4):
        folder = tmp_path / f"kill-{number}"
        process = train_server.start([*flags, "--output", str(folder)])
        time.sleep(generator.uniform(0, whole_seconds))
        os.kill(process, signal.SIGKILL)
        assert train_server.wait().code in (-signal.SIGKILL, 0)
        resume(train_server, folder, flags)
        assert_same_run(folder, undisturbed)


def test_there_is_nothing_to_resume_where_no_run_began(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        plan_run(recipe="opt", options={}, resume=tmp_path / "nowhere")
