"""fp32 weights in two halves of 16 bits each: the bf16 weight that computes, and what it lacks.

The bits of an fp32 number, as an integer, are those of its bf16 neighbour in the upper half plus a *rest* between -2^15
and 2^15. The neighbour is what a cast makes: the nearest, of two that are equally near the even one. So a rest of 16
signed bits holds all but 2^15 itself, half a bf16 step up from an even neighbour: there the fp32 number is taken one
unit in its last place nearer to zero. It happens to one in 2^17 random numbers, and once: what was joined is split into
the same halves again.
"""

from __future__ import annotations

import torch

__all__ = ["join", "split"]

_LOWEST, _HIGHEST = -(2**15), 2**15 - 1


def split(wide: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor) -> None:
    """Write fp32 numbers as two halves.

    Args:
        wide: fp32, 1-D, contiguous.
        weight: bf16, of its length; gets `wide` cast, whatever it holds: what is not a number stays none.
        rest: int16, of its length.
    """
    weight.copy_(wide)
    difference = wide.view(torch.int32) - _upper(weight)
    rest.copy_(difference.clamp_(_LOWEST, _HIGHEST))


def join(weight: torch.Tensor, rest: torch.Tensor, wide: torch.Tensor) -> None:
    """Write the fp32 numbers that two halves stand for.

    Args:
        weight: bf16, 1-D, contiguous.
        rest: int16, of its length.
        wide: fp32, of its length; written to.
    """
    wide.view(torch.int32).copy_(_upper(weight).add_(rest))


def _upper(weight: torch.Tensor) -> torch.Tensor:
    """Return the bits of bf16 numbers as the upper half of integers of 32."""
    return weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
