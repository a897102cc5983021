"""Albireo as a case: the same code that `albireo train` runs, its loop, its data and its run folder included."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from albireo.bench.case import Case, CaseResult
from albireo.bench.timing import result_of
from albireo.config import RunConfig
from albireo.distributed import World
from albireo.memory.tracing import Timeline, read_trace
from albireo.memory.tracing.tracer import STEPS_TO_TRACE
from albireo.training.metrics import read_metrics
from albireo.training.plan import plan_run
from albireo.training.run_folder import RunFolder
from albireo.training.start import resolved_config, train_on_rank

__all__ = ["LEARNING_RATE", "measure_albireo", "options_of", "plan_albireo"]

_MOST_MOMENTS = 240
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
        "gpus": case.gpus,
        "trace": case.plugin == "gemini" and case.warmup + case.steps >= STEPS_TO_TRACE,
    }
    # Noise is no better for being cut.
    return options | ({"augment": False} if case.recipe == "vit" else {"sequence_length": case.sequence_length})


def plan_albireo(case: Case, folder: Path) -> tuple[RunConfig, RunFolder]:
    """Make the run of a case: its configuration, and its folder.

    Args:
        case: what to measure.
        folder: where the run's folder is made.
    """
    plan = plan_run(recipe=case.recipe, options=options_of(case), output=folder / "run")
    made = plan.make_folder()
    return resolved_config(plan), made


def measure_albireo(case: Case, config: RunConfig, folder: RunFolder, world: World) -> CaseResult:
    """Train for the case's steps on random tokens or pictures, and take the steps' times from the run's own metrics.

    Args:
        case: what to measure.
        config: the run, as `plan_albireo` has made it.
        folder: its folder.
        world: the ranks, which all call this.
    """
    peaks = train_on_rank(config, folder, world, export_model=False)
    # The main rank has written them by now.
    world.barrier()
    rows, _ = read_metrics(folder.metrics_path)
    seconds = [row.step_seconds for row in rows[case.warmup :]]
    result = result_of(case, world, seconds, [row.loss for row in rows], peaks)
    plan = json.loads(folder.summary_path.read_text())["plan"]
    return dataclasses.replace(
        result,
        moved_bytes=None if plan is None else plan["traffic_bytes"],
        memory_over_step=_memory_over_step(read_trace(folder.path)) if config.plugin.trace else [],
    )


def _memory_over_step(timeline: Timeline) -> list[list[float]]:
    """Return moments of a step, no more than a picture can show."""
    every = -(-len(timeline.memory) // _MOST_MOMENTS)
    # Between those that are left out the device may have had more.
    return [
        [readings[0].seconds, max(reading.device_bytes for reading in readings), readings[0].host_bytes]
        for first in range(0, len(timeline.memory), every)
        if (readings := timeline.memory[first : first + every])
    ]
