"""States streamed through the device: no bit changes, late lanes or not, and a failure is not covered up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gemini_runs import ALONE, boosted, everything, gemini, late_and_alone, left, train
from gemini_zoo import KINDS, built

from albireo.booster import Booster
from albireo.device.lanes import Arrival
from albireo.device.simulated_lane import SimulatedLane
from albireo.errors import ConfigError
from albireo.memory import Gemini, streamed_steps
from albireo.memory.stream_pieces import pieces_of
from albireo.memory.streamed_steps import StreamedSteps
from albireo.memory.tracing import read_trace
from albireo.plugins import GeminiPlugin, ModelWrapper

HOST = {"offload_optim_frac": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "weights stay": {**HOST, "offload_param_frac": 0.0, "stream_optim_frac": 1.0},
    "weights travel": {**HOST, "offload_param_frac": 1.0, "stream_optim_frac": 1.0},
    "half beside the host": {**HOST, "offload_param_frac": 0.5, "stream_optim_frac": 0.5},
    "all three places": {"offload_optim_frac": 0.7, "offload_param_frac": 0.5, "stream_optim_frac": 0.5},
}
CELLS = [("fp32", 1, 0.5), ("bf16", 1, 0.0), ("bf16", 3, 0.5), ("fp16", 2, 0.5)]


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_steps, "slot_elements", lambda _: 320)
    monkeypatch.setattr(streamed_steps, "pieces_of", partial(pieces_of, step=64))


def gemini_of(model: ModelWrapper) -> Gemini:
    return cast("Gemini", model.gemini)


@pytest.mark.parametrize(("precision", "accumulate", "clip"), CELLS)
def test_streaming_changes_no_bit(precision: str, accumulate: int, clip: float) -> None:
    wanted = everything(gemini(precision=precision, **HOST), "opt", accumulate=accumulate, clip=clip)
    for way, options in WAYS.items():
        got = everything(gemini(precision=precision, **options), "opt", accumulate=accumulate, clip=clip)
        assert got == wanted, way


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_smaller_than_chunks_change_no_bit(precision: str) -> None:
    wanted = everything(gemini(precision=precision, **HOST), "opt", accumulate=2, clip=0.5)
    for way, options in WAYS.items():
        assert everything(gemini(precision=precision, **options), "opt", accumulate=2, clip=0.5) == wanted, way


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opt"])
def test_every_kind_of_model_keeps_its_bits(kind: str) -> None:
    wanted = everything(gemini(precision="bf16", **HOST), kind, accumulate=2, clip=0.5)
    assert everything(gemini(precision="bf16", **WAYS["half beside the host"]), kind, accumulate=2, clip=0.5) == wanted


def test_the_share_is_streamed_and_the_rest_is_stepped_on_the_host() -> None:
    run = boosted(gemini(precision="bf16", **WAYS["all three places"]), "opt")
    train(run, "opt", clip=0.5)
    inner = gemini_of(run[1])
    streamed = {chunk.number for chunk in inner.chunks if chunk.streams}
    assert streamed == inner.placement.streamed
    places = {row["states"] for row in inner.plan()["chunks"]}
    assert places == {"device", "host", "streamed"}
    assert inner.manager.streamed_steps is not None
    assert inner.manager.host_steps is not None


@pytest.mark.usefixtures("_small_pieces")
def test_a_trace_tells_of_the_stream(tmp_path: Path) -> None:
    run = boosted(gemini(precision="bf16", trace=tmp_path, **WAYS["weights stay"]), "opt")
    train(run, "opt", range(5), clip=0.5)
    timeline = read_trace(tmp_path)
    streamed = {chunk.number for chunk in timeline.chunks if chunk.states == "streamed"}
    assert streamed == {chunk.number for chunk in gemini_of(run[1]).chunks if chunk.trained}
    for lane, kind in (("stream in", "states in"), ("stream step", "streamed step"), ("stream out", "states out")):
        assert {work.chunk for work in timeline.works if (work.lane, work.kind) == (lane, kind)} == streamed
    assert "streamed step" in {wait.kind for wait in timeline.waits}


def _forget_gradients(patch: pytest.MonkeyPatch) -> None:
    plain = streamed_steps._copy_all

    def copy_all(lane: Any, after: Any, pairs: Any, kind: str, chunk: Any) -> Arrival:
        return plain(lane, [] if kind == "states in" else after, pairs, kind, chunk)

    patch.setattr(streamed_steps, "_copy_all", copy_all)


def _forget_steps(patch: pytest.MonkeyPatch) -> None:
    plain = streamed_steps._copy_all

    def copy_all(lane: Any, after: Any, pairs: Any, kind: str, chunk: Any) -> Arrival:
        return plain(lane, [] if kind == "states out" else after, pairs, kind, chunk)

    patch.setattr(streamed_steps, "_copy_all", copy_all)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("forget", [_forget_gradients, _forget_steps], ids=lambda f: f.__name__[1:])
def test_a_wait_that_is_forgotten_is_found_out(
    forget: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The late lanes of the simulated device are what proves the rest of this file."""
    wanted = everything(gemini(precision="bf16", **HOST), "opt", clip=0.5)
    forget(monkeypatch)
    try:
        got = everything(gemini(precision="bf16", **WAYS["weights travel"]), "opt", clip=0.5)
    except (RuntimeError, ValueError):
        return
    assert got != wanted


