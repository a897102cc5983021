"""Every step becomes a row, in order, whatever the lag; and all ranks hear of a stop at the same step."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from albireo.booster import StepOutput
from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.device import PeakMemory, PeakReading, Readback
from albireo.distributed import World
from albireo.training.assemble import open_session
from albireo.training.loop import train_loop
from albireo.training.metrics import MetricsWriter, read_metrics
from albireo.training.progress import Progress
from albireo.training.recorder import Recorder
from albireo.training.run_folder import RunFolder

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


class Clock:
    """Seconds that a test turns by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("albireo.device.clock.time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class Kept:
    """A recorder with its file and its screen."""

    def __init__(self, folder: Path, lag: int, world: World = ALONE, **more: bool) -> None:
        self.screen = io.StringIO()
        self.path = folder / "metrics.jsonl"
        self.writer = MetricsWriter(self.path)
        progress = Progress(stream=self.screen)
        progress.start_training(1, 20)
        self.recorder = Recorder(
            world, progress, self.writer, samples_per_step=4, dataset_size=10, peaks=PeakMemory(CPU), **more
        )
        # The lag of a GPU, on any machine.
        self.recorder._readback = Readback(CPU, lag)

    def step(self, step: int, *, loss: float = 2.0, tokens: int = 10, norm: float = 1.0, **more: Any) -> None:
        output = StepOutput(torch.tensor(loss * tokens), tokens, torch.tensor(norm))
        more = {"first_sample": 4 * (step - 1), "learning_rate": step / 100, "stop_requested": False, **more}
        self.recorder.add(step, output, **more)

    def rows(self) -> list[Any]:
        return read_metrics(self.path)[0]

    def said(self) -> list[str]:
        """Return the lines that are neither a step's nor an evaluation's."""
        return [line for line in self.screen.getvalue().splitlines() if not re.match(r"step \d+/", line)]


@pytest.fixture(params=[0, 1, 2, 5])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path, request.param)
    yield kept
    kept.writer.close()


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Kept]:
    """One without a lag."""
    kept = Kept(tmp_path, 0)
    yield kept
    kept.writer.close()


def test_rows_come_in_order_and_all_of_them(kept: Kept) -> None:
    for step in range(1, 8):
        kept.step(step, loss=float(step), norm=step / 2)
        assert [row.step for row in kept.rows()] == list(range(1, len(kept.rows()) + 1))
        if step == 4:
            kept.recorder.drain()
            assert len(kept.rows()) == 4
    kept.recorder.drain()
    kept.recorder.drain()
    rows = kept.rows()
    assert [(row.step, row.loss, row.grad_norm, row.lr) for row in rows] == [
        (step, step, step / 2, step / 100) for step in range(1, 8)
    ]


def test_a_lag_holds_back_so_many_rows_and_no_more(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 2)
    for step in range(1, 6):
        kept.step(step)
        assert len(kept.rows()) == max(0, step - 2)
    kept.writer.close()


