"""Bits are compared as they are, and the replayed step is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from albireo.optim import HybridAdam
from albireo.verify.replay import Mismatch, Replay, Stepped, compare_bits, subtraction_scale

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


def test_units_are_those_of_the_scale() -> None:
    one, small = torch.ones(1), torch.full((1,), 2.0**-20)
    # What is left of 1 where nearly 1 is taken from it: half a unit of 1 is 2^19 of its own.
    other = small + 2.0**-24
    assert compare_bits(other, small) == Mismatch(1, 2**19)
    assert compare_bits(other, small, one) == Mismatch(1, 1)
    assert compare_bits(small + 3 * 2.0**-23, small, one) == Mismatch(1, 3)
    assert compare_bits(small + 2.01 * 2.0**-23, small, one) == Mismatch(1, 3)
    assert compare_bits(small, small, one) == Mismatch(0, 0)
    assert compare_bits(-torch.zeros(1), torch.zeros(1), one) == Mismatch(1, 1)
    # The least there are, and a dtype of fewer bits.
    least = torch.full((1,), 2.0**-149)
    assert compare_bits(3 * least, least, least) == Mismatch(1, 2)
    assert compare_bits(one.bfloat16() * 1.0234375, one.bfloat16(), one) == Mismatch(1, 3)


def test_what_is_not_finite_has_no_units() -> None:
    for wrong in (math.inf, -math.inf, math.nan):
        off = torch.tensor([wrong])
        assert compare_bits(off, torch.ones(1), torch.ones(1)).ulps > 2**20
        assert compare_bits(torch.ones(1), off, torch.ones(1)).ulps > 2**20
        assert compare_bits(torch.zeros(1), torch.ones(1), off).ulps > 2**20


@given(floats.filter(lambda value: abs(value) < 1e30), st.integers(1, 1000))
def test_at_its_own_scale_a_number_has_its_own_units(value: float, count: int) -> None:
    number = torch.tensor([value])
    bits = number.view(torch.int32)
    other = (bits + count).view(torch.float32)
    # Away from zero a power of two may be passed, behind which units are twice as large.
    assert compare_bits(number, other).ulps == count
    assert count <= compare_bits(other, number, number.abs()).ulps <= 2 * count


def test_the_scale_is_that_of_what_is_subtracted() -> None:
    before, after = torch.tensor([-4.0, 1.0, 0.0]), torch.tensor([0.5, -2.0, -3.0])
    group = {"lr": 0.5, "weight_decay": 0.5, "decoupled_weight_decay": True}
    assert subtraction_scale(before, after, group).tolist() == [3.0, 2.0, 3.0]
    assert subtraction_scale(before, after, {**group, "decoupled_weight_decay": False}).tolist() == [4.0, 2.0, 3.0]
    assert subtraction_scale(before, after, {"lr": 0.5}).tolist() == [4.0, 2.0, 3.0]
