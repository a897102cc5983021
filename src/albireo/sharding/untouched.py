"""Whether a weight is as the mechanism that holds it has left it, and what is said where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["moved_weight", "version_of", "written_weight"]


def version_of(tensor: torch.Tensor) -> int:
    """Return autograd's count of writes to a tensor."""
    version: int = tensor._version  # noqa: SLF001  the one way to it
    return version


def moved_weight(shape: Sequence[int]) -> RuntimeError:
    """Return the error for a weight that somebody has cast, moved or replaced.

    Args:
        shape: the weight's.
    """
    return RuntimeError(
        f"a weight of shape {tuple(shape)} has left its place: a boosted model must not be cast, moved or given other "
        "tensors; load weights by booster.load_model"
    )


def written_weight(shape: Sequence[int]) -> RuntimeError:
    """Return the error for a weight that somebody has written to.

    Args:
        shape: the weight's.
    """
    return RuntimeError(
        f"a weight of shape {tuple(shape)} was written to, which the next step would undo: load weights by "
        "booster.load_model"
    )
