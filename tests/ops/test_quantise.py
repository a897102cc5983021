"""Weights in 8 and 4 bits: how far they are off, what is exact, and the product with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from albireo.ops.quantise import BLOCK_WEIGHTS, Code, code_bytes, dequantise, quantise, scale_bytes
from albireo.ops.quantised_product import quantised_product

CODES: list[Code] = ["int8", "nf4"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def back(weight: torch.Tensor, code: Code, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    codes, scales = quantise(weight, code)
    return dequantise(codes, scales, weight.numel(), code, dtype).view(weight.shape)


def sayable(code: Code) -> torch.Tensor:
    """Return all that codes stand for, in a block whose scale is 1."""
    if code == "int8":
        return torch.arange(-127.0, 128.0)
    pairs = torch.arange(0, 16, 2)
    codes = (pairs | ((pairs + 1) << 4)).to(torch.uint8).repeat(4)
    return dequantise(codes, torch.ones(1).view(torch.uint8), 16, code, torch.float32)


@given(weights=st.integers(1, 1000), code=st.sampled_from(CODES), seed=st.integers(0, 99), spread=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_each_weight_is_the_nearest_that_its_block_can_say(weights: int, code: Code, seed: int, spread: float) -> None:
    weight = normal(weights, seed=seed) * spread
    codes, scales = quantise(weight, code)
    assert (codes.numel(), scales.numel()) == (code_bytes(weights, code), scale_bytes(weights, code))
    assert codes.dtype == scales.dtype == torch.uint8
    found = dequantise(codes, scales, weights, code, torch.float32)
    for number, part in enumerate(weight.split(BLOCK_WEIGHTS[code])):
        can = sayable(code) * scales.view(torch.float32)[number]
        best = (part[:, None] - can).abs().amin(dim=1)
        got = (part - found.split(BLOCK_WEIGHTS[code])[number]).abs()
        # Between two that are about as near, rounding decides.
        assert torch.all(got <= best + 1e-6 * part.abs().max())


@pytest.mark.parametrize("code", CODES)
def test_zeros_and_the_largest_stay_what_they_are(code: Code) -> None:
    weight = normal(3, 256)
    weight[1] = 0
    weight[0, ::7] = 0
    found = back(weight, code)
    assert torch.all(found[weight == 0] == 0)
    largest = weight.view(-1, BLOCK_WEIGHTS[code]).abs().argmax(dim=1, keepdim=True)
    got = found.view(-1, BLOCK_WEIGHTS[code]).gather(1, largest)
    want = weight.view(-1, BLOCK_WEIGHTS[code]).gather(1, largest)
    torch.testing.assert_close(got, want, rtol=2e-7 if code == "int8" else 1.0, atol=0)
    if code == "nf4":
        torch.testing.assert_close(got.abs().amax(), want.abs().amax(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("code", "off"), [("int8", 0.007), ("nf4", 0.1)])
def test_weights_of_a_normal_distribution_lose_little(code: Code, off: float) -> None:
    weight = normal(64, 1024)
    assert (back(weight, code) - weight).norm() / weight.norm() < off


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_is_the_wide_one_rounded_once(code: Code, dtype: torch.dtype) -> None:
    weight = normal(33, 65)
    assert torch.equal(back(weight, code, dtype), back(weight, code).to(dtype))


@pytest.mark.parametrize("code", CODES)
def test_quantising_what_was_quantised_changes_nothing(code: Code) -> None:
    once = back(normal(40, 50), code)
    torch.testing.assert_close(back(once, code), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
def test_the_product_and_its_gradients_are_those_with_the_dequantised_matrix(
    code: Code, dtype: torch.dtype, bias: str | None
) -> None:
    weight, gradient = normal(24, 40), normal(2, 5, 24, seed=2, dtype=dtype)
    codes, scales = quantise(weight, code)

    def both(product: Any) -> list[torch.Tensor | None]:
        x = normal(2, 5, 40, seed=1, dtype=dtype).requires_grad_()
        b = None if bias is None else normal(24, seed=3, dtype=dtype).requires_grad_(bias == "trained")
        out = product(x, b)
        out.backward(gradient)
        return [out.detach(), x.grad, None if b is None else b.grad]

    got = both(lambda x, b: quantised_product(x, codes, scales, b, (24, 40), code))
    want = both(lambda x, b: F.linear(x, back(weight, code, dtype), b))
    for found, wanted in zip(got, want, strict=True):
        if found is None or wanted is None:
            assert found is wanted
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_only_bytes_are_kept_for_backward() -> None:
    codes, scales = quantise(normal(24, 40), "int8")
    kept: list[torch.Tensor] = []
    x = normal(3, 40).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantised_product(x, codes, scales, None, (24, 40), "int8")
    assert {t.data_ptr() for t in kept} == {codes.data_ptr(), scales.data_ptr()}
