"""What a chunk is made of, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albireo.memory.budget import ChunkBytes

__all__ = ["ChunkSizes"]

# Adam's two moments, in fp32; what another optimizer keeps is not known before it steps, and is seldom more.
_MOMENTS = 8
_FP32 = 4


@dataclass(frozen=True)
class ChunkSizes:
    """What a chunk is made of, before it has memory.

    Attributes:
        numel: elements of the whole.
        ranks: how many share it.
        dtype: what computes.
        trained: an optimizer steps it.
        is_root: it is in use throughout.
    """

    numel: int
    ranks: int
    dtype: torch.dtype
    trained: bool
    is_root: bool

    @property
    def weights(self) -> int:
        """Bytes of the storage."""
        return self.numel * self.dtype.itemsize

    def bytes(self, *, accumulates: bool) -> ChunkBytes:
        """Return what each of its parts takes on this rank.

        Args:
            accumulates: gradients of several micro-batches are added up.
        """
        part = self.numel // self.ranks
        # In fp32 the masters are the home, which is counted as weights already; bytes are frozen, and have none.
        master = 0 if self.dtype == torch.float32 or not self.dtype.is_floating_point else _FP32
        wide = accumulates or self.ranks > 1
        gradients = part * (_FP32 if wide else self.dtype.itemsize)
        # Alone, the first micro-batch's gradients came in 16 bits, and have had a buffer of their own.
        narrow = part * self.dtype.itemsize if accumulates and self.ranks == 1 and self.dtype != torch.float32 else 0
        return ChunkBytes(
            weights=self.weights,
            shard=part * self.dtype.itemsize,
            states=part * (master + _MOMENTS) if self.trained else 0,
            gradients=gradients if self.trained else 0,
            host_gradients=gradients + narrow if self.trained else 0,
            trained=self.trained,
            is_root=self.is_root,
            ranks=self.ranks,
        )
