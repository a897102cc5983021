"""Gemini: what a review found, each as it was shown."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, Boosted, boosted, gemini, groups, late_and_alone, least_bytes, left, train
from gemini_zoo import KINDS, WIDTH
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import tensor_names
from albireo.distributed import World
from albireo.errors import OutOfMemoryError
from albireo.memory import Gemini
from albireo.memory.budget import Trace
from albireo.memory.placement import Placement
from albireo.optim import HybridAdam, host_stepper
from albireo.optim.host_kernel import TorchKernel
from albireo.plugins import LowLevelZeroPlugin, Plugin, TorchDDPPlugin

Run = Callable[..., list[Any]]

AWAY: dict[str, Any] = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
HALF: dict[str, Any] = {"offload_optim_frac": 0.5, "offload_param_frac": 0.5}
HALF_STEPPED = "some weights had been stepped and others not"


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


def rows_of(step: int, rows: int, rank: int = 0, micro: int = 0) -> dict[str, Any]:
    return {name: value[:rows] for name, value in KINDS["plain"].batch(step, rank, micro).items()}


def one(run: Boosted, rows: int, *, step: int = 0, accumulate: int = 1, **options: Any) -> tuple[float, float]:
    """Train a step with batches of so many rows, and return its loss and norm."""
    booster, model, optimizer = run
    batches = [rows_of(step, rows, booster.world.rank, micro) for micro in range(accumulate)]
    terms = [KINDS["plain"].terms(batch) for batch in batches]
    output = booster.train_step(model, optimizer, batches, terms, **options)
    return float(output.loss_sum), float(output.grad_norm)


def own_step(run: Boosted, step: int) -> None:
    """Train a step as a loop of the user's own does."""
    booster, model, optimizer = run
    booster.backward(model(**rows_of(step, 2))[0] / 16, optimizer)
    optimizer.step()
    optimizer.zero_grad()


def inner(run: Boosted) -> Gemini:
    return run[1].gemini  # type: ignore[attr-defined, no-any-return]


def on_place(run: Boosted, before: Callable[[int], object]) -> list[bool]:
    """Call something before each placement with how many there have been; return whether each knew of accumulation."""
    planner, seen = inner(run)._planner, list[bool]()
    plainly = planner.place

    def place(trace: Trace, *, accumulates: bool, **options: Any) -> Placement:
        seen.append(accumulates)
        before(len(seen))
        return plainly(trace, accumulates=accumulates, **options)

    planner.place = place  # type: ignore[method-assign]
    return seen


def moves_to_host(run: Boosted) -> list[int]:
    """Return a list that comes to hold how many chunks' states each placement takes to the host."""
    manager, moved = inner(run).manager, list[int]()
    plainly = manager.apply

    def apply(*args: Any) -> Any:
        before = {chunk.number for chunk in manager.chunks if chunk.states_place == "device"}
        came = plainly(*args)
        moved.append(sum(chunk.states_place == "host" for chunk in manager.chunks if chunk.number in before))
        return came

    manager.apply = apply  # type: ignore[method-assign]
    return moved


def tightened(run: Boosted, least: int) -> list[int]:
    """Let the placement after the next one find the least memory that does; see `moves_to_host`."""
    planner = inner(run)._planner

    def before(number: int) -> None:
        if number == 2:
            planner.limits = dataclasses.replace(planner.limits, device=least, host=None)

    on_place(run, before)
    return moves_to_host(run)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("precision", "accumulate", "clip"), [("fp32", 1, 0.0), ("fp32", 1, 0.01), ("fp32", 2, 0.01), ("bf16", 2, 0.01)]
)
def test_states_that_leave_between_backward_and_step(precision: str, accumulate: int, clip: float) -> None:
    least = least_bytes("plain", precision=precision, accumulate=accumulate)

    def trained(*, moves: bool) -> tuple[list[tuple[float, float]], dict[str, str]]:
        run = boosted(gemini(precision=precision), "plain")
        numbers = [one(run, 1, accumulate=accumulate, max_norm=clip)]
        assert all(chunk.states_place == "device" for chunk in inner(run).chunks)
        moved = tightened(run, least) if moves else None
        numbers += [one(run, 2, step=step, accumulate=accumulate, max_norm=clip) for step in (1, 2)]
        assert moved is None or (moved[0] == 0 and moved[1] > 0)
        return numbers, left(run)

    assert trained(moves=True) == trained(moves=False)


