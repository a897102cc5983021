"""Whole runs in this process: stopped at any step and gone on with, with dropout, on one rank and on two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_texts import write_text

from albireo.checkpoint import replace_folder
from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.device import Readback, capture_random_state, restore_random_state
from albireo.distributed import World
from albireo.errors import Interrupted, OutOfMemoryError
from albireo.training.assemble import open_session
from albireo.training.loop import train_loop
from albireo.training.metrics import read_metrics
from albireo.training.run_folder import RunFolder
from albireo.training.session import Session

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
# Evaluations and checkpoints that fall on one step, and each on steps of its own; batches that straddle epochs.
SCHEDULE = {"steps": 7, "eval_every": 3, "save_every": 2, "keep": 9}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", lines=24)


@pytest.fixture(scope="module")
def options(text: Path, cache_folder: Path) -> dict[str, Any]:
    return {
        "data": str(text),
        "cache": str(cache_folder),
        "sequence_length": 16,
        "batch_size": 2,
        "accumulate": 2,
        "dropout": 0.1,
        **SCHEDULE,
    }


def config_of(options: dict[str, Any]) -> RunConfig:
    return resolve(merge(RunConfig(), options), MachineFacts("cpu", 1, False))


def digest_of(session: Session) -> str:
    tensors = [tensor.detach() for tensor in session.state.names]
    for state in session.optimizer.unwrap().state.values():
        tensors += [state[key] for key in sorted(state)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def run_case_of(
    world: World,
    *,
    folder: str,
    options: dict[str, Any],
    stop_at: int = 0,
    asked: int = 0,
    lag: int = 0,
    disturbed: bool = False,
) -> dict[str, Any]:
    """Run, or go on with what lies in the folder, until the end or a stop that one rank is asked for in a step."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    path = Path(folder)
    known = (path / "config.json").exists()
    if world.is_main and not known:
        RunFolder.create(path)
    before = capture_random_state(CPU)
    losses: list[float] = []
    try:
        world.barrier()
        made = RunFolder(path, is_new=False)
        with open_session(config_of(options), made, world) as session:
            session.recorder._readback = Readback(CPU, lag)
            begin, record = session.begin_step, session.record

            def begin_step() -> None:
                if session.step + 1 == stop_at and world.rank == asked:
                    session.stop.requested = True
                begin()

            def noting(output: Any) -> bool:
                losses.append(output.loss_sum.item())
                if disturbed:
                    torch.rand(world.rank + 3)  # somebody else draws
                return record(output)

            session.begin_step, session.record = begin_step, noting  # type: ignore[method-assign]
            status = train_loop(session)
            session.recorder.drain()
            return {
                "status": status,
                "step": session.step,
                "losses": losses,
                "digest": digest_of(session),
                "saved": sorted(entry.name for entry in made.checkpoints_path.glob("step-*")),
            }
    finally:
        restore_random_state(before, CPU)


