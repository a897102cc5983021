"""What a run came to: `summary.json`, and the table printed at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, TextIO

from albireo.adapters import ADAPTER_FILE
from albireo.device import PeakReading
from albireo.training.metrics import EvalRow, TrainRow, finite_or_none
from albireo.training.progress import format_bytes, format_duration, format_quality
from albireo.training.run_folder import RunFolder

__all__ = ["RunFacts", "print_summary", "summarise"]

_LAST_STEPS = 20


@dataclass(frozen=True)
class RunFacts:
    """What a summary says that the rows of a run do not know.

    Attributes:
        status: whether all steps were done, or the user stopped the run before.
        model: the model's name.
        parameters: how many numbers the model has, an adapter's too; tied weights count once.
        plugin: the plugin's name.
        precision: the precision's name.
        device: the device's name.
        world_size: how many ranks trained.
        total_seconds: how long this process took, from start to end; not what came before a resume.
        compile_seconds: how much longer this process's first step took for compiling; None if it compiled nothing.
        trained_parameters: how many of the parameters are trained; all if None.
        memory_before: memory with model and optimizer in place, before the first step; None if nobody looked.
        memory_after: memory after the last step; None if nobody looked.
        plan: what the plugin has decided about memory, as JSON values; None: nothing.
    """

    status: Literal["finished", "interrupted"]
    model: str
    parameters: int
    plugin: str
    precision: str
    device: str
    world_size: int
    total_seconds: float
    compile_seconds: float | None = None
    trained_parameters: int | None = None
    memory_before: PeakReading | None = None
    memory_after: PeakReading | None = None
    plan: Mapping[str, Any] | None = None


def summarise(
    train_rows: Sequence[TrainRow], eval_rows: Sequence[EvalRow], facts: RunFacts, folder: RunFolder
) -> dict[str, Any]:
    """Gather a run's summary. Pure: it reads no file and no clock.

    Rates and the step time are medians, which the slow first step and a checkpoint on the way do not move. All is over
    the whole run but `total_seconds` and `compile_seconds`, which are those of the process that wrote the summary:
    `training_seconds` adds up all steps, those before a resume too. Numbers that are not finite, or that there is nothing
    to make of, are None.

    Args:
        train_rows: by step.
        eval_rows: by step.
        facts: what the rows do not know.
        folder: where the run lies.

    Returns:
        What `summary.json` holds: names as in `metrics.jsonl`, paths relative to the run folder, which may be moved.
    """
    losses = [row.loss for row in train_rows]
    last_losses = [loss for loss in losses[-_LAST_STEPS:] if math.isfinite(loss)]
    finite_evals = [row for row in eval_rows if math.isfinite(row.eval_loss)]
    best = min(finite_evals, key=lambda row: row.eval_loss, default=None)
    return {
        "status": facts.status,
        "model": facts.model,
        "parameters": facts.parameters,
        "trained_parameters": facts.parameters if facts.trained_parameters is None else facts.trained_parameters,
        "plugin": facts.plugin,
        "precision": facts.precision,
        "device": facts.device,
        "world_size": facts.world_size,
        "steps": train_rows[-1].step if train_rows else 0,
        "epochs": train_rows[-1].epoch if train_rows else 0,
        "train_loss": fmean(last_losses) if last_losses else None,
        "train_loss_steps": len(last_losses),
        "non_finite_steps": sum(not math.isfinite(loss) for loss in losses),
        "first_eval": _evaluation(eval_rows[0] if eval_rows else None),
        "last_eval": _evaluation(eval_rows[-1] if eval_rows else None),
        "best_eval": _evaluation(best),
        "step_seconds": _median(train_rows, lambda row: row.step_seconds),
        "samples_per_second": _median(train_rows, lambda row: row.samples_per_second),
        "tokens_per_second": _median(train_rows, lambda row: row.tokens_per_second),
        "training_seconds": math.fsum(row.step_seconds for row in train_rows if math.isfinite(row.step_seconds)),
        "compile_seconds": finite_or_none(facts.compile_seconds),
        "total_seconds": finite_or_none(facts.total_seconds),
        "device_peak_bytes": max((row.device_peak_bytes for row in train_rows), default=0),
        "host_peak_bytes": max((row.host_peak_bytes for row in train_rows), default=0),
        "memory_before": _memory(facts.memory_before),
        "memory_after": _memory(facts.memory_after),
        "device_reserved_peak_bytes": 0
        if facts.memory_after is None
        else facts.memory_after.device_reserved_peak_bytes,
        "plan": None if facts.plan is None else dict(facts.plan),
        "loss_plot_path": folder.loss_plot_path.name,
        **_what_was_written(folder),
    }


def print_summary(summary: Mapping[str, Any], folder: RunFolder, stream: TextIO) -> None:
    """Print a summary as a table of two columns, and then where the plot and the model are.

    Only files that exist are named, so that the last lines can be relied on.

    Args:
        summary: as `summarise` made it.
        folder: where the run lies.
        stream: where to print; only spaces lay the table out unless it is a terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file has no width: lines there are as long as what they say.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in _lines(summary):
        table.add_row(Text(name), Text(value))
    with console.capture() as capture:
        console.print(Text(f"run {summary['status']}", style="bold"))
        console.print(table)
        for name, path in _places(folder):
            # As one unbroken line each, however long: a path is there to be copied.
            console.print(Text(f"{name}  {path}"), soft_wrap=True)
    # The table fills its last column with spaces.
    stream.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
    stream.flush()


