"""Small instructions that tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_texts import WORDS


def records(count: int, *, seed: int = 5) -> list[dict[str, Any]]:
    """Return records of very different lengths, with an input and without.

    Args:
        count: how many.
        seed: which.
    """
    generator = random.Random(seed)
    made = []
    for number in range(count):
        record = {
            "instruction": f"Say {' '.join(generator.choices(WORDS, k=2))}.",
            "output": " ".join(generator.choices(WORDS, k=generator.randint(1, 24))),
        }
        if number % 3 == 0:
            record["input"] = " ".join(generator.choices(WORDS, k=3))
        made.append(record)
    return made


def write_instructions(path: Path, count: int, *, seed: int = 5) -> Path:
    """Write records as one JSON array, or by its suffix as JSON lines, and return the path.

    Args:
        path: the file.
        count: how many.
        seed: which.
    """
    made = records(count, seed=seed)
    lines = "\n".join(json.dumps(record) for record in made)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(made))
    return path
