"""Two benches beside each other, row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albireo.bench.case import name_of
from albireo.errors import ConfigError, RunFolderError

__all__ = ["Pair", "compare", "read_rows"]

# What two rows have in common that measure the same; files that were written before one of them was there lack it.
_SAME = (
    "recipe", "system", "model", "adapter", "batch_size", "precision", "sequence_length", "checkpointing", "tf32", "mem_cap",
    "gpus",
)  # fmt: skip
_ABSENT = {"mem_cap": 0.0, "adapter": "none", "recipe": "opt", "gpus": 1}


@dataclass(frozen=True)
class Pair:
    """A row of both benches.

    Attributes:
        name: what was measured.
        before: samples a second in the first; None: it was not measured there.
        after: samples a second in the second; None: it was not measured there.
        memory_before: bytes at the peak in the first, of the device where there is one.
        memory_after: bytes at the peak in the second.
    """

    name: str
    before: float | None
    after: float | None
    memory_before: int | None
    memory_after: int | None

    @property
    def ratio(self) -> float | None:
        """Return how many times as fast the second is; None where either was not measured."""
        return self.after / self.before if self.before and self.after is not None else None

    def falls_below(self, bound: float) -> bool:
        """Return True if what was measured in the first is slower than the bound in the second, or does not run there."""
        return self.before is not None and (self.ratio is None or self.ratio < bound)


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a `bench.json`, or of the folder that has one.

    Args:
        path: either.

    Raises:
        RunFolderError: it cannot be read, or is no such file.
    """
    file = path / "bench.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
        rows = content["rows"]
        for row in rows:
            _key(row)
            _measured(row)
    except OSError as error:
        raise RunFolderError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunFolderError(f"{file} is not what albireo bench writes") from error
    return list(rows)


def compare(first: list[Mapping[str, Any]], second: list[Mapping[str, Any]]) -> list[Pair]:
    """Return the rows that both have, in the first one's order.

    Args:
        first: rows, as `read_rows` returns them.
        second: likewise.

    Raises:
        ConfigError: they have none in common.
    """
    others = {_key(row): row for row in second}
    pairs = [_pair(row, others[_key(row)]) for row in first if _key(row) in others]
    if not pairs:
        raise ConfigError("the two benches have no row in common: nothing can be compared")
    return pairs


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] if name not in _ABSENT else row.get(name, _ABSENT[name]) for name in _SAME)


def _measured(row: Mapping[str, Any]) -> tuple[float | None, int | None]:
    speed, memory = row["samples_per_second"], row["device_peak_bytes"] or row["host_peak_bytes"]
    return None if speed is None else float(speed), None if memory is None else int(memory)


def _pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> Pair:
    before, memory_before = _measured(one)
    after, memory_after = _measured(other)
    return Pair(name_of(one), before, after, memory_before, memory_after)
