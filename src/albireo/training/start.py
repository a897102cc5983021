"""From a plan to ranks: resolve the configuration, start as many processes as it asks for, and train on each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from albireo.checkpoint.names import find_checkpoints
from albireo.config import MachineFacts, RunConfig, config_from_mapping, config_to_mapping, resolve
from albireo.device import PeakReading, detect_device_type, device_count, has_native_bf16
from albireo.distributed import World, join_world, launch_ranks
from albireo.errors import AlbireoError, ConfigError
from albireo.training.assemble import open_session
from albireo.training.garbage import sparing_collector
from albireo.training.loop import train_loop
from albireo.training.plan import RunPlan
from albireo.training.recipes import recipe_of
from albireo.training.run_folder import RunFolder

__all__ = ["resolved_config", "start_run", "train_on_rank"]


def resolved_config(plan: RunPlan) -> RunConfig:
    """Return the plan's configuration with all defaults decided that this machine decides.

    Args:
        plan: what the user asked for.

    Raises:
        ConfigError: it cannot be done, or not on this machine.
    """
    facts = MachineFacts(detect_device_type(), device_count(), has_native_bf16())
    return resolve(recipe_of(plan.config.recipe).with_full_names(plan.config), facts)


def start_run(plan: RunPlan, folder: RunFolder) -> None:
    """Train as planned, in this process or in as many as the plan asks for.

    Args:
        plan: what the user asked for.
        folder: the run's folder. A new one is removed again if the run cannot even begin.

    Raises:
        AlbireoError: the input is wrong, memory does not suffice, or the user stopped the run.
    """
    try:
        config = resolved_config(plan)
        _refuse_changes(plan.begun, config, folder)
        if config.plugin.gpus > 1:
            payload = {"config": config_to_mapping(config), "folder": str(folder.path.resolve())}
            launch_ranks("albireo.training.start:train_in_rank", payload, config.plugin.gpus)
        else:
            train_on_rank(config, folder, join_world(single=True))
    except AlbireoError:
        folder.discard_if_not_begun()
        raise


def _refuse_changes(begun: RunConfig | None, config: RunConfig, folder: RunFolder) -> None:
    """Say at once, before text is tokenized and a model built, what a run's checkpoints cannot go on with.

    What else they do not go with is found when they are loaded: a path may be another and its content the same.
    """
    if begun is None or not folder.checkpoints_path.is_dir() or not find_checkpoints(folder.checkpoints_path):
        return
    recipe = recipe_of(config.recipe)
    first, fixed = recipe.fixed(begun), recipe.fixed(config)
    for flag, now in fixed.items():
        before = first[flag]
        if before is not None and now is not None and before != now:
            raise ConfigError(
                f"{flag} {now} cannot go on with the run in {folder.path}, which was begun with {before}: leave {flag} "
                "out, or begin a new run with another --output"
            )


def train_in_rank(world: World, payload: Mapping[str, Any]) -> None:
    """Train on one of several ranks that `start_run` has started.

    Args:
        world: the ranks.
        payload: the configuration and the folder.
    """
    config = config_from_mapping(
        payload["config"], where="the launcher", base=RunConfig.of(payload["config"]["recipe"])
    )
    train_on_rank(config, RunFolder.open(Path(payload["folder"])), world)


def train_on_rank(config: RunConfig, folder: RunFolder, world: World, *, export_model: bool = True) -> PeakReading:
    """Train on this rank, from the last whole checkpoint if there is one.

    Args:
        config: a resolved configuration.
        folder: the run's folder.
        world: the ranks.
        export_model: write the model as a Hugging Face folder at the end.

    Returns:
        The run's peaks of memory.

    Raises:
        Interrupted: the user stopped the run, which has been saved.
    """
    # The process is this run's own: what multiplies fp32 matrices is its own setting.
    torch.backends.cuda.matmul.allow_tf32 = config.plugin.tf32
    torch.backends.cudnn.allow_tf32 = config.plugin.tf32
    with open_session(config, folder, world) as session, session.out_of_memory_explained():
        with sparing_collector():
            status = train_loop(session)
        session.finish(status, export_model=export_model)
        return session.booster.plugin.peaks(world.device).read()
