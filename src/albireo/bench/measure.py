"""Run a case in a process of its own: a crash or an out-of-memory is a result, not the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from albireo.bench.case import Case, CaseResult

__all__ = ["measure"]


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
        command = [sys.executable, "-m", "albireo.bench.worker", str(folder)]
        # A session of its own, so that what the case has started itself ends with it.
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as child:
            try:
                _, errors = child.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                return CaseResult(case, "failed", error=f"not done after {timeout_seconds:g} s")
            finally:
                # Also where this process is interrupted.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        result = folder / "result.json"
        if result.exists():
            return _read(case, json.loads(result.read_text()))
        lines = [line for line in errors.splitlines() if line.strip()]
        reason = lines[-1] if lines else "without a word"
        return CaseResult(case, "failed", error=f"ended with exit code {child.returncode}: {reason}")


def _read(case: Case, values: dict[str, Any]) -> CaseResult:
    values.pop("case", None)
    return CaseResult(case=case, **values)
