"""A run that was stopped goes on to the very bits of one that never was."""

import json
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_server import RankServer
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import small_opt
from tiny_texts import write_text
from train_server import Ended, TrainServer

from albireo.checkpoint import newest_whole
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


def last_shared_state(folder: Path) -> dict[str, Any]:
    """Position, schedule and loss scale of the last checkpoint."""
    checkpoint, damaged = newest_whole(folder / "checkpoints")
    assert checkpoint is not None
    assert damaged == []
    return dict(checkpoint.shared_state)


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
    assert last_shared_state(folder) == last_shared_state(undisturbed)
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    left = [path for path in folder.rglob("*") if ".tmp" in path.name or "trash" in path.name or ".new" in path.name]
    assert left == []


def assert_said_in_a_line(ended: Ended) -> None:
    assert "Traceback" not in ended.errors, ended.errors


def wait_for_rows(folder: Path, rows: int) -> None:
    """Wait until so many training steps are in the metrics file."""
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b'"lr"') < rows:
        assert time.monotonic() < deadline
        time.sleep(0.002)


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
    wait_for_rows(folder, after_rows)
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


GEMINI = {
    "auto": "--plugin gemini",
    "auto under a cap": "--plugin gemini --mem-cap 0.01",
    "static halves": "--plugin gemini --offload-optim-frac 0.5 --offload-param-frac 0.5",
}


