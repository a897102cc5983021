"""What the parts of a chunk take."""

from __future__ import annotations

import pytest
import torch

from albireo.memory.budget import ChunkBytes
from albireo.memory.sizes import ChunkSizes

N = 1280


@pytest.mark.parametrize(
    ("dtype", "ranks", "accumulates", "states", "gradients", "on_host"),
    [
        (torch.float32, 1, False, 8, 4, 4),
        (torch.float32, 1, True, 8, 4, 4),
        (torch.float32, 2, False, 8, 4, 4),
        (torch.bfloat16, 1, False, 12, 2, 2),
        (torch.bfloat16, 1, True, 12, 4, 6),  # those of the first micro-batch come in 16 bits
        (torch.float16, 4, False, 12, 4, 4),
        (torch.float16, 4, True, 12, 4, 4),
    ],
)
def test_bytes_of_an_element(
    dtype: torch.dtype, ranks: int, accumulates: bool, states: int, gradients: int, on_host: int
) -> None:
    sizes = ChunkSizes(N, ranks, dtype, trained=True, is_root=True)
    part = N // ranks
    assert sizes.weights == N * dtype.itemsize
    assert sizes.bytes(accumulates=accumulates) == ChunkBytes(
        weights=N * dtype.itemsize,
        shard=part * dtype.itemsize,
        states=part * states,
        gradients=part * gradients,
        host_gradients=part * on_host,
        trained=True,
        is_root=True,
        ranks=ranks,
    )


def test_what_is_frozen_has_weights_alone() -> None:
    found = ChunkSizes(N, 2, torch.bfloat16, trained=False, is_root=False).bytes(accumulates=True)
    assert found == ChunkBytes(2 * N, N, 0, 0, 0, trained=False, is_root=False, ranks=2)
