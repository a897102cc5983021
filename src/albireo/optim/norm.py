"""The global norm of gradients, and clipping by it. Neither waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

__all__ = ["clip_by_norm", "global_norm", "norms_of", "sum_of_squared_norms", "sum_of_squares"]

_BLOCK = 512


def global_norm(
    gradients: Iterable[torch.Tensor], sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the Euclidean norm of all gradients together.

    Args:
        gradients: tensors of any shapes on one device. If ranks hold parts of the gradients, this rank's parts.
        sum_over_ranks: where ranks hold parts: takes this rank's sum of squares, an fp64 scalar, and returns that of
            all ranks, the same bits on each. It is called on every rank; on one without gradients with a zero that
            lies on the host.

    Returns:
        An fp32 scalar on that device; zero if there is no gradient. Of no gradients it lies on the host, or where
        `sum_over_ranks` put it.
    """
    squares = sum_of_squares(list(gradients))
    if sum_over_ranks is not None:
        squares = sum_over_ranks(squares)
    return squares.sqrt().float()


def sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements: what a global norm is the root of.

    Args:
        tensors: of any shapes on one device.

    Returns:
        An fp64 scalar on that device; a zero on the host if there is no tensor.
    """
    return sum_of_squared_norms(norms_of(tensors))


def norms_of(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Return the Euclidean norm of each tensor, in parts: the root of the sum of their squares is the norm.

    Args:
        tensors: of any shapes on one device.

    Returns:
        For each tensor scalars on that device, in fp32 (fp64 if one of the tensors is). They do not depend on what else
        is in the list, so norms may be taken of some tensors now and of others later.
    """
    if not tensors:
        return []
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    if tensors[0].is_cuda:
        norms = torch._foreach_norm(list(tensors), 2.0, dtype=dtype)  # noqa: SLF001  as torch.nn.utils does
        return [(norm,) for norm in norms]
    return [_host_norms(tensor, dtype) for tensor in tensors]


def sum_of_squared_norms(norms: Iterable[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return the sum of the squares of norms, an fp64 scalar.

    Args:
        norms: from `norms_of`, in the order in which they are added up.

    Returns:
        A scalar on the norms' device; a zero on the host if there is none.
    """
    parts = [part for of_tensor in norms for part in of_tensor]
    return torch.stack(parts).double().square().sum() if parts else torch.zeros((), dtype=torch.float64)


def _host_norms(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return norms of parts of a host tensor, which together have its norm.

    On a CPU torch adds up a whole tensor in one fp32 sum a lane: 40 million equal elements come out 2% short. Sums of
    a few hundred lose nothing to speak of, and are as quick.
    """
    flat = tensor.reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=dtype)
    return torch.linalg.vector_norm(blocks.double()).to(dtype), rest


def clip_by_norm(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients so that their global norm is at most a bound, in place.

    A norm that is not finite turns every gradient into one that is not: nothing is hidden.

    Args:
        gradients: the tensors that the norm was taken of.
        norm: their norm, a scalar on their device.
        max_norm: the bound.
    """
    if gradients:
        # The same small addend as torch.nn.utils.clip_grad_norm_, so that both clip to the same bits.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(list(gradients), factor)