def test_a_cpu_has_no_lag(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        recorder = Recorder(
            ALONE, Progress(enabled=False), writer, samples_per_step=1, dataset_size=1, peaks=PeakMemory(CPU)
        )
        output = StepOutput(torch.tensor(4.0), 2, torch.tensor(1.0))
        recorder.add(1, output, first_sample=0, learning_rate=0.1, stop_requested=False)
        assert read_metrics(tmp_path / "metrics.jsonl")[0][0].loss == 2.0


def test_the_loss_is_the_mean_over_tokens(prompt: Kept) -> None:
    prompt.recorder.add(
        1,
        StepOutput(torch.tensor(21.0), 7, torch.tensor(0.5)),
        first_sample=0,
        learning_rate=0.1,
        stop_requested=False,
    )
    prompt.step(2, tokens=0, loss=0.0)
    assert [row.loss for row in prompt.rows()] == [3.0, 0.0]


def test_the_epoch_is_that_of_the_steps_first_sample(prompt: Kept) -> None:
    for step in range(1, 8):
        prompt.step(step)
    assert [row.epoch for row in prompt.rows()] == [1, 1, 1, 2, 2, 3, 3]


def test_the_epoch_is_right_after_a_resume_with_another_batch(prompt: Kept) -> None:
    # Ten steps of two samples, and then the run goes on with four in a step.
    prompt.step(11, first_sample=20)
    prompt.step(12, first_sample=24)
    prompt.step(13, first_sample=28)
    prompt.step(14, first_sample=32)
    assert [row.epoch for row in prompt.rows()] == [3, 3, 3, 4]


def test_speeds_are_over_all_that_a_step_took(prompt: Kept, clock: Clock) -> None:
    prompt.recorder.start_clock()
    clock.seconds += 2.0
    prompt.step(1, tokens=50)
    row = prompt.rows()[0]
    assert (row.step_seconds, row.tokens_per_second, row.samples_per_second) == (2.0, 25.0, 2.0)
    assert row.host_peak_bytes > 2**20


def test_the_clock_starts_again_after_what_was_no_step(kept: Kept, clock: Clock) -> None:
    kept.recorder.start_clock()
    for step in range(1, 5):
        clock.seconds += 1.0
        kept.step(step)
        if step == 2:
            clock.seconds += 0.0
            kept.recorder.drain()
            clock.seconds += 60.0  # an evaluation
            kept.recorder.start_clock()
    kept.recorder.drain()
    assert [row.step_seconds for row in kept.rows()] == [1.0] * 4


def test_a_clock_that_stands_still_divides_by_nothing(prompt: Kept, clock: Clock) -> None:
    prompt.recorder.start_clock()
    prompt.step(1)
    assert math.isfinite(prompt.rows()[0].tokens_per_second)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_said(kept: Kept, value: float) -> None:
    kept.step(1)
    kept.step(2, loss=value, norm=math.nan)
    kept.recorder.drain()
    said = [line for line in kept.screen.getvalue().splitlines() if line.startswith("warning")]
    assert said == [f"warning: at step 2 the loss is {value}; a smaller --learning-rate may help"]
    assert math.isnan(kept.rows()[1].loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_said(kept: Kept, value: float) -> None:
    kept.step(1, norm=value)
    kept.recorder.drain()
    assert f"warning: at step 1 the gradient's norm is {value}" in kept.screen.getvalue()


def test_what_lasts_is_said_once_and_when_it_is_over(kept: Kept) -> None:
    losses = [1.0, math.nan, math.nan, math.inf, math.nan, 2.0, 2.0, math.nan, 2.0]
    for step, loss in enumerate(losses, start=1):
        kept.step(step, loss=loss)
    kept.recorder.drain()
    assert kept.said() == [
        "warning: at step 2 the loss is nan; a smaller --learning-rate may help",
        "at step 6 the loss is finite again, after 4 steps",
        "warning: at step 8 the loss is nan; a smaller --learning-rate may help",
        "at step 9 the loss is finite again, after 1 step",
    ]


def test_one_trouble_after_another_is_said(kept: Kept) -> None:
    kept.step(1, norm=math.inf)
    kept.step(2, norm=math.nan)
    kept.step(3, loss=math.nan, norm=math.nan)
    kept.step(4, loss=math.nan, norm=math.nan)
    kept.step(5, norm=math.nan)
    kept.step(6)
    kept.recorder.drain()
    assert kept.said() == [
        "warning: at step 1 the gradient's norm is inf",
        "warning: at step 3 the loss is nan; a smaller --learning-rate may help",
        "warning: at step 5 the gradient's norm is nan",
        "at step 6 the gradient's norm is finite again, after 1 step",
    ]


def test_a_step_that_a_loss_scale_leaves_out_is_no_fault(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 2, loss_scaled=True)
    norms = [math.inf, math.nan, 1.0, math.inf, 1.0, 1.0]
    for step, norm in enumerate(norms, start=1):
        kept.step(step, norm=norm)
    kept.step(7, loss=math.nan, norm=math.nan)
    kept.recorder.drain()
    kept.writer.close()
    assert kept.said() == [
        "step 1 left out: its gradient overflowed in fp16; the loss scale is lowered until none does",
        "steps 1 to 2 were left out",
        "step 4 left out: its gradient overflowed in fp16; the loss scale is lowered until none does",
        "warning: at step 7 the loss is nan; a smaller --learning-rate may help",
    ]


def test_the_cost_of_compiling_is_said_once(tmp_path: Path, clock: Clock) -> None:
    kept = Kept(tmp_path, 0, compiled=True)
    kept.recorder.start_clock()
    assert kept.recorder.compile_seconds is None
    for step, seconds in enumerate((23.4, 0.31, 0.5, 9.0), start=1):
        clock.seconds += seconds
        kept.step(step)
        assert len(kept.said()) == (step > 1)
    kept.writer.close()
    assert kept.said() == ["compiled   the first step took 23.4 s, the second 0.31 s"]
    assert kept.recorder.compile_seconds == pytest.approx(23.09)


def test_an_evaluation_before_the_first_step_compiles_too(tmp_path: Path, clock: Clock) -> None:
    kept = Kept(tmp_path, 0, compiled=True)
    kept.recorder.start_clock()
    clock.seconds += 12.0
    kept.recorder.evaluation(0, 3.0)
    for seconds in (23.4, 0.31):
        kept.recorder.start_clock()
        clock.seconds += seconds
        kept.step(len(kept.rows()) + 1)
    kept.recorder.start_clock()
    clock.seconds += 12.0
    kept.recorder.evaluation(2, 3.0)
    kept.writer.close()
    expected = (
        "compiled   the first step took 23.4 s, the second 0.31 s; the evaluation before them 12 s, some of it for this"
    )
    assert [line for line in kept.said() if "compiled" in line] == [expected]


def test_a_first_step_that_is_no_slower_cost_nothing(tmp_path: Path, clock: Clock) -> None:
    kept = Kept(tmp_path, 0, compiled=True)
    for step in (1, 2):
        kept.recorder.start_clock()
        clock.seconds += step
        kept.step(step)
    kept.writer.close()
    assert kept.recorder.compile_seconds == 0.0


def test_nothing_is_said_of_compiling_where_nothing_was(kept: Kept) -> None:
    for step in range(1, 5):
        kept.step(step)
    kept.recorder.drain()
    assert kept.said() == []
    assert kept.recorder.compile_seconds is None


def test_a_run_tells_its_recorder_what_to_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    readers: list[PeakMemory] = []

    def make(*arguments: Any, **options: Any) -> Recorder:
        told.append({name: options.pop(name) for name in ("compiled", "loss_scaled")})
        readers.append(options["peaks"])
        return Recorder(*arguments, compiled=told[-1]["compiled"], **options)

    monkeypatch.setattr("albireo.training.assemble.Recorder", make)
    monkeypatch.setattr("albireo.training.assemble.compile_blocks", lambda *_, **__: 2)
    schedule = {"steps": 2, "eval_every": 0, "save_every": 0}
    options = {"data": "random", "sequence_length": 16, "batch_size": 2, **schedule}
    for more in ({"compile": True, "precision": "fp16"}, {}):
        config = resolve(merge(RunConfig(), {**options, **more}), MachineFacts("cpu", 1, False))
        folder = RunFolder.create(tmp_path / str(len(more)))
        with open_session(config, folder, ALONE) as session:
            session.finish(train_loop(session), export_model=False)
            assert session.booster.plugin.peaks(CPU) is readers[-1]
        seconds = json.loads(folder.summary_path.read_text())["compile_seconds"]
        assert seconds is None if not more else seconds >= 0.0
    assert told == [{"compiled": True, "loss_scaled": True}, {"compiled": False, "loss_scaled": False}]


def test_what_is_finite_is_not_warned_of(kept: Kept) -> None:
    kept.step(1, loss=1e30, norm=1e-30)
    kept.recorder.drain()
    assert "warning" not in kept.screen.getvalue()


def test_evaluations_are_rows_and_lines(prompt: Kept) -> None:
    prompt.recorder.evaluation(0, 3.0)
    prompt.step(1)
    prompt.recorder.evaluation(1, 2.5)
    prompt.recorder.sync()
    assert [(row.step, row.eval_loss) for row in read_metrics(prompt.path)[1]] == [(0, 3.0), (1, 2.5)]
    assert "evaluation loss 2.500" in prompt.screen.getvalue()
    assert "loss was 3.000 at step 0" in prompt.screen.getvalue()


def test_an_evaluation_that_is_no_number_is_said(prompt: Kept) -> None:
    prompt.recorder.evaluation(3, math.nan)
    assert "warning: at step 3 the evaluation loss is nan" in prompt.screen.getvalue()


def test_rows_have_the_peaks_that_the_runs_reader_gives(prompt: Kept) -> None:
    class Peaks(PeakMemory):
        def read(self) -> PeakReading:
            return PeakReading(1, 22, 333, 4444)

    prompt.recorder._peaks = Peaks(CPU)
    prompt.step(1)
    assert [(row.device_peak_bytes, row.host_peak_bytes) for row in prompt.rows()] == [(22, 4444)]


def test_other_ranks_keep_nothing(tmp_path: Path) -> None:
    recorder = Recorder(ALONE, Progress(enabled=False), None, samples_per_step=1, dataset_size=1, peaks=PeakMemory(CPU))
    output = StepOutput(torch.tensor(math.nan), 2, torch.tensor(1.0))
    recorder.add(1, output, first_sample=0, learning_rate=0.1, stop_requested=True)
    recorder.evaluation(1, math.nan)
    recorder.drain()
    recorder.sync()
    assert recorder.stop_agreed


def stopping_case(world: World, *, lag: int, who: int, asked_at: int, drains_at: int) -> dict[str, Any]:
    """One rank is asked to stop; return when each agrees, and what the rows say. All go on, so that none waits."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    recorder = Recorder(
        world, Progress(enabled=False), None, samples_per_step=2, dataset_size=10, peaks=PeakMemory(CPU)
    )
    recorder._readback = Readback(CPU, lag)
    stopped = 0
    losses: list[float] = []
    recorder._keep = lambda _step, loss, *_: losses.append(loss)  # type: ignore[method-assign]
    for step in range(1, 12):
        output = StepOutput(torch.tensor(float(step * (world.rank + 1))), 1 + 2 * world.rank, torch.tensor(1.0))
        asked = step >= asked_at and world.rank == who
        recorder.add(step, output, first_sample=0, learning_rate=0.1, stop_requested=asked)
        if step == drains_at:
            recorder.drain()
        if recorder.stop_agreed and not stopped:
            stopped = step
    recorder.drain()
    return {"stopped": stopped, "losses": losses}


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("drains_at", [0, 5])
def test_all_ranks_agree_on_the_step_at_which_one_stops(two_ranks: Any, lag: int, who: int, drains_at: int) -> None:
    results = two_ranks.run(stopping_case, lag=lag, who=who, asked_at=5, drains_at=drains_at)
    assert results[0] == results[1]
    assert results[0]["stopped"] == (5 if drains_at == 5 else 5 + lag)
    # The mean over both ranks' tokens: 1 and 3 of them, whose losses sum to the step and to twice it.
    assert results[0]["losses"] == [3 * step / 4 for step in range(1, 12)]


def test_nobody_stops_unasked(kept: Kept) -> None:
    for step in range(1, 5):
        kept.step(step)
    kept.recorder.drain()
    assert not kept.recorder.stop_agreed
