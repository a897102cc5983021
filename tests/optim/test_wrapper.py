import pytest
import torch
from torch import nn

from albireo.optim import OptimizerWrapper, ScaledOptimizer, adamw


def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    return weight, adamw([{"params": [weight], "weight_decay": 0.0}], 0.1)


def test_a_scaled_step_gives_the_bits_of_a_plain_one() -> None:
    results = []
    for wrapper in (OptimizerWrapper, lambda inner: ScaledOptimizer(inner, torch.device("cpu"))):
        weight, inner = make()
        optimizer = wrapper(inner)
        for factor in (1.0, 3.0):
            optimizer.backward((weight * torch.tensor([2.0, 5.0]) * factor).sum())
            norm = optimizer.clip_grad_by_norm(1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append((weight.detach().clone(), norm))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_an_overflow_leaves_no_trace_and_halves_the_scale() -> None:
    weight, inner = make()
    optimizer = ScaledOptimizer(inner, torch.device("cpu"), initial_scale=1024.0)
    optimizer.backward((weight * 2.0).sum())
    optimizer.clip_grad_by_norm(0.0)
    optimizer.step()
    optimizer.zero_grad()
    before = weight.detach().clone()
    state = {key: value.clone() for key, value in inner.state[weight].items()}
    optimizer.backward((weight * float("inf")).sum())
    norm = optimizer.clip_grad_by_norm(1.0)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.isfinite(norm)
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(inner.state[weight][key], value) for key, value in state.items())
    assert optimizer.scaler_state()["scale"] == 512.0


def test_the_loss_scale_comes_back() -> None:
    _, inner = make()
    optimizer = ScaledOptimizer(inner, torch.device("cpu"), initial_scale=4096.0)
    other = ScaledOptimizer(make()[1], torch.device("cpu"))
    other.load_scaler_state(optimizer.scaler_state())
    assert other.scaler_state() == optimizer.scaler_state()
    assert other.scaler_state()["scale"] == 4096.0


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_norm_is_that_before_clipping(max_norm: float) -> None:
    weight, inner = make()
    optimizer = OptimizerWrapper(inner)
    optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
    assert optimizer.clip_grad_by_norm(max_norm).item() == pytest.approx(5.0)
    assert weight.grad is not None
    assert weight.grad.norm().item() == pytest.approx(5.0 if max_norm == 0 else 1.0, rel=1e-5)
