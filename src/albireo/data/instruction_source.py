"""Where instructions come from: JSON, JSON lines, a folder of them, a data set of the hub, or made up on the spot."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albireo.data.files import walk
from albireo.data.hub_source import Loader, candidates, load_tables
from albireo.data.instruction import FIELDS, Instruction, parse_instruction
from albireo.data.readers import JSON_SUFFIXES, is_json, read_values
from albireo.data.source import local_path
from albireo.data.split_names import assign_splits
from albireo.data.synthetic_instructions import synthetic_instructions
from albireo.errors import DataError

__all__ = ["InstructionSource", "check_instructions", "open_instructions"]

_SHOWN = 3
_ROWS = 1000


@dataclass(frozen=True)
class InstructionSource:
    """Instructions by split.

    Attributes:
        name: what the user called it.
        splits: "train", and "validation" where the source has one; each at least one record.
        description: one line for the user.
        malformed: of those left out, where they stand and why.
    """

    name: str
    splits: Mapping[str, tuple[Instruction, ...]]
    description: str
    malformed: tuple[str, ...] = field(default=())

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, of all records by split; where they lie does not count."""
        digest = hashlib.sha256(b"instructions 1")
        for split, records in self.splits.items():
            digest.update(f"\0{split}\0{len(records)}\0".encode())
            for record in records:
                for text in (record.instruction, record.input, record.output):
                    data = text.encode()
                    # Lengths keep apart what joins to the same bytes.
                    digest.update(len(data).to_bytes(8, "little"))
                    digest.update(data)
        return digest.hexdigest()


def open_instructions(
    name: str, *, max_malformed: float = 0.01, seed: int = 0, load: Loader | None = None
) -> InstructionSource:
    """Read the instructions that a user named.

    Records that are none are left out, counted and named by where they stand; more than `max_malformed` are refused.

    Args:
        name: `synthetic`; a .json file (one array), a file of JSON lines, or a folder of them, whose names tell train
            and validation parts; or a data set of the hub.
        max_malformed: how many records may be malformed: a share of all below 1, a number from 1 on.
        seed: which made-up records.
        load: what loads a data set of the hub; see `open_hub`.

    Raises:
        DataError: there is nothing of that name, it cannot be read, or too much of it is malformed.
    """
    if name == "synthetic":
        records = synthetic_instructions(seed)
        return InstructionSource(
            name, {"train": records}, f"synthetic: {len(records):,} instructions made up on the spot"
        )
    path = local_path(name)
    if path is None:
        tables = load_tables(name, load)
        splits = _assigned(name, {str(split): table for split, table in tables.items() if len(table)})
        found = {split: _rows_of(name, parts, tables) for split, parts in splits.items()}
        where = f"{name} of the Hugging Face hub"
    else:
        files = _files_of(path, name)
        found = {split: _values_of(paths) for split, paths in files.items()}
        count = sum(map(len, files.values()))
        where = name if path.is_file() else f"{name} ({count} file{'s' if count != 1 else ''})"
    return _judged(name, where, found, max_malformed)


def check_instructions(name: str) -> None:
    """Find out what can be known without reading a record or asking the hub.

    Args:
        name: as for `open_instructions`.

    Raises:
        DataError: there is no such file, nothing in the folder, or no data set of the hub could be called that.
    """
    if name == "synthetic":
        return
    path = local_path(name)
    if path is None:
        candidates(name)
    else:
        _files_of(path, name)


def _files_of(path: Path, name: str) -> dict[str, tuple[Path, ...]]:
    expected = f"expected records with {', '.join(FIELDS)} in {', '.join(JSON_SUFFIXES)}"
    if path.is_file():
        if not is_json(path):
            raise DataError(f"{name} is not a file of instructions by its name: {expected}")
        return {"train": (path,)}
    if not path.is_dir():
        raise DataError(f"{name} is neither a file nor a folder")
    found = {file.relative_to(path).as_posix(): file for file in walk(path) if is_json(file)}
    if not found:
        raise DataError(f"the folder {name} holds no file of instructions: {expected}")
    return {split: tuple(found[part] for part in parts) for split, parts in _assigned(name, found).items()}


def _assigned(name: str, parts: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    plan = assign_splits(parts)
    if not plan.train:
        raise DataError(f"the data set {name} has no rows")
    return {split: names for split, names in (("train", plan.train), ("validation", plan.validation)) if names}


def _values_of(paths: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        yield from read_values(path)


def _rows_of(name: str, parts: Sequence[str], tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in parts:
        table = tables[part]
        columns = [column for column in FIELDS if column in table.column_names]
        lacking = [column for column in FIELDS if column not in columns and column != "input"]
        if lacking:
            raise DataError(
                f'the {part} split of {name} has no column "{lacking[0]}"; its columns are: {", ".join(table.column_names)}'
            )
        chosen = table.select_columns(columns)
        for first in range(0, len(chosen), _ROWS):
            try:
                block = chosen[first : first + _ROWS]
            except (OSError, ValueError) as error:  # the files of its cache
                raise DataError(f"the data set {name} cannot be read: {error}") from error
            for row, values in enumerate(zip(*(block[column] for column in columns), strict=True), start=first):
                yield f"row {row} of the {part} split", dict(zip(columns, values, strict=True))


def _judged(
    name: str, where: str, found: Mapping[str, Iterable[tuple[str, Any]]], max_malformed: float
) -> InstructionSource:
    """Take what is an instruction, and refuse a source with too much that is none."""
    splits: dict[str, tuple[Instruction, ...]] = {}
    malformed: list[str] = []
    total = 0
    for split, values in found.items():
        records = []
        for place, value in values:
            total += 1
            record = str(value) if isinstance(value, DataError) else parse_instruction(value)
            if isinstance(record, Instruction):
                records.append(record)
            else:
                # A line that is no JSON names its own place.
                malformed.append(record if isinstance(value, DataError) else f"{place}: {record}")
        splits[split] = tuple(records)
    if total == 0:
        raise DataError(f"{name} holds no records: expected objects with {', '.join(FIELDS)}")
    allowed = math.floor(max_malformed * total) if max_malformed < 1 else math.floor(max_malformed)
    if len(malformed) > allowed:
        more = f"; and {len(malformed) - _SHOWN:,} more" if len(malformed) > _SHOWN else ""
        raise DataError(
            f"{len(malformed):,} of {total:,} records of {name} are malformed, and --max-malformed {max_malformed:g} allows "
            f"{allowed:,}: {'; '.join(malformed[:_SHOWN])}{more}"
        )
    for split, taken in splits.items():
        if not taken:
            raise DataError(f"the {split} part of {name} holds no record that is whole: {malformed[0]}")
    counts = "; ".join(f"{split} {len(taken):,}" for split, taken in splits.items())
    return InstructionSource(name, splits, f"{where}: instructions: {counts}", tuple(malformed))