def test_states_that_leave_since_activations_grew_faster_than_the_batch() -> None:
    """Nothing of it is planted but the peaks."""

    def trained(cap: int | None) -> tuple[dict[str, str], list[int]]:
        run = boosted(gemini(mem_cap_bytes=cap), "plain")
        held, rows = inner(run), 0
        held._collector._peak_bytes = lambda: held._model_bytes() + (9000 * rows**2 if cap else 0)
        moved = moves_to_host(run)
        for rows in (1, 2):
            one(run, rows, max_norm=0.01)
        return left(run), moved

    least = least_bytes("plain")
    wanted, _ = trained(None)
    moves = []
    for times in (3.5, 4, 4.5, 5):
        found, moved = trained(int(least * times))
        assert found == wanted
        moves.append(moved[-1])
    assert any(moves)


def test_states_that_leave_since_they_were_on_the_device_for_want_of_room_on_the_host() -> None:
    """The first step begins with what the host has no room for on the device; what it sees says that it has."""
    wanted = boosted(gemini(), "plain")
    train(wanted, "plain", range(2), 1, 0.01)
    moves = []
    for cap in range(130_000, 150_001, 5_000):
        run = boosted(gemini(mem_cap_bytes=4 * least_bytes("plain"), host_cap_bytes=cap), "plain")
        moved = moves_to_host(run)
        train(run, "plain", range(2), 1, 0.01)
        assert left(run) == left(wanted)
        moves += moved
    assert any(moves)


def moving_case(world: World, precision: str, accumulate: int, clip: float) -> list[Any]:
    found = []
    with late_and_alone():
        least = least_bytes("plain", world=world, precision=precision, accumulate=accumulate)
        for moves in (False, True):
            run = boosted(gemini(precision=precision), "plain", world)
            one(run, 1, accumulate=accumulate, max_norm=clip)
            moved = tightened(run, least) if moves else [0, 0]
            before = left(run)
            numbers = [one(run, 2, step=step, accumulate=accumulate, max_norm=clip) for step in (1, 2)]
            after = left(run)
            assert moves == (moved[1] > 0)
            assert all(after[name] != before[name] for name in before)
            found.append([numbers, after])
    return found


@pytest.mark.parametrize(("precision", "accumulate", "clip"), [("fp32", 1, 0.0), ("fp32", 2, 0.01), ("bf16", 2, 0.01)])
def test_states_that_leave_between_backward_and_step_over_ranks(
    run_case: Run, precision: str, accumulate: int, clip: float
) -> None:
    for rank in run_case(moving_case, 2, precision=precision, accumulate=accumulate, clip=clip):
        assert rank[1] == rank[0]


