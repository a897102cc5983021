"""Small texts that tests share."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ("star", "double", "light", "night", "sees", "two", "one", "and", "the", "of")


def write_text(path: Path, *, lines: int, seed: int = 5) -> Path:
    """Write sentences of nine words, one a line, and return the path.

    Args:
        path: the file.
        lines: how many sentences.
        seed: which.
    """
    generator = random.Random(seed)
    path.write_text("\n".join(" ".join(generator.choices(WORDS, k=9)) + "." for _ in range(lines)))
    return path
