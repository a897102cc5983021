"""A traced step: the numbers are those of one that is not, and the timeline tells what has happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from gemini_runs import boosted, gemini, late_and_alone, left, train

from albireo.errors import ConfigError
from albireo.memory import Gemini
from albireo.memory.tracing import Timeline, read_trace
from albireo.plugins import ModelWrapper, TorchDDPPlugin

AWAY = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


def gemini_of(model: ModelWrapper) -> Gemini:
    return cast("Gemini", model.gemini)


def traced(folder: Path, clip: float, **options: Any) -> tuple[Timeline, dict[str, str], Gemini]:
    run = boosted(gemini(trace=folder, **options), "opt")
    train(run, "opt", range(5), clip=clip)
    return read_trace(folder), left(run), gemini_of(run[1])


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_a_trace_changes_no_bit_and_tells_of_each_chunk(clip: float, tmp_path: Path) -> None:
    plain = boosted(gemini(**AWAY), "opt")
    train(plain, "opt", range(5), clip=clip)
    timeline, weights, of = traced(tmp_path, clip, **AWAY)
    assert weights == left(plain)
    assert (timeline.step, timeline.is_simulated) == (4, True)
    trained = {chunk.number for chunk in of.chunks if chunk.trained}
    # Each chunk's weights came, its gradient left, and the host stepped it, if it was its turn in this step.
    of_kind = {
        kind: {work.chunk for work in timeline.works if work.kind == kind} for kind in ("weights in", "gradient out")
    }
    assert of_kind == {"weights in": {chunk.number for chunk in of.chunks}, "gradient out": trained}
    assert {work.chunk for work in timeline.works if work.kind == "host step"} == trained
    # Weights are there in forward, and again in backward; those of the last block, and the root's, in between too.
    stays = Counter(stay.chunk for stay in timeline.stays)
    last = next(span.unit for span in timeline.spans if span.phase == "backward" and span.unit)
    throughout = {chunk.number for chunk in timeline.chunks if set(chunk.units) & {"", last}}
    assert stays == {chunk.number: 1 if chunk.number in throughout else 2 for chunk in timeline.chunks}
    assert 0 < len(throughout) < len(timeline.chunks)
    assert {wait.kind for wait in timeline.waits} >= {"weights in", "host step"}
    assert ("norm of gradients" in {wait.kind for wait in timeline.waits}) == (clip > 0)
    # The computing's spans follow one another, and waits do not overlap.
    assert timeline.spans[0].begin_seconds == pytest.approx(0, abs=1e-3)
    assert timeline.spans[-1].end_seconds == timeline.seconds
    for before, after in zip(timeline.spans, timeline.spans[1:], strict=False):
        assert before.end_seconds == after.begin_seconds
    for one, other in zip(timeline.waits, timeline.waits[1:], strict=False):
        assert one.end_seconds <= other.begin_seconds
    assert {span.phase for span in timeline.spans} == {"forward", "backward", "step"}


def watchers(of: Gemini) -> list[object]:
    pool = of._setting.pool
    parts = [pool.to_device, pool.to_host, pool.gather, of.manager, of.conductor, of.manager.host_steps]
    return [part.watch for part in parts if part is not None]


def test_nobody_looks_before_and_after(tmp_path: Path) -> None:
    run = boosted(gemini(trace=tmp_path, **AWAY), "opt")
    of: Gemini = gemini_of(run[1])
    for step, looks in enumerate([False, False, True, False, False]):
        train(run, "opt", range(step, step + 1))
        assert [watch is not None for watch in watchers(of)] == [looks] * 6, step
        assert (tmp_path / "trace.json").exists() == (step >= 3)


def test_a_step_that_fails_is_not_traced_and_a_later_one_is(tmp_path: Path) -> None:
    run = boosted(gemini(trace=tmp_path, **AWAY), "opt")
    train(run, "opt", range(3), clip=0.5)

    def fail(*_: object) -> None:
        raise ValueError("told to")

    handle = run[1].unwrap().register_forward_hook(fail)
    with pytest.raises(ValueError, match="told to"):
        train(run, "opt", range(3, 4), clip=0.5)
    handle.remove()
    train(run, "opt", range(3, 5), clip=0.5)
    assert not (tmp_path / "trace.json").exists()
    train(run, "opt", range(5, 6), clip=0.5)
    assert read_trace(tmp_path).step == 6


def test_other_plugins_refuse_to_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no timeline"):
        TorchDDPPlugin().trace_into(tmp_path)
