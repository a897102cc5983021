"""The report for people: a table of the steps, a table of the worst parameters, and one line."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from albireo.verify.report import StepReport, VerifyReport

__all__ = ["print_report", "verdict"]

_SHOWN_PARAMETERS = 10
_SHOWN_FAILURES = 20


def print_report(report: VerifyReport, console: Console | None = None) -> None:
    """Print a report.

    Args:
        report: what a verification came to.
        console: where to; standard output if None.
    """
    console = console if console is not None else Console()
    ranks = "1 rank" if report.world_size == 1 else f"{report.world_size} ranks"
    console.print(f"{report.plugin}, {report.precision}, {ranks} on {report.device}", highlight=False)
    console.print(_step_table(report))
    console.print(_parameter_table(report))
    failures = [(step.step, failure) for step in report.steps for failure in step.failures]
    for number, failure in failures[:_SHOWN_FAILURES]:
        console.print(f"failed in step {number}: {failure}", highlight=False, markup=False, soft_wrap=True)
    if len(failures) > _SHOWN_FAILURES:
        console.print(f"and {len(failures) - _SHOWN_FAILURES} more failures", highlight=False)


def verdict(report: VerifyReport) -> str:
    """Return the report in one line: that all is well, or what failed first."""
    if report.passed:
        steps = sum(not step.skipped for step in report.steps)
        return (
            f"passed: {steps} steps; the worst gradient is off by {report.max_relative_error:.2g} "
            f"(allowed {report.thresholds.gradient:g}), each step is torch's own"
        )
    if report.first_failure is not None:
        step, failure = report.first_failure
        return f"verify failed in step {step}: {failure}"
    return "verify failed: every step was left out for an overflow, so no gradient was compared; take more --steps"


def _step_table(report: VerifyReport) -> Table:
    table = _table(
        "steps: how far the system is off", ("step", "loss", "off", "norm", "off", "gradient", "clip", "bits")
    )
    table.add_column("result", overflow="fold")
    allowed = report.thresholds
    for step in report.steps:
        table.add_row(
            str(step.step),
            _number(step.loss),
            _error(step.loss_error),
            _number(step.grad_norm),
            _error(step.norm_error),
            _error(None if step.worst is None else step.max_relative_error),
            _error(step.max_clip_error),
            "other" if any(parameter.step_mismatches for parameter in step.parameters) else "equal",
            _result(step),
        )
    table.add_section()
    limits = (allowed.gradient, allowed.norm, allowed.gradient, allowed.clip)
    loss, norm, gradient, clip = (_error(limit) for limit in limits)
    ulps = "equal" if allowed.step_ulps == 0 else f"{allowed.step_ulps} ulp"
    table.add_row("", "allowed", loss, "", norm, gradient, clip, ulps, "")
    return table


def _parameter_table(report: VerifyReport) -> Table:
    ranked = report.worst_by_parameter()
    shown = min(len(ranked), _SHOWN_PARAMETERS)
    title = f"parameters: the worst {shown} of {len(ranked)}, each in its worst step"
    table = _table(title, ())
    table.add_column("parameter", overflow="fold")
    for name in ("gradient", "clip", "bits off"):
        table.add_column(name, justify="right", no_wrap=True)
    for _, parameter in ranked[:shown]:
        table.add_row(
            parameter.name,
            _error(parameter.relative_error),
            _error(parameter.clip_error),
            f"{parameter.step_mismatches:,}",
        )
    return table


def _table(title: str, names: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _result(step: StepReport) -> str:
    if not step.passed:
        return "FAILED: " + ", ".join(dict.fromkeys(failure.check for failure in step.failures))
    return "ok, overflow" if step.skipped else "ok"


def _error(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.0e}"


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "-"
