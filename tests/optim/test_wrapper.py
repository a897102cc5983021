import copy

import pytest
import torch
from torch import nn

from albireo.errors import ConfigError
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


def both() -> list[tuple[nn.Parameter, OptimizerWrapper]]:
    wrapped = []
    for wrap in (OptimizerWrapper, lambda inner: ScaledOptimizer(inner, torch.device("cpu"))):
        weight, inner = make()
        wrapped.append((weight, wrap(inner)))
    return wrapped


def test_what_is_not_the_wrappers_is_asked_of_the_optimizer() -> None:
    for weight, optimizer in both():
        optimizer.backward(weight.sum())
        optimizer.step()
        assert optimizer.state is optimizer.unwrap().state
        assert optimizer.defaults["lr"] == 0.1
        saved = optimizer.state_dict()
        extra = nn.Parameter(torch.zeros(1))
        optimizer.add_param_group({"params": [extra], "lr": 7.0})
        assert optimizer.param_groups[1]["lr"] == 7.0
        del optimizer.param_groups[1]
        optimizer.load_state_dict(saved)
        assert optimizer.state[weight]["step"] == 1
        with pytest.raises(AttributeError, match="no_such_thing"):
            optimizer.no_such_thing()
        twin = copy.deepcopy(optimizer)
        assert twin.unwrap() is not optimizer.unwrap()


def test_the_norm_is_there_after_the_step() -> None:
    for weight, optimizer in both():
        assert optimizer.get_grad_norm() is None
        # Neither clipped nor asked for before the step.
        optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
        optimizer.step()
        assert optimizer.get_grad_norm() == pytest.approx(5.0)
        optimizer.zero_grad()
        # The norm before clipping, though the gradients are gone.
        optimizer.backward((weight * torch.tensor([6.0, 8.0])).sum())
        optimizer.clip_grad_by_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.get_grad_norm() == pytest.approx(10.0)


def test_values_are_clipped_each_by_itself() -> None:
    for weight, optimizer in both():
        optimizer.backward((weight * torch.tensor([3.0, -0.5])).sum())
        optimizer.clip_grad_by_value(1.0)
        assert weight.grad is not None
        assert weight.grad.tolist() == [1.0, -0.5]
        # Twice is no harm: they are unscaled once.
        assert optimizer.clip_grad_by_norm(0.0).item() == pytest.approx(1.25**0.5)
        optimizer.step()


def test_another_norm_is_refused() -> None:
    for weight, optimizer in both():
        optimizer.backward(weight.sum())
        with pytest.raises(ConfigError, match="norm_type is 2"):
            optimizer.clip_grad_by_norm(1.0, norm_type=1.0)


def test_gradients_without_the_scale_are_refused() -> None:
    weight, inner = make()
    optimizer = ScaledOptimizer(inner, torch.device("cpu"))
    before = weight.detach().clone()
    for _ in range(2):  # also where an earlier step was right
        weight.sum().backward()
        with pytest.raises(RuntimeError, match=r"call booster.backward\(loss, optimizer\)"):
            optimizer.step()
        assert torch.equal(weight.detach(), before)
        optimizer.zero_grad()
        optimizer.backward(weight.sum())
        optimizer.step()
        optimizer.zero_grad()
        before = weight.detach().clone()


def test_clipping_comes_after_the_last_backward() -> None:
    weight, inner = make()
    optimizer = ScaledOptimizer(inner, torch.device("cpu"))
    optimizer.backward(weight.sum())
    optimizer.clip_grad_by_norm(1.0)
    with pytest.raises(RuntimeError, match="after the last backward"):
        optimizer.backward(weight.sum())
    # A step that is given up leaves the next one, and the scale, as they were.
    optimizer.zero_grad()
    optimizer.backward((weight * torch.tensor([3.0, 4.0])).sum())
    assert optimizer.clip_grad_by_norm(0.0).item() == pytest.approx(5.0)
    assert optimizer.scaler_state()["scale"] == 2.0**16


def test_a_closure_is_the_optimizers_own() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OptimizerWrapper(torch.optim.LBFGS([weight]))

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight - 3.0).square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert weight.detach().tolist() == pytest.approx([3.0, 3.0], abs=1e-4)
    scaled = ScaledOptimizer(make()[1], torch.device("cpu"))
    with pytest.raises(ConfigError, match="take fp32 or bf16"):
        scaled.step(closure)


@pytest.mark.filterwarnings("error")
def test_a_schedule_sees_no_wrong_order_in_a_step_that_overflows() -> None:
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    optimizer = ScaledOptimizer(inner, torch.device("cpu"))
    optimizer.backward((weight * float("inf")).sum())
    optimizer.step()
    scheduler.step()
    assert weight.detach().tolist() == [1.0, 1.0]