@pytest.fixture(scope="module")
def gemini_runs(
    train_server: TrainServer, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the folder of a whole run of a way of Gemini's."""

    @cache
    def run(way: str) -> Path:
        folder = tmp_path_factory.mktemp("gemini") / "run"
        ended = train_server.run([*flags, *shlex.split(GEMINI[way]), "--output", str(folder)])
        assert ended.code == 0, ended.errors
        return folder

    return run


@pytest.mark.parametrize("way", ["auto under a cap"])
def test_gemini_goes_on_to_the_very_bits_after_a_crash(
    train_server: TrainServer, flags: list[str], gemini_runs: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    whole = gemini_runs(way)
    arguments = [*flags, *shlex.split(GEMINI[way]), "--output"]
    listed = tmp_path / "operations.txt"
    assert train_server.run([*arguments, str(tmp_path / "listed")], operations=listed).code == 0
    second = [number for number, line in enumerate(listed.read_text().splitlines()) if "step-00000004" in line]
    folder = tmp_path / "run"
    assert train_server.run([*arguments, str(folder)], crash_at=second[len(second) // 2]).code == 137
    resume(train_server, folder, [*flags, *shlex.split(GEMINI[way])])
    assert_same_run(folder, whole)


def test_where_gemini_has_things_changes_no_bit_of_a_run(undisturbed: Path, gemini_runs: Callable[[str], Path]) -> None:
    """Nor does the plugin, in fp32 and alone, where gradients are not clipped by a norm that was added up otherwise."""
    first, *others = map(gemini_runs, GEMINI)
    for other in others:
        assert_same_run(other, first)
    (rows, evaluations), (plain_rows, plain_evaluations) = losses(first), losses(undisturbed)
    for ours, theirs in zip([*rows, *evaluations], [*plain_rows, *plain_evaluations], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("way", "goes_on"),
    [
        ("auto", "--plugin torch_ddp"),
        ("static halves", "--plugin low_level_zero"),
        ("auto under a cap", "--plugin gemini --offload-optim-frac 1 --offload-param-frac 1 --mem-cap 0"),
        ("static halves", "--plugin gemini --offload-optim-frac 1"),
    ],
)
def test_a_run_of_geminis_goes_on_under_another_plugin_or_placement(
    train_server: TrainServer, gemini_runs: Callable[[str], Path], tmp_path: Path, way: str, goes_on: str
) -> None:
    whole = gemini_runs(way)
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-00000009")
    ended = train_server.run(["train", "opt", "--resume", str(folder), *shlex.split(goes_on)])
    assert ended.code == 0, ended.errors
    assert "going on from the checkpoint of step 8" in ended.errors
    (rows, evaluations), (wanted_rows, wanted_evaluations) = losses(folder), losses(whole)
    assert rows[:8] == wanted_rows[:8]
    if "gemini" in goes_on:
        assert_same_run(folder, whole)
    for ours, theirs in zip([rows[8], evaluations[-1]], [wanted_rows[8], wanted_evaluations[-1]], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_there_is_nothing_to_resume_where_no_run_began(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no such folder"):
        plan_run(recipe="opt", options={}, resume=tmp_path / "nowhere")


@dataclass(frozen=True)
class Way:
    """A way to train on two ranks, and how a run of it is interrupted in the sample.

    Attributes:
        flags: which plugin, and how.
        crash: the rank that ends without any cleaning up in the middle of its second checkpoint; None: other ends.
        kill: "launcher" or a rank, which is killed after four steps; "ctrl-c" stops the run.
    """

    flags: str
    crash: int | None = None
    kill: str | int | None = None


SAMPLE = [
    Way("--plugin torch_ddp --dropout 0.1", crash=0),
    Way("--plugin torch_fsdp", kill=1),
    Way("--plugin low_level_zero --zero-stage 1", crash=1),
    Way("--plugin low_level_zero --dropout 0.1", kill="launcher"),
    Way("--plugin low_level_zero --cpu-offload", kill="ctrl-c"),
    Way("--plugin low_level_zero --precision fp16", crash=0),
    Way("--plugin gemini --precision bf16 --offload-optim-frac 1 --offload-param-frac 1", kill="ctrl-c"),
]
MORE = [
    Way("--plugin torch_ddp_fp16 --dropout 0.1"),
    Way("--plugin torch_fsdp --precision bf16 --cpu-offload"),
    Way("--plugin low_level_zero --precision bf16 --cpu-offload"),
    Way("--plugin gemini --dropout 0.1"),
    Way("--plugin gemini --precision fp16 --offload-optim-frac 0.5 --offload-param-frac 0.5 --shard-param-frac 0.5"),
]


@pytest.fixture(scope="module")
def rank_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    server = RankServer(tmp_path_factory.mktemp("rank_server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model, of which only the description is used."""
    folder = tmp_path_factory.mktemp("model") / "small"
    model = small_opt(vocab_size=272, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(text: Path, small: Path, cache_folder: Path) -> list[str]:
    """Flags of a run on two ranks, each of which steps four samples in two micro-batches."""
    much = "--batch-size 2 --accumulate 2 --sequence-length 16 --steps 8 --eval-every 4 --save-every 2 --gpus 2"
    files = ["--model", str(small), "--init", "random", "--data", str(text), "--cache", str(cache_folder)]
    return ["train", "opt", *files, *shlex.split(much)]


@pytest.fixture(scope="module")
def undisturbed_on_ranks(
    rank_server: RankServer, base: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Way], Path]:
    """Return the folder of a whole run of a way; beside it lie the file operations of the rank that is to crash."""

    @cache
    def run(way: Way) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        arguments = [*base, *shlex.split(way.flags), "--output", str(folder)]
        ended = rank_server.run(arguments, operations=folder.parent / "operations.txt", crash_rank=way.crash or 0)
        assert ended.code == 0, ended.errors
        return folder

    return run


def interrupt(server: RankServer, arguments: list[str], folder: Path, way: Way, operations: list[str]) -> Ended:
    """Begin a run, and end it as its way says."""
    if way.crash is not None:
        second = [number for number, line in enumerate(operations) if "step-00000004" in line]
        ended = server.run(arguments, crash_at=second[len(second) // 2], crash_rank=way.crash)
        assert ended.code != 0
        return ended
    process = server.start(arguments)
    wait_for_rows(folder, 4)
    if way.kill == "ctrl-c":
        os.kill(process, signal.SIGINT)
    else:
        server.kill(process if way.kill == "launcher" else server.ranks()[int(way.kill or 0)])
    ended = server.wait()
    server.wait_for_ranks()
    return ended


@pytest.mark.parametrize("way", SAMPLE, ids=lambda way: way.flags)
def test_ranks_go_on_to_the_very_bits(
    rank_server: RankServer, base: list[str], undisturbed_on_ranks: Callable[[Way], Path], tmp_path: Path, way: Way
) -> None:
    whole = undisturbed_on_ranks(way)
    operations = (whole.parent / "operations.txt").read_text().splitlines()
    folder = tmp_path / "run"
    arguments = [*base, *shlex.split(way.flags), "--output", str(folder)]
    ended = interrupt(rank_server, arguments, folder, way, operations)
    if way.kill == "ctrl-c" and ended.code != 0:  # it may have been at its last step
        assert ended.code == 130, ended.errors
        assert ended.errors.strip().splitlines()[-1].endswith(f"go on with: albireo train opt --resume {folder}")
    resume(rank_server, folder, arguments)
    assert_same_run(folder, whole)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_ranks_that_are_killed_at_any_moment_lose_nothing(
    rank_server: RankServer, base: list[str], undisturbed_on_ranks: Callable[[Way], Path], tmp_path: Path
) -> None:
    generator = random.Random(17)
    ways = [*SAMPLE, *MORE]
    whole_seconds: dict[Way, float] = {}
    for number in range(30):
        way = ways[number % len(ways)]
        whole = undisturbed_on_ranks(way)
        folder = tmp_path / f"kill-{number}"
        arguments = [*base, *shlex.split(way.flags), "--output", str(folder)]
        if way not in whole_seconds:
            begin = time.monotonic()
            assert rank_server.run([*arguments[:-1], str(tmp_path / f"timed-{number}")]).code == 0
            whole_seconds[way] = time.monotonic() - begin
        launcher = rank_server.start(arguments)
        time.sleep(generator.uniform(0, whole_seconds[way]))
        rank_server.kill(generator.choice([launcher, *rank_server.ranks()]))
        rank_server.wait()
        rank_server.wait_for_ranks()
        resume(rank_server, folder, arguments)
        assert_same_run(folder, whole)
        shutil.rmtree(folder)


def assert_exported_whole(folder: Path) -> None:
    """Check that the model is the last checkpoint's fp32 weights, and that transformers opens it."""
    from transformers import OPTForCausalLM

    checkpoint, _ = newest_whole(folder / "checkpoints")
    assert checkpoint is not None
    exported = load_file(folder / "model" / "model.safetensors")
    names = {name.removeprefix("model/") for name in checkpoint.names("model/")}
    assert names == {*exported, "lm_head.weight"}  # which is the embedding
    for name, tensor in exported.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, checkpoint.read(f"model/{name}").reshape(tensor.shape)), name
    loaded, report = OPTForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, exported[{"lm_head.weight": "model.decoder.embed_tokens.weight"}.get(name, name)])


@pytest.mark.parametrize("way", SAMPLE, ids=lambda way: way.flags)
def test_the_exported_model_is_the_checkpoints_weights(undisturbed_on_ranks: Callable[[Way], Path], way: Way) -> None:
    assert_exported_whole(undisturbed_on_ranks(way))


@pytest.mark.full
@pytest.mark.parametrize("way", MORE, ids=lambda way: way.flags)
def test_more_exported_models_are_the_checkpoints_weights(
    undisturbed_on_ranks: Callable[[Way], Path], way: Way
) -> None:
    assert_exported_whole(undisturbed_on_ranks(way))


# The samples of a step stay the same ones.
ELSEWHERE = [
    ("--plugin low_level_zero --zero-stage 1", "--plugin torch_ddp --gpus 1 --batch-size 4"),
    ("--plugin torch_fsdp", "--plugin low_level_zero --gpus 1 --accumulate 4"),
    ("--plugin low_level_zero --cpu-offload", "--plugin torch_fsdp --no-cpu-offload"),
    ("--plugin torch_fsdp", "--plugin gemini --gpus 1 --accumulate 4"),
]


@pytest.mark.parametrize(("begun", "goes_on"), ELSEWHERE)
def test_a_run_goes_on_under_another_plugin_and_number_of_ranks(
    rank_server: RankServer, undisturbed_on_ranks: Callable[[Way], Path], tmp_path: Path, begun: str, goes_on: str
) -> None:
    whole = undisturbed_on_ranks(next(way for way in SAMPLE if way.flags == begun))
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    ended = rank_server.run(["train", "opt", "--resume", str(folder), *shlex.split(goes_on)])
    assert ended.code == 0, ended.errors
    assert "going on from the checkpoint of step 6" in ended.errors
    assert_exported_whole(folder)
    (rows, evaluations), (wanted_rows, wanted_evaluations) = losses(folder), losses(whole)
    assert rows[:6] == wanted_rows[:6]
    # fp32 sums in another order, at most.
    for ours, theirs in zip([*rows[6:], evaluations[-1]], [*wanted_rows[6:], wanted_evaluations[-1]], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
