"""The rows of `metrics.jsonl`: one line of JSON for each optimizer step and for each evaluation."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from albireo.errors import RunFolderError
from albireo.files import FileOperations
from albireo.training.run_folder import replace_file

__all__ = ["EvalRow", "MetricsWriter", "TrainRow", "cut_after", "finite_or_none", "read_metrics"]


@dataclass(frozen=True)
class TrainRow:
    """What one optimizer step came to. A number that is not finite is null in the file and NaN when read back.

    Attributes:
        step: the optimizer step, counted from 1.
        epoch: the pass over the data that the step belongs to, counted from 1.
        loss: mean over the counted tokens of the global batch, in nats per token.
        lr: the learning rate of this step.
        grad_norm: the global norm of the gradient before clipping.
        samples_per_second: sequences per second, over all ranks.
        tokens_per_second: tokens per second, over all ranks.
        step_seconds: how long the step took.
        device_peak_bytes: the most device memory allocated until now; 0 on a CPU.
        host_peak_bytes: the process's largest resident memory until now.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    tokens_per_second: float
    step_seconds: float
    device_peak_bytes: int
    host_peak_bytes: int


@dataclass(frozen=True)
class EvalRow:
    """What one evaluation came to.

    Attributes:
        step: the optimizer steps done before it; 0 before the first.
        eval_loss: mean over what is held out, in nats per token or picture.
        accuracy: the share that was right, where there is right and wrong.
    """

    step: int
    eval_loss: float
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is more than a float holds."""
        try:
            return math.exp(self.eval_loss)
        except OverflowError:
            return math.inf


class _NotARowError(Exception):
    """A line is no row; the message says why, without saying where."""


def finite_or_none(value: float | None) -> float | None:
    """Return the number, or None where strict JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, each on the disk's side of this process before `write` returns.

    Args:
        path: the file; made if it is not there.

    Raises:
        RunFolderError: the file cannot be opened, or later written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if not path.exists():
                path.touch()
                FileOperations().sync_directory(path.parent)
            # Unbuffered: a row is one write, so a kill can tear no row but the last, and nothing is left to flush.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error

    def write(self, row: TrainRow | EvalRow) -> None:
        """Append one row."""
        self._append(_to_line(row))

    def sync(self) -> None:
        """Wait until the disk has all rows. Before a checkpoint that counts on them is declared whole."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunFolderError(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file. May be called again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise RunFolderError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_metrics(path: Path) -> tuple[list[TrainRow], list[EvalRow]]:
    """Read the rows of a run, in the file's order; a torn last line is left out.

    Raises:
        RunFolderError: the file cannot be read, or a line in it is no row; the message names the line.
    """
    rows = [row for row, _ in _read_rows(path)]
    return [row for row in rows if isinstance(row, TrainRow)], [row for row in rows if isinstance(row, EvalRow)]


def cut_after(path: Path, step: int, files: FileOperations | None = None) -> None:
    """Drop what a run wrote after the checkpoint it goes on from.

    Rows of later steps and a torn last line go; rows up to `step`, its evaluation included, stay as they are, byte
    for byte. The file is replaced whole or not at all, and a file that is not there is left so.

    Args:
        path: `metrics.jsonl`, which nobody has open.
        step: the optimizer steps the checkpoint holds; -1 to drop all rows where a run begins anew.
        files: what touches the disk.

    Raises:
        RunFolderError: the file cannot be read or written, or a line that is not the last is no row.
    """
    if not path.exists():
        return
    kept = b"".join(line for row, line in _read_rows(path) if row.step <= step)
    replace_file(path, kept, files)


def _to_line(row: TrainRow | EvalRow) -> bytes:
    record: dict[str, Any] = {name: finite_or_none(value) for name, value in asdict(row).items()}
    if isinstance(row, EvalRow) and row.accuracy is None:
        del record["accuracy"]
        record["perplexity"] = finite_or_none(row.perplexity)
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _read_rows(path: Path) -> list[tuple[TrainRow | EvalRow, bytes]]:
    """Return each row with its line, which always ends in a newline."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
    rows: list[tuple[TrainRow | EvalRow, bytes]] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = _to_row(line)
        except _NotARowError as error:
            # A kill tears the last line and no other: it lacks its end. Anything else was altered by somebody.
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise RunFolderError(f"{path} is damaged at line {number}: {error}; remove that line") from error
        rows.append((row, line if line.endswith(b"\n") else line + b"\n"))
    return rows


def _to_row(line: bytes) -> TrainRow | EvalRow:
    """Parse one line.

    Raises:
        _NotARowError: the line is no row.
    """
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _NotARowError("it is no JSON") from error
    if not isinstance(record, dict):
        raise _NotARowError("it is no JSON object")
    if "eval_loss" in record:
        accuracy = _number(record, "accuracy") if "accuracy" in record else None
        return EvalRow(step=_integer(record, "step"), eval_loss=_number(record, "eval_loss"), accuracy=accuracy)
    integers = {name: _integer(record, name) for name in ("step", "epoch", "device_peak_bytes", "host_peak_bytes")}
    numbers = {field.name: _number(record, field.name) for field in fields(TrainRow) if field.name not in integers}
    return TrainRow(**integers, **numbers)  # type: ignore[arg-type]  # a field is in the one dict or in the other


def _integer(record: dict[str, Any], name: str) -> int:
    value = _value(record, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _NotARowError(f"{name!r} must be an integer, but is {value!r}")
    return value


def _number(record: dict[str, Any], name: str) -> float:
    value = _value(record, name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _NotARowError(f"{name!r} must be a number, but is {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise _NotARowError(f"{name!r} is larger than any number measured") from error


def _value(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise _NotARowError(f"{name!r} is missing")
    return record[name]