def _evaluation(row: EvalRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    quality = {"accuracy": row.accuracy} if row.accuracy is not None else {"perplexity": finite_or_none(row.perplexity)}
    return {"step": row.step, "eval_loss": finite_or_none(row.eval_loss), **quality}


def _memory(reading: PeakReading | None) -> dict[str, int] | None:
    if reading is None:
        return None
    names = ("device_bytes", "device_reserved_bytes", "host_bytes")
    return {name: getattr(reading, name) for name in names}


def _what_was_written(folder: RunFolder) -> dict[str, Any]:
    """Return the path of the model; where an adapter was trained, the adapter's, and its file's size."""
    file = folder.adapter_path / ADAPTER_FILE
    if file.is_file():
        return {"adapter_path": folder.adapter_path.name, "adapter_bytes": file.stat().st_size}
    return {"model_path": folder.model_path.name}


def _median(rows: Sequence[TrainRow], of: Callable[[TrainRow], float]) -> float | None:
    values = [value for value in map(of, rows) if math.isfinite(value)]
    return median(values) if values else None


def _lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("model", f"{summary['model']}, {_count(summary['parameters'])} parameters"),
        *_trained_lines(summary),
        ("trained with", f"{summary['plugin']}, {summary['precision']}, {_ranks(summary)}"),
        ("steps", f"{summary['steps']:,}, {_plural(summary['epochs'], 'epoch')}"),
    ]
    if summary["train_loss"] is not None:
        steps = summary["train_loss_steps"]
        lines.append(("training loss", f"{summary['train_loss']:.3f} (mean of the last {_plural(steps, 'step')})"))
    if summary["non_finite_steps"]:
        lines.append(("not finite", f"the loss of {_plural(summary['non_finite_steps'], 'step')}"))
    lines += [
        (f"evaluation, {name}", _evaluation_text(summary[f"{name}_eval"]))
        for name in ("first", "last", "best")
        if summary[f"{name}_eval"] is not None
    ]
    if summary["step_seconds"] is not None:
        lines.append(("step time", f"{summary['step_seconds']:.3g} s (median)"))
    if summary["samples_per_second"] is not None and summary["tokens_per_second"] is not None:
        rates = f"{summary['samples_per_second']:,.4g} samples/s"
        if not math.isclose(summary["tokens_per_second"], summary["samples_per_second"], rel_tol=1e-6):
            rates += f", {summary['tokens_per_second']:,.0f} tokens/s"
        lines.append(("speed", rates))
    if summary["compile_seconds"] is not None:
        lines.append(("compiling", f"{summary['compile_seconds']:.3g} s"))
    if summary["total_seconds"] is not None:
        lines.append(("total time", _times(summary["training_seconds"], summary["total_seconds"])))
    lines += _memory_lines(summary)
    if "adapter_bytes" in summary:
        lines.append(("adapter file", f"{summary['adapter_bytes'] / 2**20:,.2f} MB"))
    return lines


def _trained_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    trained, parameters = summary["trained_parameters"], summary["parameters"]
    if trained == parameters:
        return []
    return [("trained", f"{trained:,} of {parameters:,} parameters ({100 * trained / parameters:.4f}%)")]


def _memory_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return memory before the first step, after the last and at the peak: a device's, allocated and reserved, or the host's."""
    lines = []
    on_device = bool(summary["device_peak_bytes"])
    for when in ("before", "after"):
        memory = summary[f"memory_{when}"]
        if memory is None:
            continue
        if on_device:
            reserved = format_bytes(memory["device_reserved_bytes"])
            text = f"{format_bytes(memory['device_bytes'])} allocated, {reserved} reserved"
            lines.append((f"device memory, {when}", text))
        elif memory["host_bytes"]:
            lines.append((f"host memory, {when}", format_bytes(memory["host_bytes"])))
    if on_device:
        reserved = summary["device_reserved_peak_bytes"]
        more = f" allocated, {format_bytes(reserved)} reserved" if reserved else ""
        lines.append(("device memory, peak", format_bytes(summary["device_peak_bytes"]) + more))
    lines.append(("host memory, peak", format_bytes(summary["host_peak_bytes"])))
    return lines


def _places(folder: RunFolder) -> list[tuple[str, Path]]:
    places = [
        ("loss plot", folder.loss_plot_path),
        ("accuracy ", folder.accuracy_plot_path),
        ("examples ", folder.predictions_path),
        ("mix-ups  ", folder.confusion_path),
        ("model    ", folder.model_path),
        ("adapter  ", folder.adapter_path),
    ]
    return [(name, path) for name, path in places if path.exists()]


def _evaluation_text(evaluation: Mapping[str, Any]) -> str:
    if evaluation["eval_loss"] is None:
        return f"loss not finite (step {evaluation['step']:,})"
    row = EvalRow(evaluation["step"], evaluation["eval_loss"], evaluation.get("accuracy"))
    return f"loss {row.eval_loss:.3f}, {format_quality(row)} (step {row.step:,})"


def _times(training_seconds: float, total_seconds: float) -> str:
    steps, total = format_duration(training_seconds), format_duration(total_seconds)
    if training_seconds <= total_seconds:
        return f"{total}, of which {steps} in steps"
    return f"{total} since it went on; {steps} in steps of the whole run"


def _ranks(summary: Mapping[str, Any]) -> str:
    return summary["device"] if summary["world_size"] == 1 else f"{summary['world_size']} ranks on {summary['device']}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _count(number: int) -> str:
    """Write a count as people say model sizes: 124M, 6.66B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
