"""The kernel that steps weights in halves, beside torch's fused optimizer on the weights joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from albireo.optim import HybridAdam
from albireo.optim.split_adam import SplitAdam, SplitStep
from albireo.optim.split_weights import join, split
from albireo.verify.replay import compare_bits, subtraction_scale

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
# A number alone, less than a block, a chunk, a bit more than some chunks.
SIZES = (1, 100, 16384, 50001)


def joined(weight: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    wide = torch.empty_like(weight, dtype=torch.float32)
    join(weight, rest, wide)
    return wide


@pytest.mark.parametrize(
    ("dtype", "factor", "settings"),
    [
        (torch.bfloat16, 0.37, {"weight_decay": 0.1}),
        (torch.bfloat16, None, {"weight_decay": 0.0, "lr": 0.3, "betas": (0.0, 0.5), "eps": 1e-3}),
        (torch.float32, None, {"weight_decay": 0.0, "adamw_mode": False}),
    ],
)
def test_a_step_is_torchs_fused_step(dtype: torch.dtype, factor: float | None, settings: dict[str, Any]) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def numbers(size: int, exponent: float) -> torch.Tensor:
        spread = torch.rand(size, device=DEVICE, generator=generator) * 6 + exponent
        return torch.randn(size, device=DEVICE, generator=generator) * 10**spread

    weights = [torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for size in SIZES]
    rests = [torch.empty(size, dtype=torch.int16, device=DEVICE) for size in SIZES]
    for size, weight, rest in zip(SIZES, weights, rests, strict=True):
        split(numbers(size, -4), weight, rest)
    keys = [nn.Parameter(torch.full((1,), torch.nan, device=DEVICE).expand(size)) for size in SIZES]
    ours = HybridAdam(keys, **settings)
    kernel = SplitAdam(ours)
    assert SplitAdam.can_step(ours, DEVICE)
    scale = None if factor is None else torch.tensor(factor, device=DEVICE)
    moved, farthest = 0, {"weight": 0, "step": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for number in range(5):
        gradients = [numbers(size, -5).to(dtype) for size in SIZES]
        # One that begins where no wide load may.
        gradients[1] = numbers(SIZES[1] + 1, -5).to(dtype)[1:]
        masters = [nn.Parameter(joined(weight, rest)) for weight, rest in zip(weights, rests, strict=True)]
        plain = HybridAdam(masters, **settings)
        for master, gradient, key in zip(masters, gradients, keys, strict=True):
            master.grad = gradient.float() if scale is None else gradient.float() * scale
            if number:
                plain.state[master] = {name: value.clone() for name, value in ours.state[key].items()}
        before = [master.detach().clone() for master in masters]
        plain.step()
        steps = [SplitStep(*each) for each in zip(keys, weights, rests, gradients, strict=True)]
        kernel.step(ours.param_groups[0], steps, scale)
        for key, master, old, weight, rest in zip(keys, masters, before, weights, rests, strict=True):
            stepped = joined(weight, rest)
            scale_of_weight = subtraction_scale(old, master.detach(), ours.param_groups[0]).cpu()
            pairs = [
                ("weight", stepped, master, scale_of_weight),
                *((name, value, plain.state[master][name], None) for name, value in ours.state[key].items()),
            ]
            for what, mine, theirs, at in pairs:
                assert mine.shape == theirs.shape
                mismatch = compare_bits(mine.cpu(), theirs.detach().cpu(), at)
                farthest[what] = max(farthest[what], mismatch.ulps)
                moved += mismatch.elements
            assert torch.equal(weight, stepped.to(torch.bfloat16))
    print(f"{moved} of {5 * 3 * sum(SIZES)} numbers have other bits, by {farthest}")
    # A weight that the halves cannot hold is a unit nearer to zero; moments are those of torch.
    assert farthest == {"weight": min(farthest["weight"], 1), "step": 0, "exp_avg": 0, "exp_avg_sq": 0}


def test_what_the_kernel_would_step_otherwise_is_left_to_torch() -> None:
    parameters = [nn.Parameter(torch.ones(4, device=DEVICE))]
    assert SplitAdam.can_step(torch.optim.AdamW(parameters, fused=True), DEVICE)
    for optimizer in (
        torch.optim.AdamW(parameters),
        torch.optim.AdamW(parameters, fused=True, amsgrad=True),
        torch.optim.AdamW(parameters, lr=torch.tensor(1e-3, device=DEVICE), fused=True),
        torch.optim.Adam(parameters, weight_decay=0.1, fused=True),
        torch.optim.SGD(parameters, fused=True),
    ):
        assert not SplitAdam.can_step(optimizer, DEVICE)
    assert not SplitAdam.can_step(HybridAdam([nn.Parameter(torch.ones(4))]), torch.device("cpu"))
