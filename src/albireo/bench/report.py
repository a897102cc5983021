"""Many cases: run in turn, said row by row, kept round by round, and shown as tables, pictures and a page."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from albireo.bench.case import Case, CaseResult, name_of
from albireo.bench.kept_rounds import KeptRounds
from albireo.bench.measure import measure
from albireo.bench.memory_curves import draw_memory
from albireo.bench.page import page_of
from albireo.bench.pictures import draw
from albireo.bench.table import HEADERS, as_csv, as_markdown, ratios, rows_of_words, scaling
from albireo.errors import RunFolderError
from albireo.training.run_folder import replace_file

__all__ = ["combine", "run_cases"]

_NOT_IN_TERMINAL = frozenset({"tokens/s", "spread", "TFLOP/s", "reserved GB", "moved GB"})
_SAID_IF_DIFFERENT = frozenset({"model", "adapter", "GPUs"})


def run_cases(cases: Sequence[Case], *, rounds: int, output: Path | None, reference: str) -> list[CaseResult]:
    """Measure cases one after another, `rounds` times over, so that a machine's drift falls on all alike.

    Args:
        cases: what to measure.
        rounds: how often each. Rounds that the folder holds already are not measured again.
        output: the folder for results; `runs/bench-TIME` if None.
        reference: the system whose speed is 1.

    Returns:
        A result a case: the median over its rounds.

    Raises:
        ConfigError: the folder's rounds are of another machine.
        RunFolderError: the folder cannot be read or written.
    """
    folder = output if output is not None else Path("runs") / f"bench-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot make {folder}: {error.strerror or error}") from error
    kept = KeptRounds(folder / "rounds.jsonl")
    results = [kept.of(case)[:rounds] for case in cases]
    there = sum(len(measured) for measured in results)
    if there:
        _print(f"{there} of {rounds * len(cases)} rounds are in {folder} already")
    left, began, done = rounds * len(cases) - there, time.monotonic(), 0
    for turn in range(rounds):
        for index, case in enumerate(cases):
            if turn < len(results[index]):
                continue
            result = measure(case)
            kept.add(result)
            results[index].append(result)
            done += 1
            _say(result, turn, rounds, (time.monotonic() - began) / done * (left - done))
            _write(folder / "bench.json", [combine(measured) for measured in results if measured], reference)
    combined = [combine(measured) for measured in results]
    _write(folder / "bench.json", combined, reference)
    _print_table(combined, reference)
    for path in _write_pictures(folder, combined, reference):
        _print(f"{path.suffix[1:]:<8} {path}")
    _print(f"results  {folder / 'bench.json'}")
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
        samples_per_second=case.samples_per_second(seconds),
        tokens_per_second=case.tokens_per_second(seconds),
        model_tflops=_scaled(results[0].model_tflops, (results[0].step_seconds or seconds) / seconds),
        rounds=len(results),
        **{name: max(values(name)) for name in ("device_peak_bytes", "device_reserved_peak_bytes", "host_peak_bytes")},
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _machine(results: Sequence[CaseResult]) -> dict[str, str]:
    return next((result.versions for result in results if result.versions), {})


def _command() -> str:
    return shlex.join(["albireo", *sys.argv[1:]])


def _today() -> str:
    return f"{datetime.now().astimezone():%Y-%m-%d}"


def _write(path: Path, results: Sequence[CaseResult], reference: str) -> None:
    content = {
        "machine": _machine(results),
        "command": _command(),
        "date": _today(),
        "reference": reference,
        "rows": [
            result.row() | {"ratio": ratio, "scaling": scaling(result, results)}
            for result, ratio in zip(results, ratios(results, reference), strict=True)
        ],
    }
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _write_pictures(folder: Path, results: Sequence[CaseResult], reference: str) -> list[Path]:
    """Write all forms but JSON, and return what a person would open."""
    memory = draw_memory(results)
    pictures = draw(results) + ([] if memory is None else [memory])
    page = page_of(results, pictures, machine=_machine(results), command=_command(), date=_today(), reference=reference)
    files: dict[str, bytes] = {
        "bench.md": as_markdown(results, reference).encode(),
        "bench.csv": as_csv(results, reference).encode(),
        "report.html": page.encode(),
    }
    for picture in pictures:
        files[f"{picture.name}.png"], files[f"{picture.name}.svg"] = picture.png, picture.svg.encode()
    for name, content in files.items():
        replace_file(folder / name, content)
    return [folder / name for name in files if name.endswith((".png", ".html"))]


def _say(result: CaseResult, turn: int, rounds: int, seconds_left: float) -> None:
    text = f"{name_of(result.case.mapping())}: {result.status}"
    if result.samples_per_second is not None:
        memory = (result.device_peak_bytes or result.host_peak_bytes or 0) / 2**30
        text += f", {result.samples_per_second:.1f} samples/s, {memory:.2f} GB"
    if result.error:
        text += f" ({result.error})"
    text += f"  [round {turn + 1} of {rounds}]" if rounds > 1 else ""
    minutes, seconds = divmod(round(seconds_left), 60)
    _print(text + (f"  about {minutes}:{seconds:02} left" if seconds_left > 0 else ""))


def _print_table(results: Sequence[CaseResult], reference: str) -> None:
    words = [(*row[:-1], result.status) for row, result in zip(rows_of_words(results, reference), results, strict=True)]
    # A terminal has 80 columns: the other forms have the rest, and what is the same for all.
    shown = [
        at
        for at, name in enumerate(HEADERS)
        if name not in _NOT_IN_TERMINAL
        and any(row[at] for row in words)
        and (name not in _SAID_IF_DIFFERENT or len({row[at] for row in words}) > 1)
    ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for at in shown:
        table.add_column(HEADERS[at], justify="left" if at == 0 else "right", no_wrap=at == 0, overflow="fold")
    for row in words:
        table.add_row(*(row[at] for at in shown))
    Console().print(table)


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201  progress, and the command's result
