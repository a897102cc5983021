"""Put a run together: data, model, plugin, optimizer, schedule, and the checkpoint it goes on from."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from transformers import PreTrainedModel

from albireo.adapters import count_weights, own_names
from albireo.booster import Booster
from albireo.checkpoint import Checkpoint, newest_whole, open_checkpoint, tidy
from albireo.config import RunConfig, config_to_mapping
from albireo.data import BatchLayout, steps_for
from albireo.device import (
    apply_device_cap,
    attention_for_many_shapes,
    describe_device,
    device_room_bytes,
    device_total_bytes,
    read_host_memory,
    seed_everything,
)
from albireo.distributed import World, process_group
from albireo.errors import CheckpointError, ConfigError
from albireo.files import FileOperations
from albireo.memory.tracing.tracer import STEPS_TO_TRACE
from albireo.models import ActivationRoom, Family, KeptBlocks, compile_blocks, enable_activation_checkpointing
from albireo.optim import adamw, decay_groups, scheduler_for, warmup_steps_of
from albireo.plugins import ModelWrapper, Plugin, make_plugin
from albireo.sharding import WeightSource
from albireo.training.memory_needs import check_states_fit, explain_out_of_memory_at_start, is_out_of_memory
from albireo.training.metrics import MetricsWriter, cut_after
from albireo.training.progress import Progress
from albireo.training.recipe import ModelPlan, Recipe, RunData, TaskModel
from albireo.training.recipes import recipe_of
from albireo.training.recorder import Recorder
from albireo.training.run_folder import RunFolder
from albireo.training.saving import Position, RunState
from albireo.training.session import Session
from albireo.training.state_bytes import Memory
from albireo.training.stop import StopRequest

__all__ = ["build_model", "open_session"]


@contextmanager
def open_session(
    config: RunConfig, folder: RunFolder, world: World, *, files: FileOperations | None = None
) -> Iterator[Session]:
    """Make a run ready, from its newest whole checkpoint if it has one, and clear up after it.

    Args:
        config: a configuration that `resolve` has been over.
        folder: the run's folder.
        world: the ranks.
        files: writes to the disk; another one in tests.

    Raises:
        AlbireoError: something the user can mend.
    """
    files = files if files is not None else FileOperations()
    _check_nothing_is_open(config)
    recipe = recipe_of(config.recipe)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(enabled=world.is_main))
        if world.is_main:
            stack.enter_context(folder.lock())
        # The main rank has the lock, or has raised, before any other rank touches the folder.
        world.barrier()
        seed_everything(config.schedule.seed, world.rank)
        if config.plugin.mem_cap > 0 and world.device.type == "cuda":
            apply_device_cap(world.device, int(config.plugin.mem_cap * 2**30))
        # What costs nothing to look at comes first; then what is fetched; then what is tokenized and built.
        recipe.check(config)
        _check_trace(config, config.schedule.steps, resumed=False, progress=progress)
        planned = recipe.plan(config)
        _check_memory(config, planned, world)
        planned = planned.fetched(config)
        data = recipe.load_data(config, planned, progress)
        layout = BatchLayout(
            batch_size=config.optimizer.batch_size or 1,
            accumulate=config.optimizer.accumulate,
            rank=world.rank,
            world_size=world.world_size,
        )
        config, steps = _with_lengths(config, data.size, layout.samples_per_step)
        for line in data.lines:
            progress.message(line)
        if data.is_ragged:
            stack.enter_context(attention_for_many_shapes(world.device))
        plugin = _make_plugin(config, folder, progress)
        if plugin.needs_process_group:
            stack.enter_context(process_group(world))
        stack.enter_context(warnings.catch_warnings())
        for beginning in plugin.harmless_warnings:
            warnings.filterwarnings("ignore", message=beginning)
        try:
            state = _build_state(config, recipe, world, plugin, planned, data, steps, progress)
            position = _resume(folder, state, world, progress, files)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            where = describe_device(world.device)
            memory: Memory = "device" if world.device.type == "cuda" else "one"
            raise explain_out_of_memory_at_start(
                planned.parameters, config, where=where, memory=memory, trained=planned.trained
            ) from error
        if position.step > steps:
            raise ConfigError(
                f"the run in {folder.path} has done {position.step} steps and cannot end at {steps}: give more --steps "
                "or --epochs, or begin a new run with another --output"
            )
        _check_trace(config, steps - position.step, resumed=position.step > 0, progress=progress)
        if world.is_main:
            cut_after(folder.metrics_path, position.step if position.step > 0 else -1, files)
            folder.write_config(config_to_mapping(config))
            # With it a model can be written from any checkpoint, whether or not the run comes to its end.
            data.save(folder.processor_path)
        writer = stack.enter_context(MetricsWriter(folder.metrics_path)) if world.is_main else None
        recorder = Recorder(
            world,
            progress,
            writer,
            samples_per_step=layout.samples_per_step,
            dataset_size=data.size,
            peaks=plugin.peaks(world.device),
            compiled=config.plugin.compile,
            loss_scaled=config.plugin.precision == "fp16",
        )
        progress.message(_describe(config, world, steps))
        with StopRequest() as stop:
            yield Session(
                config=config,
                recipe=recipe,
                folder=folder,
                world=world,
                data=data,
                state=state,
                recorder=recorder,
                progress=progress,
                stop=stop,
                layout=layout,
                steps=steps,
                position=position,
                files=files,
                parameters=count_weights(state.model.unwrap()),
                trained_parameters=sum(p.numel() for p in state.model.unwrap().parameters() if p.requires_grad),
                memory_before=plugin.peaks(world.device).read(),
                logits_bytes=recipe.output_bytes(config, planned, world.device),
            )


def _make_plugin(config: RunConfig, folder: RunFolder, progress: Progress) -> Plugin:
    plugin = make_plugin(config.plugin)
    plugin.say = progress.message
    if config.plugin.trace:
        plugin.trace_into(folder.path)
    return plugin


def _check_trace(config: RunConfig, left: int | None, *, resumed: bool, progress: Progress) -> None:
    """Say that a run is too short for the step that --trace shows."""
    if not config.plugin.trace or left is None or left >= STEPS_TO_TRACE:
        return
    line = f"--trace shows step {STEPS_TO_TRACE} at the earliest, and there are {left} to do"
    if not resumed:
        raise ConfigError(f"{line}: give more --steps, or leave it out")
    # The flag may be that of the run which goes on, and the trace there already.
    progress.message(f"warning: {line}: nothing is traced")


def _check_nothing_is_open(config: RunConfig) -> None:
    """Refuse a configuration that `resolve` has not been over: a learning rate of None must not become one of 0."""
    decided = {
        **dict.fromkeys(config.data.left_open),
        "batch_size": config.optimizer.batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "init": config.model.init,
        "precision": config.plugin.precision,
    }
    for name, value in decided.items():
        if value is None:
            raise ConfigError(f"{name} is left open: pass the configuration through albireo.config.resolve first")


def _check_memory(config: RunConfig, planned: ModelPlan, world: World) -> None:
    """Refuse at once what cannot fit: weights, gradients and states alone are more than there is."""
    check = partial(check_states_fit, planned.parameters, config=config, trained=planned.trained)
    host = read_host_memory()
    share = host.total_bytes // world.local_world_size if host is not None else None
    whose = "each rank's share of this machine's memory is" if world.local_world_size > 1 else "this machine has"
    if world.device.type != "cuda":
        check(available_bytes=share, where=whose)
        return
    cap = int(config.plugin.mem_cap * 2**30)
    total = device_total_bytes(world.device)
    available, where = (cap, "--mem-cap leaves") if cap else (total, f"the {describe_device(world.device)} has")
    check(available_bytes=available, where=where, memory="device")
    check(available_bytes=share, where=whose, memory="host")


def _with_lengths(config: RunConfig, dataset_size: int, samples_per_step: int) -> tuple[RunConfig, int]:
    """Decide what depends on the data: steps from epochs or the other way round, and how often to look and save."""
    schedule = config.schedule
    steps = schedule.steps or steps_for(schedule.epochs or 1.0, dataset_size, samples_per_step)
    warmup = warmup_steps_of(schedule.warmup, steps)
    if warmup >= steps and warmup > 1:
        raise ConfigError(
            f"--warmup {schedule.warmup:g} is no shorter than the run of {steps} steps: give less of it, or more --steps"
        )
    fifth = max(1, math.ceil(steps / 5))
    schedule = dataclasses.replace(
        schedule,
        steps=steps,
        # Written down for people. No more than the option allows: a resumed run reads it back.
        epochs=min(steps * samples_per_step / dataset_size, 1e6) if schedule.steps else schedule.epochs,
        eval_every=fifth if schedule.eval_every is None else schedule.eval_every,
        save_every=fifth if schedule.save_every is None else schedule.save_every,
    )
    return dataclasses.replace(config, schedule=schedule), steps


def build_model(
    config: RunConfig, recipe: Recipe, planned: ModelPlan, data: RunData, device: torch.device, *, lazily: bool = False
) -> tuple[TaskModel, WeightSource | None, list[str]]:
    """Build a run's model as the training step calls it, with all that the configuration does to its blocks.

    Args:
        config: the run.
        recipe: what is trained.
        planned: the model, fetched.
        data: what it is to read.
        device: where.
        lazily: without memory for the model's parameters, to be filled where they are to lie.

    Returns:
        The model in training mode; where the values of parameters without memory come from, which is to be closed, or
        None; and lines for the user.

    Raises:
        ModelError: the weights cannot be loaded, or do not go with the data.
    """
    source: WeightSource | None = None
    if lazily:
        pretrained, source, lines = planned.build_lazily(data, config)
    else:
        pretrained, lines = planned.build(data, config, device)
    lines += _prepare_blocks(pretrained, planned.family, config, ragged=data.is_ragged)
    model = recipe.wrap(pretrained, planned.family, data)
    model.train()
    return model, source, lines


def _build_state(
    config: RunConfig,
    recipe: Recipe,
    world: World,
    plugin: Plugin,
    planned: ModelPlan,
    data: RunData,
    steps: int,
    progress: Progress,
) -> RunState:
    """Build the model, and boost it."""
    # A quantised model is built a layer at a time, so that it never takes what it would have taken.
    lazily = plugin.fills_weights or config.adapter.bits is not None
    with progress.task(f"building the model ({planned.parameters:,} parameters)"):
        model, source, lines = build_model(config, recipe, planned, data, world.device, lazily=lazily)
    for line in lines:
        progress.message(line)
    pretrained = model.pretrained
    groups = decay_groups(pretrained.named_parameters(), config.optimizer.weight_decay)
    optimizer = adamw(groups, config.optimizer.learning_rate or 0.0)
    schedule = config.schedule
    scheduler = scheduler_for(
        optimizer,
        steps=steps,
        warmup_steps=warmup_steps_of(schedule.warmup, steps),
        schedule=schedule.schedule,
    )
    booster = Booster(plugin=plugin, world=world)
    with progress.task("filling the weights") if source is not None else nullcontext():
        boosted, wrapped, *_ = booster.boost(model, optimizer, weights=source)
    if source is not None:
        source.close()
    _keep_blocks(boosted, pretrained, plugin, planned.family, config, world, ragged=data.is_ragged)
    # Only now: a plugin may have put other parameters in place of the model's.
    names, aliases = own_names(pretrained)
    identity = {"data": data.fingerprint, "recipe": config.recipe, **planned.identity(config)}
    return RunState(booster, boosted, wrapped, scheduler, names, aliases, identity)


def _prepare_blocks(model: PreTrainedModel, family: Family, config: RunConfig, *, ragged: bool) -> list[str]:
    """Turn on activation checkpointing and compilation, as far as they are asked for."""
    checkpointing, dropout = config.model.checkpointing, config.drops_out
    if config.plugin.compile:
        blocks = compile_blocks(model, family, checkpointing=checkpointing, preserve_rng_state=dropout, ragged=ragged)
        return [f"compiling  {blocks} blocks, once for all: the first step takes longer"]
    if checkpointing:
        enable_activation_checkpointing(model, preserve_rng_state=dropout, family=family)
    return []


def _keep_blocks(
    boosted: ModelWrapper,
    model: PreTrainedModel,
    plugin: Plugin,
    family: Family,
    config: RunConfig,
    world: World,
    *,
    ragged: bool,
) -> None:
    """Have the last blocks keep what they compute, where activations are checkpointed and there is room."""
    # Gradients that are added up are there from the beginning; a longer batch than the first would find less room.
    if not config.model.checkpointing or config.plugin.compile or config.optimizer.accumulate > 1 or ragged:
        return
    slack, cap = config.model.checkpointing_slack, int(config.plugin.mem_cap * 2**30)

    def room() -> ActivationRoom | None:
        gradients = plugin.gradient_bytes(boosted)
        if gradients is None:
            return None
        if world.device.type != "cuda":
            return ActivationRoom(gradients)
        peaks = plugin.peaks(world.device).read()
        # Gemini's first step kept nothing on the device, so its gradients are in no peak yet.
        left = device_room_bytes(world.device, cap) - peaks.device_reserved_peak_bytes - gradients
        return ActivationRoom(gradients, more=max(0, min(int(slack * peaks.device_peak_bytes), left)))

    blocks = [block for _, block in family.blocks(model)]
    KeptBlocks(blocks, room, say=plugin.say if world.is_main else None)


def _resume(folder: RunFolder, state: RunState, world: World, progress: Progress, files: FileOperations) -> Position:
    """Load the newest whole checkpoint: the main rank finds and checks it, and all load the same."""
    found: Checkpoint | None = None
    if world.is_main:
        tidy(folder.checkpoints_path, files)
        found, damaged = newest_whole(folder.checkpoints_path)
        for line in damaged:
            progress.message(f"warning: {line}")
        if found is None and damaged:
            # Beginning anew here would throw away the rows and whatever can still be saved by hand.
            raise CheckpointError(
                f"no checkpoint in {folder.checkpoints_path} is whole, so the run cannot go on ({damaged[0]}): put whole "
                "ones back, or begin a new run with another --output"
            )
    name = world.share_from_main(None if found is None else found.path.name)
    if name is None:
        return Position(0, 0)
    checkpoint = found if found is not None else open_checkpoint(folder.checkpoints_path / name, check_contents=False)
    position = state.load(checkpoint)
    progress.message(f"going on from the checkpoint of step {position.step}")
    return position


def _describe(config: RunConfig, world: World, steps: int) -> str:
    ranks = f"{world.world_size} ranks, " if world.world_size > 1 else ""
    optimizer = config.optimizer
    accumulated = f" x {optimizer.accumulate}" if optimizer.accumulate > 1 else ""
    return (
        f"training   {steps:,} steps of batch {optimizer.batch_size}{accumulated} with {config.plugin.plugin}, "
        f"{config.plugin.precision}, on {ranks}{describe_device(world.device)}"
    )
