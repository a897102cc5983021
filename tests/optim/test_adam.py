import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from albireo.errors import ConfigError
from albireo.optim import HybridAdam, adamw


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 3))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4, first: int = 0) -> list[torch.Tensor]:
    for step in range(first, first + count):
        inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(inputs).square().sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"lr": 1e-2, "weight_decay": 0.1}, {"betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.3}]
)
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_steps_are_those_of_torch_to_the_bit(options: dict[str, Any], adamw_mode: bool) -> None:
    ours, theirs = model(), model()
    torchs = torch.optim.AdamW if adamw_mode else torch.optim.Adam
    reference = torchs(theirs.parameters(), fused=True, **{"lr": 1e-3, "weight_decay": 0.0, **options})
    optimizer = HybridAdam(ours.parameters(), adamw_mode=adamw_mode, **options)
    assert equal(steps(ours, optimizer), steps(theirs, reference))
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_the_two_modes_differ() -> None:
    one, other = model(), model()
    first = steps(one, HybridAdam(one.parameters(), lr=0.1, weight_decay=0.5))
    assert not equal(first, steps(other, HybridAdam(other.parameters(), lr=0.1, weight_decay=0.5, adamw_mode=False)))


def test_arguments_may_come_by_place() -> None:
    group = HybridAdam(model().parameters(), 0.5, True, (0.1, 0.2), 1e-4, 0.3, False).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.1, 0.2), 1e-4, 0.3)
    assert group["decoupled_weight_decay"] is False


def test_defaults_are_those_of_the_name() -> None:
    group = HybridAdam(model().parameters()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bias_correction": False}, "leave bias_correction=True"),
        ({"nvme_offload_fraction": 0.5}, "torch.optim.Adafactor"),
        ({"nvme_offload_dir": "/tmp"}, "leave nvme_offload_fraction"),
    ],
)
def test_what_is_not_there_is_refused_with_an_alternative(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HybridAdam(model().parameters(), **options)


def test_a_state_goes_on_in_torchs_own_and_back() -> None:
    module = model()
    optimizer = HybridAdam(module.parameters(), lr=1e-2, weight_decay=0.1)
    steps(module, optimizer)
    twin = copy.deepcopy(module)
    other = torch.optim.AdamW(twin.parameters(), fused=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(steps(module, optimizer, first=9), steps(twin, other, first=9))
    back = HybridAdam(module.parameters(), lr=math.pi)
    back.load_state_dict(copy.deepcopy(other.state_dict()))
    assert equal(steps(module, back, first=20), steps(twin, other, first=20))


def test_the_mode_is_not_loaded() -> None:
    module = model()
    plain = torch.optim.Adam(module.parameters(), fused=True)
    optimizer = HybridAdam(module.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert isinstance(adamw([{"params": list(module.parameters())}], 0.1), HybridAdam)
