"""Many cases: run in turn, said row by row, kept in `bench.json`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from albireo.bench.case import Case, CaseResult
from albireo.bench.measure import measure
from albireo.errors import RunFolderError

__all__ = ["combine", "run_cases"]


def run_cases(cases: Sequence[Case], *, rounds: int, output: Path | None) -> list[CaseResult]:
    """Measure cases one after another, `rounds` times over, so that a machine's drift falls on all alike.

    Args:
        cases: what to measure.
        rounds: how often each.
        output: the folder for `bench.json`; `runs/bench-TIME` if None.

    Returns:
        A result a case: the median over its rounds.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    folder = output if output is not None else Path("runs") / f"bench-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot make {folder}: {error.strerror or error}") from error
    results: list[list[CaseResult]] = [[] for _ in cases]
    for turn in range(rounds):
        for index, case in enumerate(cases):
            result = measure(case)
            results[index].append(result)
            _say(result, turn, rounds)
            combined = [combine(measured) for measured in results if measured]
            _write(folder / "bench.json", combined)
    combined = [combine(measured) for measured in results]
    _print_table(combined)
    print(f"results  {folder / 'bench.json'}")  # noqa: T201  the command's result
    return combined


def combine(results: Sequence[CaseResult]) -> CaseResult:
    """Return one result of several of the same case: medians of speed, the most memory, the spread of all.

    Args:
        results: at least one; if any failed, the failure is the result.
    """
    failed = next((result for result in results if result.status != "ok"), None)
    if failed is not None or len(results) == 1:
        return failed if failed is not None else results[0]

    def values(name: str) -> list[Any]:
        return [getattr(result, name) for result in results]

    seconds = statistics.median(values("step_seconds"))
    case = results[0].case
    return dataclasses.replace(
        results[0],
        step_seconds=seconds,
        step_seconds_min=min(values("step_seconds_min")),
        step_seconds_max=max(values("step_seconds_max")),
        samples_per_second=case.batch_size / seconds,
        tokens_per_second=case.batch_size * case.sequence_length / seconds,
        **{name: max(values(name)) for name in ("device_peak_bytes", "device_reserved_peak_bytes", "host_peak_bytes")},
    )


def _write(path: Path, results: Sequence[CaseResult]) -> None:
    machine = next((result.versions for result in results if result.versions), {})
    content = {
        "machine": machine,
        "command": shlex.join(["albireo", *sys.argv[1:]]),
        "date": f"{datetime.now().astimezone():%Y-%m-%d}",
        "rows": [result.row() for result in results],
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error


def _name(case: Case) -> str:
    adapter = "" if case.adapter == "none" else f" {case.adapter}"
    return f"{case.system} {case.recipe} {case.model}{adapter} batch {case.batch_size} {case.precision}"


def _say(result: CaseResult, turn: int, rounds: int) -> None:
    text = f"{_name(result.case)}: {result.status}"
    if result.samples_per_second is not None:
        memory = (result.device_peak_bytes or result.host_peak_bytes or 0) / 2**30
        text += f", {result.samples_per_second:.1f} samples/s, {memory:.2f} GB"
    if result.error:
        text += f" ({result.error})"
    print(text + (f"  [round {turn + 1} of {rounds}]" if rounds > 1 else ""), flush=True)  # noqa: T201  progress


def _print_table(results: Sequence[CaseResult]) -> None:
    table = Table(
        "system", "model", "adapter", "batch", "precision", "samples/s", "step ms", "device GB", "host GB", "status"
    )
    for result in results:
        table.add_row(
            result.case.system,
            result.case.model,
            result.case.adapter,
            str(result.case.batch_size),
            result.case.precision,
            _number(result.samples_per_second, 1.0),
            _number(result.step_seconds, 1e3),
            _number(result.device_peak_bytes, 2**-30),
            _number(result.host_peak_bytes, 2**-30),
            result.status,
        )
    Console().print(table)


def _number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.2f}"
