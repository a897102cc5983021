"""Counter-based random bits: a value depends on a key and an index alone, never on what was drawn before.

The numbers are written down here instead of taken from NumPy's generators, because a resume months later has to see
the same order of samples, and NumPy does not promise that across versions. The function is SplitMix64 (Steele, Lea,
Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["random_bits", "random_key"]

_WORD = 2**64
_GAMMA = 0x9E3779B97F4A7C15


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix every 64-bit word. It is a bijection: words that differ stay different."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_key(*parts: int) -> int:
    """Return a 64-bit key made of whole numbers, such as a seed and an epoch.

    Args:
        parts: any whole numbers, negative ones too; their order counts.
    """
    key = 0
    for part in parts:
        word = np.array([(key + _GAMMA + part) % _WORD], dtype=np.uint64)
        key = int(_scramble(word)[0])
    return key


def random_bits(key: int, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 random bits for every index; indices that differ get words that differ.

    Args:
        key: what `random_key` made.
        indices: whole numbers of any shape.

    Returns:
        uint64 of the same shape.
    """
    return _scramble(np.uint64(key % _WORD) + (indices + np.uint64(1)) * np.uint64(_GAMMA))
