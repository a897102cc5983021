"""A product with a quantised matrix, which is dequantised for the product alone, in forward and again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from albireo.ops.quantise import Code, dequantise

__all__ = ["quantised_product"]


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int], code: Code
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.code = shape, code
        return F.linear(x, _matrix(codes, scales, shape, code, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        (gradient,) = gradients
        codes, scales = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _matrix(codes, scales, ctx.shape, ctx.code, gradient.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(dim=0)
        return of_x, None, None, of_bias, None, None


def quantised_product(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, shape: tuple[int, int], code: Code
) -> Tensor:
    """Return `x W^T + b`, where W is quantised and gets no gradient.

    Args:
        x: `[..., in]`, of floating point, in the dtype that computes.
        codes: W's, uint8, as `quantise` gives them.
        scales: the same.
        bias: `[out]` in x's dtype, or None.
        shape: W's: `(out, in)`.
        code: how it was quantised.

    Returns:
        `[..., out]`, in x's dtype.
    """
    result: Tensor = _QuantisedProduct.apply(x, codes, scales, bias, shape, code)  # type: ignore[no-untyped-call]
    return result


def _matrix(codes: Tensor, scales: Tensor, shape: tuple[int, int], code: Code, dtype: torch.dtype) -> Tensor:
    return dequantise(codes, scales, shape[0] * shape[1], code, dtype).view(shape)
