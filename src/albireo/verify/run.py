"""From a recipe's flags to a report: the run that `albireo train` would make, watched for its first steps."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from albireo.adapters import own_names
from albireo.config import RunConfig, config_from_mapping, config_to_mapping
from albireo.data import AnyBatch
from albireo.device import describe_device
from albireo.distributed import World, join_world, launch_ranks
from albireo.errors import ConfigError, Interrupted
from albireo.optim import adamw, decay_groups
from albireo.training.assemble import build_model, open_session
from albireo.training.plan import plan_run
from albireo.training.recipe import TaskModel
from albireo.training.run_folder import RunFolder
from albireo.training.session import Session
from albireo.training.start import resolved_config
from albireo.verify.report import StepReport, VerifyReport
from albireo.verify.verifier import Verifier

__all__ = ["DEFAULT_STEPS", "verify_in_rank", "verify_recipe"]

DEFAULT_STEPS = 3
# In fp16 the first scales may be too high, and a step that is left out compares no gradient.
_MOST_SKIPPED = 40
# Times any gradient that is not all zeros, beyond what fp16 holds; times a loss, well within fp32.
_OVERFLOWING_SCALE = 2.0**60


def verify_recipe(recipe: str, options: Mapping[str, Any], *, config_file: Path | None = None) -> VerifyReport:
    """Verify the first steps of a run, in this process or on as many ranks as it asks for. Nothing is left on the disk.

    Args:
        recipe: what is trained.
        options: the flags of `albireo train` by name. `steps` is how many are verified, and how long the run is; without
            it the run is as long as it would be, and `DEFAULT_STEPS` are verified.
        config_file: a JSON configuration.

    Returns:
        What it came to. In fp16, steps that are left out for an overflow come on top, and at the end one that is
        provoked.

    Raises:
        AlbireoError: the input is wrong, memory does not suffice, or the user stopped it.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-verify-") as name:
        plan = plan_run(recipe=recipe, options=options, config_file=config_file, output=Path(name) / "run")
        config = _prepared(resolved_config(plan))
        folder = plan.make_folder()
        steps = options.get("steps")
        if config.plugin.gpus == 1:
            return _verify_on_rank(config, folder, join_world(single=True), steps)
        payload = {"config": config_to_mapping(config), "folder": str(folder.path.resolve()), "steps": steps}
        launch_ranks("albireo.verify.run:verify_in_rank", payload, config.plugin.gpus)
        return VerifyReport.from_message(json.loads(_report_path(folder).read_text()))


def verify_in_rank(world: World, payload: Mapping[str, Any]) -> None:
    """Verify on one of several ranks that `verify_recipe` has started.

    Args:
        world: the ranks.
        payload: the configuration, the run folder, and how many steps.
    """
    config = config_from_mapping(
        payload["config"], where="the launcher", base=RunConfig.of(payload["config"]["recipe"])
    )
    folder = RunFolder.open(Path(payload["folder"]))
    report = _verify_on_rank(config, folder, world, payload["steps"])
    if world.is_main:
        _report_path(folder).write_text(json.dumps(report.to_message()))


def _prepared(config: RunConfig) -> RunConfig:
    """Take out what a verification has no use for, and refuse what it cannot judge."""
    if config.drops_out:
        flag = f"--dropout {config.model.dropout:g}"
        if not config.model.dropout > 0:
            flag = f"--lora-dropout {config.adapter.lora_dropout:g}"
        raise ConfigError(f"{flag} draws other masks in the system than in the reference: leave it out")
    schedule = dataclasses.replace(config.schedule, eval_every=0, save_every=0)
    return dataclasses.replace(config, schedule=schedule)


def _report_path(folder: RunFolder) -> Path:
    return folder.path / "verify.json"


def _verify_on_rank(config: RunConfig, folder: RunFolder, world: World, steps: int | None) -> VerifyReport:
    # As in training; fp32 itself is verified without TF32.
    torch.backends.cuda.matmul.allow_tf32 = config.plugin.tf32
    torch.backends.cudnn.allow_tf32 = config.plugin.tf32
    with open_session(config, folder, world) as session, session.out_of_memory_explained():
        verifier = Verifier(
            session.booster, session.model, session.optimizer, _reference_factory(session), names_of=_family_names
        )
        wanted = session.steps if steps is not None else min(DEFAULT_STEPS, session.steps)
        with session.progress.task("verifying", wanted) as task:
            reports = []
            judged = 0
            for report in _steps(session, verifier, wanted):
                reports.append(report)
                judged += not report.skipped
                if not report.skipped and judged <= wanted:
                    task.advance()
        plugin = session.booster.plugin
        device = describe_device(world.device)
        return VerifyReport(
            plugin.name, plugin.precision, world.world_size, device, verifier.thresholds, tuple(reports)
        )


def _steps(session: Session, verifier: Verifier, wanted: int) -> Iterator[StepReport]:
    """Make steps until so many were not left out, and in fp16 one more that overflows."""
    judged = 0
    for micro_batches in _all_batches(session, wanted + _MOST_SKIPPED):
        _refuse_to_go_on(session)
        before = session.optimizer.scaler_state()
        if judged == wanted:
            session.optimizer.load_scaler_state({**before, "scale": _OVERFLOWING_SCALE})
        yield (report := _step(session, verifier, micro_batches))
        if judged == wanted:
            session.optimizer.load_scaler_state(before)
            return
        judged += not report.skipped
        if judged == wanted and not before:
            return


def _step(session: Session, verifier: Verifier, micro_batches: list[list[AnyBatch]]) -> StepReport:
    return verifier.step(
        [[session.recipe.inputs(batch) for batch in of_rank] for of_rank in micro_batches],
        [[batch.tokens for batch in of_rank] for of_rank in micro_batches],
        lr_scheduler=session.scheduler,
        max_norm=session.config.optimizer.clip,
    )


def _all_batches(session: Session, steps: int) -> Iterator[list[list[AnyBatch]]]:
    """Yield the micro-batches of each step: by rank, then in order."""
    loaders = [
        session.data.steps(
            dataclasses.replace(session.layout, rank=rank),
            seed=session.config.schedule.seed,
            steps=steps,
            # Only what this rank trains on goes the way that it goes in training.
            pin=session.world.device.type == "cuda" and rank == session.world.rank,
        )
        for rank in range(session.world.world_size)
    ]
    for of_ranks in zip(*loaders, strict=True):
        yield list(of_ranks)


def _refuse_to_go_on(session: Session) -> None:
    """Stop on all ranks if the user asked one to."""
    asked = session.world.gather_numbers([float(session.stop.requested)])
    if any(number for (number,) in asked):
        raise Interrupted("stopped before all steps were verified")


def _family_names(module: nn.Module) -> Mapping[torch.Tensor, str]:
    if not isinstance(module, TaskModel):
        raise TypeError(f"expected the model wrapper, not {type(module).__name__}")
    return own_names(module.pretrained)[0]


def _reference_factory(session: Session) -> Any:
    config = session.config

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        planned = session.recipe.plan(config).fetched(config)
        # The same kernels as the system's: what is judged is the plugin, not the compiler.
        model, _, _ = build_model(config, session.recipe, planned, session.data, torch.device("cpu"))
        groups = decay_groups(model.pretrained.named_parameters(), config.optimizer.weight_decay)
        return model, adamw(groups, config.optimizer.learning_rate or 0.0)

    return build
