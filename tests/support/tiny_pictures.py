"""Small pictures on the disk: reddish and greenish ones, in folders of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(
    folder: Path, per_class: int, *, classes: tuple[str, ...] = ("green", "red"), size: int = 24
) -> Path:
    """Write pictures of noise on a class's own colour, and return their folder."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for count in range(per_class):
            generator = np.random.default_rng([number, count])
            pixels = generator.integers(0, 90, (size, size + count % 3, 3), dtype=np.uint8)
            pixels[..., 1 - number % 2] += np.uint8(130)
            Image.fromarray(pixels).save(folder / name / f"{count:03}.png")
    return folder
