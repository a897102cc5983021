"""The conductor: what is there while a unit is in use, and what is let go of when it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gemini_runs import boosted, gemini, late_and_alone
from gemini_zoo import KINDS, Block
from torch import nn

from albireo.memory.conductor import Conductor

# Blocks have 2400 elements.
ONE_A_UNIT = 2500 / 2**20
AWAY: dict[str, Any] = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0, "min_chunk_size_m": ONE_A_UNIT}


class Watched:
    """A small model under Gemini, and which chunks were there in each forward and backward of a block.

    With one chunk a unit: the root's, then those of the blocks.
    """

    def __init__(self, kind: str = "plain", **options: Any) -> None:
        self.run = booster, model, optimizer = boosted(gemini(**{**AWAY, **options}), kind)
        self.booster, self.model, self.optimizer = booster, model, optimizer
        self.kind = kind
        inner = model.gemini  # type: ignore[attr-defined]
        self.conductor: Conductor = inner.conductor
        self.chunks = inner.chunks
        self.seen: list[tuple[str, set[str]]] = []
        self.names = ["root", *(f"{n}" for n in range(len(self.chunks) - 1))]
        for number, block in enumerate(model.unwrap().blocks):
            block.up.register_forward_hook(self._look(f"forward {number}"))
            block.up.register_full_backward_hook(self._look(f"backward {number}"))

    def _look(self, what: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.seen.append((what, self.here()))

        return hook

    def here(self) -> set[str]:
        """Which chunks have memory."""
        return {name for name, chunk in zip(self.names, self.chunks, strict=True) if chunk.is_here}

    def readable(self) -> set[str]:
        """Which chunks can be read."""
        return {name for name, chunk in zip(self.names, self.chunks, strict=True) if chunk.is_attached}

    def forward(self) -> torch.Tensor:
        return self.model(**KINDS[self.kind].batch(1, 0, 0))[0]  # type: ignore[no-any-return]

    def step(self) -> None:
        self.optimizer.backward(self.forward())
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _late() -> Any:
    with late_and_alone():
        yield


def test_a_unit_is_there_while_it_is_in_use_and_the_root_throughout() -> None:
    watched = Watched(max_prefetch=0)
    assert watched.here() == set()
    for _ in range(2):
        watched.seen.clear()
        loss = watched.forward()
        assert watched.here() == {"root"}
        watched.optimizer.backward(loss)
        assert watched.here() == set()
        assert watched.seen == [
            *((f"forward {n}", {"root", str(n)}) for n in range(4)),
            *((f"backward {n}", {"root", str(n)}) for n in (3, 2, 1, 0)),
        ]
        watched.optimizer.step()
        watched.optimizer.zero_grad()


def test_what_comes_next_is_fetched_ahead() -> None:
    watched = Watched(max_prefetch=1)
    for _ in range(3):
        watched.seen.clear()
        watched.step()
        here = dict(watched.seen)
        assert here["forward 0"] >= {"root", "0", "1"}
        assert here["forward 1"] >= {"root", "1", "2"}
        assert here["backward 2"] >= {"root", "2", "1"}
        assert all(len(found) <= 4 for found in here.values())
        assert watched.here() == set()


def test_a_forward_without_gradients_leaves_nothing() -> None:
    for prefetch in (0, 2):
        watched = Watched(max_prefetch=prefetch)
        for _ in range(2):
            with torch.no_grad():
                watched.forward()
            assert watched.here() <= {"root"} or watched.here() == set()
            watched.step()
            assert watched.here() == set()


def test_a_part_that_is_called_by_itself_has_its_weights() -> None:
    watched = Watched(max_prefetch=0)
    inner = watched.model.unwrap()
    with torch.no_grad():
        hidden = inner.blocks[2](inner.embedding(torch.tensor([[1, 2]])))
        assert torch.isfinite(inner.head(hidden)).all()
    assert watched.readable() == {"root"}
    watched.step()


@pytest.mark.parametrize("kind", ["plain", "twice", "recomputed", "recomputed reentrant", "frozen", "branch"])
def test_after_backward_nothing_is_in_use(kind: str) -> None:
    for options in ({"max_prefetch": 0}, {}, {"min_chunk_size_m": 0.001}):
        watched = Watched.__new__(Watched)
        watched.kind = kind
        watched.run = _, watched.model, watched.optimizer = boosted(gemini(**{**AWAY, **options}), kind)
        gemini_ = watched.model.gemini  # type: ignore[attr-defined]
        for _ in range(3):
            watched.optimizer.backward(watched.forward())
            conductor = gemini_.conductor
            assert not conductor.in_backward
            assert not any(use.is_active for use in conductor._uses)
            assert not any(chunk.is_attached for chunk in gemini_.chunks)
            watched.optimizer.step()
            watched.optimizer.zero_grad()
            assert not any(chunk.is_here for chunk in gemini_.chunks)
            assert conductor.backwards == 0


def test_it_says_when_a_step_begins_and_how_large_its_batch_is() -> None:
    watched = Watched()
    told: list[int] = []
    watched.conductor.on_step_begins = told.append
    for _ in range(2):  # micro-batches
        watched.optimizer.backward(watched.forward())
    assert told == [18]
    assert watched.conductor.backwards == 2
    with torch.no_grad():
        watched.forward()
    assert told == [18]
    watched.optimizer.step()
    watched.optimizer.zero_grad()
    watched.forward()
    assert told == [18, 18]


def test_reentrant_checkpointing_is_watched_in_forward_too() -> None:
    """Its blocks compute without gradients in forward, which is no evaluation."""
    orders = []
    for kind in ("recomputed", "recomputed reentrant"):
        _, model, _ = run = boosted(gemini(min_chunk_size_m=ONE_A_UNIT), kind)
        Watched.step_of(run, kind)
        trace = model.gemini._trace  # type: ignore[attr-defined]
        orders.append([(sorted(use.chunks), use.phase) for use in trace])
    assert orders[0] == orders[1]
    assert [phase for _, phase in orders[0]] == ["forward"] * 5 + ["backward"] * 5 + ["step"]


def _step_of(run: Any, kind: str) -> None:
    _, model, optimizer = run
    optimizer.backward(model(**KINDS[kind].batch(1, 0, 0))[0])
    optimizer.step()
    optimizer.zero_grad()


Watched.step_of = staticmethod(_step_of)  # type: ignore[attr-defined]


def test_a_step_that_leaves_its_trace_is_lost_and_right_again_the_next_time() -> None:
    _, model, _ = run = boosted(gemini(min_chunk_size_m=ONE_A_UNIT), "branch")
    conductor = model.gemini.conductor  # type: ignore[attr-defined]
    lost = []
    for step in (0, 1, 2):
        conductor_before = conductor.itinerary
        loss, _ = model(**KINDS["branch"].batch(step, 0, 0))
        run[2].backward(loss)
        lost.append(None if conductor_before is None else conductor.itinerary.is_lost)
        run[2].step()
        run[2].zero_grad()
        assert not conductor.itinerary.is_lost
    assert lost == [None, True, False]


def test_a_gradient_whose_weights_are_away_is_an_error() -> None:
    watched = Watched(max_prefetch=0)
    block = watched.model.unwrap().blocks[1]
    with pytest.raises(RuntimeError, match=r"backward of blocks\.1 has run while its weights were away"):
        watched.conductor.gradient_came(watched.chunks[2], block.up.weight)
    # Under way is not there.
    watched.conductor._manager.begin(watched.chunks[2])
    with pytest.raises(RuntimeError, match="away"):
        watched.conductor.gradient_came(watched.chunks[2], block.up.weight)


def test_fetching_ahead_takes_no_room_that_is_not_there() -> None:
    sizes = [chunk.weight_bytes for chunk in Watched().chunks]
    cap = sizes[0] + sizes[1]
    watched = Watched(max_prefetch=2, mem_cap_bytes=cap)
    for _ in range(3):
        watched.step()
        with torch.no_grad():
            watched.forward()
    assert watched.conductor._manager._pool.peak_bytes == cap


def test_what_was_fetched_for_nothing_makes_room() -> None:
    """Blocks come in another order than the one of registration, which is all that is known at first."""
    model = KINDS["shuffled"].build()
    assert isinstance(model.blocks[0], Block)
    sizes = [chunk.weight_bytes for chunk in boosted(gemini(**AWAY), "shuffled")[1].gemini.chunks]  # type: ignore[attr-defined]
    cap = sizes[0] + 2 * sizes[1]
    run = boosted(gemini(min_chunk_size_m=ONE_A_UNIT, mem_cap_bytes=cap), "shuffled")
    for _ in range(3):
        _step_of(run, "shuffled")


def test_a_model_whose_outputs_are_no_tensors_or_need_no_gradient() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            return None if x is None else {"number": 3, "tensor": x.detach()}

    watched = Watched(max_prefetch=0)
    watched.model.unwrap().blocks[0].norm.register_forward_hook(lambda *_: Odd()(None))
    watched.step()
    assert watched.here() == set()
