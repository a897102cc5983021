"""Run a case in a process of its own: a crash or an out-of-memory is a result, not the end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from albireo.bench.case import Case, CaseResult

__all__ = ["measure"]

_ERRORS = "errors.txt"


def measure(case: Case, *, timeout_seconds: float = 600.0) -> CaseResult:
    """Measure a case.

    Args:
        case: what to measure.
        timeout_seconds: after which it counts as failed.

    Returns:
        What it came to, whatever happened.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-case-") as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(case.mapping()))
        child = _context().Process(target=_run, args=(name,))
        child.start()
        try:
            child.join(timeout_seconds)
            if child.exitcode is None:
                return CaseResult(case, "failed", error=f"not done after {timeout_seconds:g} s")
        finally:
            # Also where this process is interrupted. What the case has started itself ends with it.
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                # It may have had no session of its own yet.
                child.kill()
            child.join()
        result = folder / "result.json"
        if result.exists():
            return _read(case, json.loads(result.read_text()))
        errors = folder / _ERRORS
        lines = [line for line in errors.read_text().splitlines() if line.strip()] if errors.exists() else []
        reason = lines[-1] if lines else "without a word"
        return CaseResult(case, "failed", error=f"ended with exit code {child.exitcode}: {reason}")


def _context() -> ForkServerContext:
    """Return what makes processes: forked from one that has imported all, and has never touched a GPU."""
    context = multiprocessing.get_context("forkserver")
    # Once only: the process that is there already keeps what it has.
    context.set_forkserver_preload(["albireo.bench.preload"])
    return context


def _run(name: str) -> None:
    """Measure the case in a folder; runs in a process of its own, and in a session of its own."""
    os.setsid()
    with Path(os.devnull).open("w") as nowhere, (Path(name) / _ERRORS).open("w") as errors:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    from albireo.bench.worker import main

    main(Path(name))


def _read(case: Case, values: dict[str, Any]) -> CaseResult:
    values.pop("case", None)
    return CaseResult(case=case, **values)
