"""Gemini: a step that runs out of memory is made again with less on the device, and nobody can tell from the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, Boosted, gemini, groups, late_and_alone, left
from torch import nn

from albireo.booster import Booster
from albireo.memory import Gemini
from albireo.optim import HybridAdam
from albireo.plugins import Plugin, TorchDDPPlugin

WIDTH, STEPS = 16, 6
# All chunks with gradients and states fit into the one beside the other, and not beside a quarter more of it.
CAP, OTHER = 90_000, 40_000
HALF_STEPPED = "some weights had been stepped and others not"


@pytest.fixture(autouse=True)
def _late() -> Iterator[None]:
    with late_and_alone():
        yield


class Dropped(nn.Module):
    """Blocks that draw random numbers, and may run out of memory."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))
            for _ in range(4)
        )
        self.runs_out: Callable[[str], None] = lambda _: None
        self.register_buffer("seen", torch.zeros(()) if counts else None)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.seen is not None:
            self.seen += 1
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 2:
                self.runs_out("forward")
                if x.requires_grad:
                    x.register_hook(lambda _: self.runs_out("backward"))
        return x.square().sum(), torch.tensor(x.numel())


def made(plugin: Plugin, **options: Any) -> Boosted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dropped(**options)
    booster = Booster(plugin=plugin, world=ALONE)
    boosted, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
    return booster, boosted, optimizer


def tight(other: Callable[[], int] = lambda: OTHER) -> Boosted:
    """Return a run in which not all fits beside what is not model data: on a simulated device that is told, not seen."""
    run = made(gemini(mem_cap_bytes=CAP, min_chunk_size_m=0.0005))
    gemini_of = inner(run)
    gemini_of._collector._peak_bytes = lambda: gemini_of._model_bytes() + other()
    return run


def step(run: Boosted, number: int, *, max_norm: float, accumulate: int = 1, rows: int = 3) -> float:
    booster, model, optimizer = run
    torch.manual_seed(number)
    generator = torch.Generator().manual_seed(number)
    batches = [{"x": torch.randn(rows, WIDTH, generator=generator)} for _ in range(accumulate)]
    output = booster.train_step(model, optimizer, batches, [rows * WIDTH] * accumulate, max_norm=max_norm)
    return float(output.loss_sum)


def inner(run: Boosted) -> Gemini:
    return run[1].gemini  # type: ignore[attr-defined, no-any-return]


def failing(run: Boosted, where: str, times: int, *, skip: int = 0) -> list[str]:
    """Have the model run out of memory some times, after some passes; return what was asked for."""
    asked: list[str] = []

    def runs_out(place: str) -> None:
        if place != where:
            return
        asked.append(place)
        if skip < len(asked) <= skip + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run[1].unwrap().runs_out = runs_out  # type: ignore[assignment]
    return asked


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("where", "max_norm"), [("forward", 0.5), ("backward", 0.5), ("forward", 0.0)])
def test_a_step_is_repeated_with_the_numbers_it_would_have_had(where: str, max_norm: float, accumulate: int) -> None:
    wanted, run = made(TorchDDPPlugin()), tight()
    for number in range(STEPS):
        if number == 3:
            # In the second micro-batch, if there is one.
            asked = failing(run, where, 1, skip=accumulate - 1)
            before = len(inner(run).placement.states_on_device)
        expected = step(wanted, number, max_norm=max_norm, accumulate=accumulate)
        assert step(run, number, max_norm=max_norm, accumulate=accumulate) == expected
    assert len(asked) == accumulate * (1 + STEPS - 3)
    assert len(inner(run).placement.states_on_device) < before
    assert left(run) == left(wanted)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_a_batch_three_times_as_long_evicts_before_its_forward(max_norm: float) -> None:
    rows = 3
    wanted, run = made(TorchDDPPlugin()), tight(lambda: OTHER * rows // 5)
    taken: list[tuple[int, int]] = []
    run[1].unwrap().runs_out = lambda _: taken.append((rows, inner(run)._model_bytes()))  # type: ignore[assignment]
    for number in range(14):
        rows = 9 if number >= 10 else 3
        assert step(run, number, max_norm=max_norm, rows=rows) == step(wanted, number, max_norm=max_norm, rows=rows)
    assert {of for of, _ in taken} == {3, 9}
    assert all(model + OTHER * of // 5 <= CAP for of, model in taken)
    # It did not fit beside all that was there.
    assert max(model for _, model in taken) + OTHER * 9 // 5 > CAP
    assert left(run) == left(wanted)


def test_less_is_on_the_device_each_time_until_nothing_more_can_leave() -> None:
    run = tight()
    for number in range(3):
        step(run, number, max_norm=0.5)
    stayed = inner(run).placement.states_on_device
    asked = failing(run, "forward", 10**6)
    with pytest.raises(torch.OutOfMemoryError):
        step(run, 3, max_norm=0.5)
    assert len(asked) > 1
    assert inner(run).placement.states_on_device < stayed
    # Nothing of the step has stayed: the next one is that of a run that never tried it.
    failing(run, "forward", 0)
    wanted = made(TorchDDPPlugin())
    for number in range(3):
        step(wanted, number, max_norm=0.5)
    assert step(run, 4, max_norm=0.5) == step(wanted, 4, max_norm=0.5)
    assert left(run) == left(wanted)


def test_weights_that_are_half_stepped_are_not_stepped_again() -> None:
    """Without a bound on the norm chunks are stepped in backward, and their old weights are gone."""
    run = made(gemini(offload_optim_frac=1.0))
    for number in range(3):
        step(run, number, max_norm=0.0)
    failing(run, "backward", 1)
    with pytest.raises(torch.OutOfMemoryError):
        step(run, 3, max_norm=0.0)
    with pytest.raises(RuntimeError, match=HALF_STEPPED):
        step(run, 4, max_norm=0.0)


def test_a_forward_that_has_written_to_a_buffer_is_not_repeated() -> None:
    run = made(gemini(mem_cap_bytes=10**6), counts=True)
    for number in range(3):
        step(run, number, max_norm=0.5)
    asked = failing(run, "forward", 1)
    with pytest.raises(torch.OutOfMemoryError):
        step(run, 3, max_norm=0.5)
    assert len(asked) == 1


def test_other_plugins_and_a_first_step_give_up_at_once() -> None:
    for plugin in (TorchDDPPlugin(), gemini(mem_cap_bytes=10**6)):
        run = made(plugin)
        asked = failing(run, "forward", 1)
        with pytest.raises(torch.OutOfMemoryError):
            step(run, 0, max_norm=0.5)
        assert len(asked) == 1
