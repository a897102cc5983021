"""A step that is left out leaves no trace, whichever optimizer it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from albireo.optim import HybridAdam
from albireo.optim.overflow import step_unless

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "fused Adam": lambda parameters: HybridAdam(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_only_steps_without_overflow_count(kind: str, first: int) -> None:
    """The overflow comes before there are states, or after."""

    def run(*, with_overflows: bool) -> tuple[list[float], list[list[float]]]:
        parameter = torch.nn.Parameter(torch.ones(5))
        optimizer = OPTIMIZERS[kind]([parameter])
        for number in range(4):
            overflows = number == first
            if overflows and not with_overflows:
                continue
            value = float("inf") if overflows else 1.0 + number
            parameter.grad = torch.full((5,), value)
            step_unless(optimizer, torch.tensor(float(overflows)))
        state = optimizer.state[parameter]
        assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
        return parameter.tolist(), [state[key].tolist() for key in sorted(state) if state[key] is not None]

    assert run(with_overflows=True) == run(with_overflows=False)
