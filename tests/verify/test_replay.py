"""Bits are compared as they are, and the replayed step is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from albireo.optim import HybridAdam
from albireo.verify.replay import Mismatch, Replay, Stepped, compare_bits

CPU = torch.device("cpu")
floats = st.floats(width=32, allow_nan=False)


def test_equal_bits_are_equal_and_others_are_not() -> None:
    values = torch.tensor([1.0, -0.0, math.nan, math.inf])
    assert compare_bits(values, values.clone()) == Mismatch(0, 0)
    assert compare_bits(torch.tensor([0.0]), torch.tensor([-0.0])) == Mismatch(1, 1)
    after = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert compare_bits(after.reshape(1), torch.ones(1)) == Mismatch(1, 1)
    assert compare_bits(torch.tensor([1, 2]), torch.tensor([1, 5])) == Mismatch(1, 3)
    assert compare_bits(torch.ones(2, 3), torch.ones(3, 2)).elements == 6
    assert compare_bits(torch.ones(2), torch.ones(2, dtype=torch.float64)).elements == 2


def test_a_state_that_is_not_there_is_one_of_zeros() -> None:
    assert compare_bits(None, None) == Mismatch(0, 0)
    assert compare_bits(None, torch.zeros(3)) == Mismatch(0, 0)
    assert compare_bits(torch.zeros(()), None) == Mismatch(0, 0)
    assert compare_bits(torch.tensor([0.0, 1.0]), None).elements == 1


@given(floats, floats)
def test_the_distance_counts_the_numbers_between(first: float, second: float) -> None:
    a, b = torch.tensor([first]), torch.tensor([second])
    found = compare_bits(a, b).ulps
    assert found == compare_bits(b, a).ulps
    if first != second:
        nearer = torch.nextafter(a, b)
        if bool(nearer != 0) and bool(a != 0) and bool(b != 0):
            assert compare_bits(nearer, b).ulps == found - 1


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 23), (64, 65), (130, 7)])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_each_parameter_by_itself_steps_as_all_together(shape: tuple[int, ...], adamw_mode: bool) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(11, 3))]
    optimizer = HybridAdam(parameters, lr=0.01, weight_decay=0.1, adamw_mode=adamw_mode)
    stepped = Stepped(parameters[0].detach().clone(), {})
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        assert parameters[0].grad is not None
        stepped = Replay(HybridAdam, settings, CPU).step(stepped, parameters[0].grad)
        optimizer.step()
        assert compare_bits(parameters[0].detach(), stepped.weight) == Mismatch(0, 0)
        for name, state in optimizer.state[parameters[0]].items():
            assert compare_bits(state, stepped.states[name]) == Mismatch(0, 0)


def test_what_is_replayed_is_left_as_it_was() -> None:
    weight, moment, gradient = torch.ones(3), torch.full((3,), 0.5), torch.ones(3)
    settings = {"lr": 0.1, "momentum": 0.9, "unknown": 1}
    after = Replay(torch.optim.SGD, settings, CPU).step(Stepped(weight, {"momentum_buffer": moment}), gradient)
    assert weight.tolist() == [1.0] * 3
    assert moment.tolist() == [0.5] * 3
    assert after.states["momentum_buffer"].tolist() == pytest.approx([1.45] * 3)
    assert after.weight.tolist() == pytest.approx([1 - 0.145] * 3)


@pytest.mark.parametrize("cut", [1, 12, 50, 64, 129])
def test_what_is_stepped_in_pieces_is_replayed_in_pieces(cut: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(13, 17)
    pieces = [(0, cut), (cut, whole.numel())]
    parts = [nn.Parameter(whole.reshape(-1)[slice(*piece)].clone()) for piece in pieces]
    optimizer = torch.optim.AdamW(parts, lr=0.1, weight_decay=0.1, fused=True)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    stepped = Stepped(whole, {})
    for _ in range(5):
        gradient = torch.randn(whole.shape)
        for part, piece in zip(parts, pieces, strict=True):
            part.grad = gradient.reshape(-1)[slice(*piece)].clone()
        optimizer.step()
        stepped = Replay(torch.optim.AdamW, settings, CPU).step(stepped, gradient, pieces)
        assert stepped.weight.shape == whole.shape
        assert compare_bits(torch.cat([part.detach() for part in parts]), stepped.weight.reshape(-1)) == Mismatch(0, 0)
        for name in ("exp_avg", "exp_avg_sq"):
            found = torch.cat([optimizer.state[part][name] for part in parts])
            assert compare_bits(found, stepped.states[name].reshape(-1)) == Mismatch(0, 0)
        assert compare_bits(optimizer.state[parts[1]]["step"], stepped.states["step"]) == Mismatch(0, 0)