def test_a_chunk_is_enqueued_when_it_is_used_at_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = everything(gemini(precision="bf16", **HOST), "opt", clip=0.5)
    monkeypatch.setattr(StreamedSteps, "pump", lambda _: None)
    assert everything(gemini(precision="bf16", **WAYS["weights stay"]), "opt", clip=0.5) == wanted
    assert everything(gemini(precision="bf16", **WAYS["weights travel"]), "opt", clip=0.5) == wanted
    monkeypatch.setattr(StreamedSteps, "wait_for", lambda *_: None)
    assert everything(gemini(precision="bf16", **WAYS["weights travel"]), "opt", clip=0.5) != wanted


def test_a_flush_leaves_nothing_under_way() -> None:
    run = boosted(gemini(precision="bf16", **WAYS["weights stay"]), "opt")
    train(run, "opt", clip=0.5)
    inner = gemini_of(run[1])
    steps = inner.manager.streamed_steps
    assert steps is not None
    lanes = [cast("SimulatedLane", lane) for lane in steps.lanes]
    masters = [chunk.master for chunk in inner.chunks if chunk.streams]
    assert any(lane.is_pending(master) for lane in lanes for master in masters)
    steps.flush()
    assert not any(lane.is_pending(master) for lane in lanes for master in masters)


def test_a_checkpoint_goes_on_with_the_same_bits_streamed_or_not(tmp_path: Path) -> None:
    plain = boosted(gemini(precision="bf16", **HOST), "opt")
    train(plain, "opt", range(6), clip=0.5)
    streamed = boosted(gemini(precision="bf16", **WAYS["weights stay"]), "opt")
    train(streamed, "opt", range(3), clip=0.5)
    booster, model, optimizer = streamed
    booster.save_model(model, tmp_path / "model")
    booster.save_optimizer(optimizer, tmp_path / "optimizer")
    for options in (WAYS["half beside the host"], HOST):
        later = boosted(gemini(precision="bf16", **options), "opt")
        # Stepped before it is loaded, so that moments lie in page-locked memory already.
        train(later, "opt", range(1), clip=0.5)
        later[0].load_model(later[1], tmp_path / "model")
        later[0].load_optimizer(later[2], tmp_path / "optimizer")
        train(later, "opt", range(3, 6), clip=0.5)
        assert left(later) == left(plain)


def test_a_step_that_fails_on_the_way_leaves_nothing_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run = boosted(gemini(precision="bf16", **WAYS["weights travel"]), "opt")
    train(run, "opt", range(3), clip=0.5)

    def fail(*_: object) -> None:
        raise RuntimeError("told to")

    monkeypatch.setattr(streamed_steps, "_step", fail)
    with pytest.raises(RuntimeError, match="told to"):
        train(run, "opt", range(3, 5), clip=0.5)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be used"):
            train(run, "opt", range(5, 6), clip=0.5)


def test_states_that_come_to_the_device_are_streamed_no_more() -> None:
    """A placement that is made anew moves them between all places, with every bit."""
    wanted = everything(gemini(precision="bf16", **HOST), "opt", steps=range(6), clip=0.5)
    run = boosted(gemini(precision="bf16", **WAYS["weights stay"]), "opt")
    inner = gemini_of(run[1])
    numbers = train(run, "opt", range(2), clip=0.5)
    first = inner.placement
    trained = frozenset(chunk.number for chunk in inner.chunks if chunk.trained)
    some = frozenset(sorted(trained)[::2])
    for step, changes in enumerate(
        [{"streamed": frozenset()}, {"streamed": some}, {"states_on_device": some, "streamed": trained - some}, {}], 2
    ):
        inner.manager.apply(dataclasses.replace(first, **changes), run[2].unwrap())
        numbers += train(run, "opt", range(step, step + 1), clip=0.5)
        assert {chunk.number for chunk in inner.chunks if chunk.streams} == changes.get("streamed", first.streamed)
        assert (inner.manager.streamed_steps is None) == (step == 2)
    assert {"numbers": numbers, "left": left(run)} == wanted


def test_what_cannot_be_streamed_is_refused() -> None:
    model = built("opt")
    booster = Booster(plugin=gemini(stream_optim_frac=0.5), world=ALONE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigError, match="for Adam and AdamW"):
        booster.boost(model, optimizer)
    with pytest.raises(ConfigError, match="a share from 0 to 1"):
        GeminiPlugin(stream_optim_frac=1.5)