def uses_of(run: Boosted) -> dict[str, Callable[[], object]]:
    """Return all that may come after a step, none of which may take weights of two steps for those of one."""
    booster, model, optimizer = run
    names, _ = tensor_names(model.unwrap())
    return {
        "save": lambda: list(booster.plugin.export_state(model, optimizer, names, ALONE)),
        "step": lambda: train(run, "plain", range(1)),
        "own step": lambda: own_step(run, 3),
        "forward": lambda: model(**rows_of(3, 2)),
        "read": lambda: list(booster.plugin.readable_weights(model)),
        "flush": model.flush,  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("when", ["reduced", "clipped"])
@pytest.mark.parametrize("options", [AWAY, HALF], ids=["away", "half"])
def test_an_interrupt_after_a_backward_that_stepped(options: dict[str, Any], when: str) -> None:
    def observe(what: str) -> None:
        if what == when:
            raise KeyboardInterrupt

    run = boosted(gemini(**options), "plain")
    train(run, "plain", range(2))
    with pytest.raises(KeyboardInterrupt):
        one(run, 2, step=2, observe=observe)
    run[2].zero_grad()
    for use in uses_of(run).values():
        with pytest.raises(RuntimeError, match=HALF_STEPPED):
            use()


@pytest.mark.parametrize("when", ["reduced", "clipped"])
@pytest.mark.parametrize("options", [AWAY, HALF, {}], ids=["away", "half", "auto"])
def test_an_interrupt_after_a_backward_that_did_not_step(options: dict[str, Any], when: str) -> None:
    def observe(what: str) -> None:
        if what == when:
            raise KeyboardInterrupt

    run, wanted = boosted(gemini(**options), "plain"), boosted(TorchDDPPlugin(), "plain")
    numbers = train(wanted, "plain", range(4), 2, 0.5)
    found = train(run, "plain", range(2), 2, 0.5)
    before = left(run)
    with pytest.raises(KeyboardInterrupt):
        one(run, 2, step=7, max_norm=0.5, observe=observe)
    assert left(run) == before
    # Nothing of the step is left, even though nobody has called zero_grad.
    assert found + train(run, "plain", range(2, 4), 2, 0.5) == numbers
    assert left(run) == left(wanted)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("options", [AWAY, HALF], ids=["away", "half"])
def test_an_interrupt_in_the_step_of_an_own_loop(options: dict[str, Any], number: int) -> None:
    run = boosted(gemini(**options), "plain")
    manager, calls = inner(run).manager, 0
    for step in range(2):
        own_step(run, step)
    plainly = manager.stale

    def stale(chunk: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        plainly(chunk)

    manager.stale = stale  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        own_step(run, 2)
    manager.stale = plainly  # type: ignore[method-assign]
    run[2].zero_grad()
    for use in uses_of(run).values():
        with pytest.raises(RuntimeError, match=HALF_STEPPED):
            use()


@pytest.mark.parametrize("options", [HALF, {}], ids=["half", "auto"])
def test_an_interrupt_when_some_have_been_stepped_on_the_device_or_all_on_the_host(options: dict[str, Any]) -> None:
    run = boosted(gemini(**options), "plain")
    for step in range(2):
        own_step(run, step)
    run[2]._step_where_states_are = interrupt  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        own_step(run, 2)
    del run[2]._step_where_states_are  # type: ignore[attr-defined]
    run[2].zero_grad()
    for use in uses_of(run).values():
        with pytest.raises(RuntimeError, match=HALF_STEPPED):
            use()


@pytest.mark.parametrize("after", [0, 1])
def test_a_placement_that_fails_in_clip_leaves_no_gradients(after: int) -> None:
    """A first step, or one with a batch that is larger than any before."""

    def no_room(number: int) -> None:
        # The first of a batch that has grown is by what is expected of it.
        if number == 1 + after:
            raise OutOfMemoryError("planted")

    run, wanted = boosted(gemini(), "plain"), boosted(TorchDDPPlugin(), "plain")
    for step in range(after):
        assert one(run, 1, step=step) == one(wanted, 1, step=step)
    seen = on_place(run, no_room)
    with pytest.raises(OutOfMemoryError, match="planted"):
        one(run, 2, step=7)
    assert len(seen) == 1 + after
    assert left(run) == left(wanted)
    for step in range(after, after + 2):
        assert one(run, 1, step=step) == one(wanted, 1, step=step)
    assert inner(run).is_settled
    assert left(run) == left(wanted)


@pytest.mark.parametrize(
    "plugin",
    [
        lambda: gemini(**AWAY),
        lambda: gemini(**HALF),
        gemini,
        lambda: LowLevelZeroPlugin(precision="fp32"),
        lambda: LowLevelZeroPlugin(precision="bf16", stage=2),
    ],
    ids=["away", "half", "auto", "zero", "zero 2"],
)
def test_what_is_boosted_can_be_freed(plugin: Callable[[], Plugin], monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps are under way when it is let go of: they end by themselves.
    monkeypatch.setattr(host_stepper, "choose_kernel", lambda threads, **_: TorchKernel(threads))
    threads = set(threading.enumerate())
    run = boosted(plugin(), "plain")
    train(run, "plain", range(2))
    refs = [weakref.ref(part) for part in (*run[1].unwrap().parameters(), run[1].unwrap(), run[1], run[2])]
    del run
    deadline = time.monotonic() + 5.0
    while any(ref() is not None for ref in refs) and time.monotonic() < deadline:
        gc.collect()
    assert [ref() is None for ref in refs] == [True] * len(refs)
    for thread in set(threading.enumerate()) - threads:
        thread.join(5.0)
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("clip", [0.0, 1e9])
def test_a_write_to_a_weight_whose_states_are_away_is_refused(clip: float) -> None:
    _, model, _ = run = boosted(gemini(offload_optim_frac=1.0, offload_param_frac=0.0), "plain")
    train(run, "plain", range(2), 1, clip)
    model.flush()  # type: ignore[operator]
    with torch.no_grad():
        model.unwrap().head.weight.mul_(0)
    with pytest.raises(RuntimeError, match="written to"):
        train(run, "plain", range(2, 3), 1, clip)


@pytest.mark.parametrize("before", [0, 1])
def test_a_watched_step_that_failed_is_watched_anew(before: int) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("planted")

    run, wanted = boosted(gemini(), "plain"), boosted(gemini(), "plain")
    for step in range(before):
        assert one(run, 1, step=step) == one(wanted, 1, step=step)
    handle = run[1].unwrap().blocks[2].register_full_backward_hook(fail)
    with pytest.raises(ValueError, match="planted"):
        one(run, 2, step=7)
    handle.remove()
    for step, rows in enumerate((1, 2, 1)):
        assert one(run, rows, step=step) == one(wanted, rows, step=step)
        found, good = inner(run), inner(wanted)
        assert found._trace is not None
        assert good._trace is not None
        assert len(found._trace) == len(good._trace)
        assert found._elements == good._elements
        assert not found._collector.is_collecting
    assert left(run) == left(wanted)


@pytest.mark.parametrize("options", [{}, HALF], ids=["auto", "half"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_plugins_own_bound_clips(precision: str, options: dict[str, Any]) -> None:
    def trained(own: float, given: float) -> dict[str, str]:
        run = boosted(gemini(precision=precision, max_norm=own, **options), "plain")
        train(run, "plain", range(2), 1, given)
        return left(run)

    assert trained(1e-3, 0.0) == trained(0.0, 1e-3) != trained(0.0, 0.0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [{}, HALF], ids=["auto", "half"])
@pytest.mark.parametrize("bounds", [(1.0, 0.5), (0.5, 1.0), (0.0, 0.5), (0.5, 0.0)], ids=str)
def test_clipping_twice_clips_as_torch_does(
    bounds: tuple[float, float], options: dict[str, Any], precision: str
) -> None:
    def clipped(plugin: Plugin) -> tuple[list[float], dict[str, torch.Tensor]]:
        booster, model, optimizer = boosted(plugin, "plain")
        booster.backward(model(**rows_of(0, 2))[0], optimizer)
        norms = [float(optimizer.clip_grad_by_norm(bound)) for bound in bounds]
        optimizer.step()
        names, _ = tensor_names(model.unwrap())
        parts = booster.plugin.export_state(model, optimizer, names, ALONE)
        return norms, {part.name: part.data.clone() for part in parts if "exp_avg" in part.name}

    norms, moments = clipped(gemini(precision=precision, **options))
    wanted, states = clipped(TorchDDPPlugin())
    near = 1e-5 if precision == "fp32" else 2e-2
    assert norms == pytest.approx(wanted, rel=near)
    assert states
    assert moments.keys() == states.keys()
    for name, state in states.items():
        assert (moments[name] - state).norm() <= 2 * near * state.norm(), name


@pytest.mark.parametrize("options", [AWAY, HALF], ids=["away", "half"])
def test_a_failure_before_the_backward_leaves_no_early_step(options: dict[str, Any]) -> None:
    run, wanted = boosted(gemini(**options), "plain"), boosted(TorchDDPPlugin(), "plain")
    assert train(run, "plain", range(2)) == train(wanted, "plain", range(2))
    before = left(run)
    run[0].backward = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(run, "plain", range(7, 8))
    del run[0].backward
    assert left(run) == before
    # In a loop of the user's own, which says nothing of a step that comes.
    for booster, model, optimizer in (run, wanted):
        for micro in range(2):
            booster.backward(model(**rows_of(2, 2, 0, micro))[0] / 16, optimizer)
        optimizer.clip_grad_by_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert train(run, "plain", range(3, 4), 2) == train(wanted, "plain", range(3, 4), 2)
    assert left(run) == left(wanted)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "twice"])
def test_evaluation_within_a_step_under_the_tightest_cap(kind: str, prefetch: int) -> None:
    def trained(plugin: Plugin) -> tuple[list[float], dict[str, str]]:
        run = booster, model, optimizer = boosted(plugin, kind)
        losses = []
        for step in range(3):
            batches = [KINDS[kind].batch(step, 0, micro) for micro in range(4)]
            loss = model(**batches[0])[0] / 16
            for between in range(3):
                with torch.no_grad():
                    losses.append(float(model(**batches[1 + between])[0]))
                if between == 0:
                    booster.backward(loss, optimizer)
                elif between == 1:
                    optimizer.step()
            optimizer.zero_grad()
        return losses, left(run)

    capped = gemini(mem_cap_bytes=least_bytes(kind), max_prefetch=prefetch)
    assert trained(capped) == trained(TorchDDPPlugin())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_placement_for_a_batch_that_has_grown_knows_of_accumulation(accumulate: int) -> None:
    run = boosted(gemini(precision="bf16"), "plain")
    seen = on_place(run, lambda _: None)
    for rows in (1, 2):
        one(run, rows, accumulate=accumulate)
    assert seen == [accumulate > 1] * 3  # of the first, of the second by the first, of the second


class Asked(nn.Module):
    """A block that is called with a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return self.layer(x + query).tanh()


class Queries(nn.Module):
    """A model with such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(4, WIDTH))
        self.blocks = nn.ModuleList(Asked() for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for block in self.blocks:
            x = block(x, self.query)
        return x.square().sum(), torch.tensor(x.numel())


@pytest.mark.parametrize("options", [AWAY, HALF, {}], ids=["away", "half", "auto"])
def test_no_hooks_pile_up_on_an_input_that_is_a_leaf(options: dict[str, Any]) -> None:
    def trained(plugin: Plugin) -> tuple[list[float], list[int]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, batch = Queries(), torch.randn(4, WIDTH)
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
        asked = batch.clone().requires_grad_()
        losses, hooks = [], []
        for _ in range(4):
            output = booster.train_step(wrapped, optimizer, {"x": asked}, batch.numel())
            losses.append(float(output.loss_sum))
            hooks.append(sum(len(leaf._backward_hooks or ()) for leaf in (model.query, asked)))
        return losses, hooks

    losses, hooks = trained(gemini(**options))
    assert hooks == [hooks[0]] * len(hooks)
    assert losses == trained(TorchDDPPlugin())[0]
