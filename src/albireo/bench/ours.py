"""Albireo as a case: the same code that `albireo train` runs, its loop, its data and its run folder included."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from albireo.bench.case import Case, CaseResult
from albireo.bench.timing import result_of
from albireo.distributed import join_world
from albireo.training.metrics import read_metrics
from albireo.training.plan import plan_run
from albireo.training.start import resolved_config, train_on_rank

__all__ = ["LEARNING_RATE", "measure_albireo", "options_of"]

# The references' too.
LEARNING_RATE = 5e-5


def options_of(case: Case) -> dict[str, Any]:
    """Return a case as options of `albireo train`."""
    options = {
        "model": case.model,
        "init": "random",
        "data": "random",
        **(case.ours or {}),
        "precision": case.precision,
        "tf32": case.tf32,
        "compile": case.compiled,
        "batch_size": case.batch_size,
        "checkpointing": case.checkpointing,
        "steps": case.warmup + case.steps,
        "eval_every": 0,
        "save_every": 0,
        "seed": case.seed,
        "learning_rate": LEARNING_RATE,
        "adapter": case.adapter,
        "mem_cap": case.mem_cap,
    }
    # Noise is no better for being cut.
    return options | ({"augment": False} if case.recipe == "vit" else {"sequence_length": case.sequence_length})


def measure_albireo(case: Case) -> CaseResult:
    """Train for the case's steps on random tokens or pictures, and take the steps' times from the run's own metrics.

    Args:
        case: what to measure.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-bench-") as name:
        plan = plan_run(recipe=case.recipe, options=options_of(case), output=Path(name) / "run")
        folder = plan.make_folder()
        world = join_world(single=True)
        peaks = train_on_rank(resolved_config(plan), folder, world, export_model=False)
        rows, _ = read_metrics(folder.metrics_path)
    seconds = [row.step_seconds for row in rows[case.warmup :]]
    return result_of(case, world.device, seconds, [row.loss for row in rows], peaks)