def rows_of(folder: Path) -> tuple[list[Any], list[Any]]:
    train, evaluations = read_metrics(folder / "metrics.jsonl")
    return (
        [(row.step, row.epoch, row.loss, row.lr, row.grad_norm) for row in train],
        [(row.step, row.eval_loss) for row in evaluations],
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, run_case_of(ALONE, folder=str(folder), options=options)


def test_it_evaluates_at_both_ends_and_saves_when_due(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    folder, ended = undisturbed
    train, evaluations = rows_of(folder)
    assert (ended["status"], ended["step"]) == ("finished", 7)
    assert [row[0] for row in train] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in evaluations] == [0, 3, 6, 7]
    assert ended["saved"] == [f"step-{step:08}" for step in (2, 4, 6, 7)]
    assert len({row[1] for row in train}) > 1, "the run should see more than one epoch"


@pytest.mark.parametrize("never", ["eval_every", "save_every"])
def test_zero_is_never(options: dict[str, Any], tmp_path: Path, never: str) -> None:
    ended = run_case_of(ALONE, folder=str(tmp_path / "run"), options={**options, "steps": 2, never: 0})
    assert (rows_of(tmp_path / "run")[1] == []) == (never == "eval_every")
    assert (ended["saved"] == []) == (never == "save_every")


def test_two_runs_of_one_seed_are_one(
    undisturbed: tuple[Path, dict[str, Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    torch.rand(5)  # wherever the process's own generator stands
    again = run_case_of(ALONE, folder=str(tmp_path / "run"), options=options)
    assert again == undisturbed[1]
    assert rows_of(tmp_path / "run") == rows_of(undisturbed[0])
    other = run_case_of(ALONE, folder=str(tmp_path / "other"), options={**options, "seed": 43})
    assert other["losses"][0] != again["losses"][0]


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("stop_at", range(1, 8))
def test_a_run_that_is_stopped_at_any_step_goes_on_to_the_bit(
    undisturbed: tuple[Path, dict[str, Any]], options: dict[str, Any], tmp_path: Path, stop_at: int, lag: int
) -> None:
    folder = tmp_path / "run"
    stopped = run_case_of(ALONE, folder=str(folder), options=options, stop_at=stop_at, lag=lag)
    if stopped["status"] == "interrupted":
        assert stop_at <= stopped["step"] <= min(stop_at + lag, 6)
        assert stopped["saved"][-1] == f"step-{stopped['step']:08}"
        resumed = run_case_of(ALONE, folder=str(folder), options=options, lag=lag)
        assert resumed["status"] == "finished"
        assert [*stopped["losses"], *resumed["losses"]] == undisturbed[1]["losses"]
        assert resumed["digest"] == undisturbed[1]["digest"]
    else:
        assert stop_at + lag >= 7
        assert stopped["digest"] == undisturbed[1]["digest"]
    assert rows_of(folder) == rows_of(undisturbed[0])


def test_a_stop_is_saved_where_nothing_else_is(options: dict[str, Any], tmp_path: Path) -> None:
    ended = run_case_of(ALONE, folder=str(tmp_path / "run"), options={**options, "save_every": 0}, stop_at=2)
    assert ended["saved"] == ["step-00000002"]


def test_a_finished_run_that_goes_on_does_nothing(
    options: dict[str, Any], tmp_path: Path, undisturbed: tuple[Path, dict[str, Any]]
) -> None:
    folder = tmp_path / "run"
    run_case_of(ALONE, folder=str(folder), options=options)
    again = run_case_of(ALONE, folder=str(folder), options=options)
    assert (again["status"], again["losses"], again["digest"]) == ("finished", [], undisturbed[1]["digest"])
    assert rows_of(folder) == rows_of(undisturbed[0])


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("stop_at", [3, 4])
def test_two_ranks_stop_together_and_go_on_to_the_bit(
    two_ranks: Any, options: dict[str, Any], tmp_path: Path, stop_at: int, asked: int
) -> None:
    straight = two_ranks.run(run_case_of, folder=str(tmp_path / "straight"), options=options)
    folder = str(tmp_path / "run")
    stopped = two_ranks.run(run_case_of, folder=folder, options=options, stop_at=stop_at, asked=asked)
    assert [(part["status"], part["step"]) for part in stopped] == [("interrupted", stop_at)] * 2
    resumed = two_ranks.run(run_case_of, folder=folder, options=options)
    for rank in range(2):
        assert [*stopped[rank]["losses"], *resumed[rank]["losses"]] == straight[rank]["losses"]
        assert resumed[rank]["digest"] == straight[0]["digest"]
    assert rows_of(Path(folder)) == rows_of(tmp_path / "straight")


def single_sample(options: dict[str, Any], text: Path, cache: Path, folder: Path) -> dict[str, Any]:
    """A text of two blocks: one to train on, which every rank sees in every batch, and one held out."""
    short = folder / "short.txt"
    short.write_text("\n".join(text.read_text().split("\n")[:4]))
    for length in range(4, 200):
        chosen = {**options, "data": str(short), "cache": str(cache), "sequence_length": length, "holdout": 0.5}
        with open_session(config_of(chosen), RunFolder.create(folder / f"length-{length}"), ALONE) as session:
            if len(session.data.train) == len(session.data.held_out) == 1:
                return chosen
    raise AssertionError


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ranks_draw_masks_of_their_own(
    two_ranks: Any, options: dict[str, Any], text: Path, cache_folder: Path, tmp_path: Path, dropout: float
) -> None:
    chosen = {**single_sample(options, text, cache_folder, tmp_path), "dropout": dropout, "steps": 3}
    first, second = two_ranks.run(run_case_of, folder=str(tmp_path / "run"), options=chosen)
    for ours, theirs in zip(first["losses"], second["losses"], strict=True):
        assert (ours == theirs) == (dropout == 0.0)


def test_masks_change_from_step_to_step(
    options: dict[str, Any], text: Path, cache_folder: Path, tmp_path: Path
) -> None:
    """With a learning rate of zero and one sample, nothing but the masks tells a step from the next."""
    chosen = {**single_sample(options, text, cache_folder, tmp_path), "learning_rate": 0.0, "steps": 3}
    for dropout, kinds in ((0.0, 1), (0.5, 3)):
        folder = tmp_path / f"run-{dropout}"
        losses = run_case_of(ALONE, folder=str(folder), options={**chosen, "dropout": dropout})["losses"]
        assert len(set(losses)) == kinds


def test_masks_do_not_hang_on_what_else_is_drawn(
    undisturbed: tuple[Path, dict[str, Any]], options: dict[str, Any], tmp_path: Path
) -> None:
    again = run_case_of(ALONE, folder=str(tmp_path / "run"), options=options, disturbed=True)
    assert again["losses"] == undisturbed[1]["losses"]


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "run")
    with open_session(config_of(options), folder, ALONE) as session:
        session.recorder._readback = Readback(CPU, 2)
        save, sync = session.state.save, session.recorder.sync
        synced: list[int] = []
        saved: list[int] = []

        def noting_sync() -> None:
            synced.append(len(read_metrics(folder.metrics_path)[0]))
            sync()

        def noting_save(*arguments: Any, **more: Any) -> None:
            saved.append(session.step)
            assert synced[-1] == session.step
            save(*arguments, **more)

        session.recorder.sync = noting_sync  # type: ignore[method-assign]
        session.state.save = noting_save  # type: ignore[method-assign]
        train_loop(session)
    assert saved == [2, 4, 6, 7]


class Events(World):
    """A world of one that writes down when it waits for others."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 1, 0, CPU)
        object.__setattr__(self, "seen", [])

    def barrier(self) -> None:
        self.seen.append("barrier")  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_ends_a_stopped_run_before_the_main_rank_has_written_all(
    options: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    """A rank that ends with the exit code of a stop is taken for one that failed, and all others are then ended."""
    with open_session(config_of(options), RunFolder.create(tmp_path / "run"), ALONE) as session:
        world = Events(rank)
        session.world = world
        seen: list[str] = world.seen  # type: ignore[attr-defined]
        session._report = lambda _: seen.append("report")  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match=r"stopped and saved at step 0 of 7; go on with: albireo train opt"):
            session.finish("interrupted")
    assert seen == (["report", "barrier"] if rank == 0 else ["barrier"])


def finishing_case(world: World, *, folder: str, options: dict[str, Any]) -> list[str]:
    """Finish a run that has not trained, and return what this rank wrote."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    path, wrote = Path(folder), []
    before = capture_random_state(CPU)

    def writing_model(*arguments: Any) -> None:
        wrote.append("model")
        replace_folder(*arguments)

    try:
        if world.is_main:
            RunFolder.create(path)
        world.barrier()
        with (
            pytest.MonkeyPatch.context() as patch,
            open_session(config_of(options), RunFolder(path, is_new=False), world) as session,
        ):
            patch.setattr("albireo.training.exporting.replace_folder", writing_model)
            report = session._report
            patch.setattr(session, "_report", lambda status: (wrote.append("report"), report(status)))
            session.progress.start_training(1, 7)
            session.finish("finished")
        return wrote
    finally:
        restore_random_state(before, CPU)


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_the_main_rank_writes_what_a_run_leaves(
    run_case: Run, options: dict[str, Any], tmp_path: Path, world_size: int
) -> None:
    folder = tmp_path / "run"
    wrote = run_case(finishing_case, world_size, folder=str(folder), options=options)
    assert wrote == [["model", "report"], []][:world_size]
    assert (folder / "model" / "config.json").exists()
    assert (folder / "summary.json").exists()


def test_the_model_is_left_out_on_demand(options: dict[str, Any], tmp_path: Path) -> None:
    with open_session(config_of(options), RunFolder.create(tmp_path / "run"), ALONE) as session:
        session.progress.start_training(1, 7)
        session.finish("finished", export_model=False)
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "summary.json").exists()


def test_running_out_of_memory_is_explained(options: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"out of memory on CPU .* weights .* optimizer states .*activations"),
        open_session(config_of(options), RunFolder.create(tmp_path / "run"), ALONE) as session,
        session.out_of_memory_explained(),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_stay_what_they_are(options: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        open_session(config_of(options), RunFolder.create(tmp_path / "run"), ALONE) as session,
        session.out_of_memory_explained(),
    ):
        raise ZeroDivisionError
