"""Whole runs and verifications in this process, as cases for a pool of ranks too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.device import capture_random_state, restore_random_state
from albireo.distributed import World
from albireo.training.assemble import open_session
from albireo.training.loop import train_loop
from albireo.training.metrics import read_metrics
from albireo.training.recipes import recipe_of
from albireo.training.run_folder import RunFolder
from albireo.training.session import Session
from albireo.verify.run import _verify_on_rank

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
# Everything is at home on the host, and its device has room for little more than a chunk at a time.
AWAY = {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0, "mem_cap": 0.01}
PLUGINS = ("torch_ddp", "torch_ddp_fp16", "torch_fsdp", "low_level_zero", "gemini")


def config_of(recipe: str, options: dict[str, Any]) -> RunConfig:
    """Return a recipe's configuration on a CPU."""
    config = merge(RunConfig.of(recipe), options)
    return resolve(recipe_of(recipe).with_full_names(config), MachineFacts("cpu", 1, False))


def digest_of(session: Session) -> str:
    state = session.state
    parts = session.booster.plugin.export_state(state.model, state.optimizer, state.names, session.world)
    digests = sorted(
        f"{part.name} {hashlib.sha256(part.data.detach().numpy().tobytes()).hexdigest()}" for part in parts
    )
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def run_of(world: World, *, recipe: str, folder: str, options: dict[str, Any], stop_at: int = 0) -> dict[str, Any]:
    """Run, or go on with what lies in the folder, until the end or a stop in a step."""
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    path = Path(folder)
    if world.is_main and not (path / "config.json").exists():
        RunFolder.create(path)
    before = capture_random_state(CPU)
    try:
        world.barrier()
        with open_session(config_of(recipe, options), RunFolder(path, is_new=False), world) as session:
            begin = session.begin_step

            def begin_step() -> None:
                session.stop.requested = session.step + 1 == stop_at
                begin()

            session.begin_step = begin_step  # type: ignore[method-assign]
            status = train_loop(session)
            if status == "finished":
                session.finish(status)
            digest = digest_of(session) if world.world_size == 1 else ""
            return {"status": status, "step": session.step, "digest": digest}
    finally:
        restore_random_state(before, CPU)


def verified(world: World, *, recipe: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    flags = {**options, "eval_every": 0, "save_every": 0, "steps": 2, "warmup": 0.0, "gpus": world.world_size}
    if world.is_main:
        RunFolder.create(Path(folder))
    world.barrier()
    before = capture_random_state(CPU)
    try:
        report = _verify_on_rank(config_of(recipe, flags), RunFolder(Path(folder), is_new=False), world, 2)
    finally:
        restore_random_state(before, CPU)
    names = {parameter.name for step in report.steps for parameter in step.parameters}
    failures = [str(failure) for step in report.steps for failure in step.failures]
    return {"passed": report.passed, "worst": report.max_relative_error, "names": sorted(names), "failures": failures}


def losses(folder: Path) -> tuple[list[float], list[float]]:
    train, evaluations = read_metrics(folder / "metrics.jsonl")
    return [row.loss for row in train], [row.eval_loss for row in evaluations]
