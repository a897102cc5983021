"""From what was trained to folders that others load: a Hugging Face model, or an adapter as peft writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from albireo.adapters import has_lora, lora_config_in, merged_weights, own_names, save_adapter
from albireo.checkpoint import Checkpoint, newest_whole, open_checkpoint, replace_folder
from albireo.checkpoint.names import find_checkpoints
from albireo.config import RunConfig, config_from_mapping
from albireo.errors import CheckpointError, ConfigError, RunFolderError
from albireo.files import FileOperations
from albireo.plugins.importing import check_model_source
from albireo.plugins.whole_tensors import WholeTensors, with_whole_tensors
from albireo.training.recipe import Recipe, RunData
from albireo.training.recipes import recipe_of
from albireo.training.run_folder import RunFolder
from albireo.training.saving import RunState

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["export_checkpoint", "export_trained", "read_run", "restored_model"]

SaveProcessor = Callable[[Path], None]


def export_trained(
    state: RunState,
    pretrained: PreTrainedModel,
    data: RunData,
    folder: RunFolder,
    base: str | None,
    files: FileOperations,
) -> None:
    """Write what a run has trained into its folder: `model/`, or `adapter/` where one was trained. All ranks call this.

    Args:
        state: of the run.
        pretrained: the transformers model that was trained.
        data: knows what goes with a model.
        folder: the run's.
        base: what an adapter stands beside, for its folder; None if others could not load it.
        files: writes to the disk.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with_adapter = has_lora(pretrained)
    # Of an adapter's run the frozen weights are not gathered.
    names = {t: n for t, n in state.names.items() if not with_adapter or t.requires_grad}

    def export(tensors: WholeTensors) -> None:
        weights = {part.name.removeprefix("model/"): tensors.tensor(part) for part in tensors.slices}
        if with_adapter:
            config = lora_config_in(pretrained)
            write: Callable[[Path], None] = partial(_write_adapter, weights, config, base, data.save)
            replace_folder(folder.adapter_path, write, files)
            return
        weights.update({name: weights[first] for name, first in state.aliases.items()})
        replace_folder(folder.model_path, partial(_write_model, pretrained, weights, data.save), files)

    world = state.booster.world
    slices = state.booster.plugin.export_model(state.model, state.names, world)
    wanted = {f"model/{name}" for name in names.values()}
    with_whole_tensors((part for part in slices if part.name in wanted), world, export)


def export_checkpoint(run: Path, output: Path, *, merge: bool, step: int | None = None) -> str:
    """Write a folder from a run's checkpoint, whether or not the run has come to its end.

    Args:
        run: the run's folder.
        output: the folder to make.
        merge: add an adapter to the weights that it stands beside, and write a whole model.
        step: which checkpoint; the newest whole one if None.

    Returns:
        What was written, in words.

    Raises:
        AlbireoError: there is no such run or checkpoint, the folder is taken, or there is nothing to merge.
    """
    config, folder, recipe = read_run(run)
    if merge and not config.adapter.is_on:
        raise ConfigError(f"the run in {run} has no adapter, so there is nothing to merge: leave --merge out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} is there already: choose another, or remove it")
    model, checkpoint = restored_model(config, folder, recipe, step=step)
    processor = partial(_copy_files, folder.processor_path)
    if config.adapter.is_on and not merge:
        names, _ = own_names(model)
        weights = {name: tensor.detach() for tensor, name in names.items()}
        base = recipe.base_name(config)
        replace_folder(output, partial(_write_adapter, weights, lora_config_in(model), base, processor))
        what = "the adapter"
    else:
        whole = recipe.empty_model(config, folder.processor_path, with_adapter=False) if merge else model
        replace_folder(output, partial(_write_model, whole, merged_weights(model), processor))
        what = "the model with its adapter merged" if merge else "the model"
    return f"{what} of step {checkpoint.step}"


def restored_model(
    config: RunConfig, folder: RunFolder, recipe: Recipe, *, step: int | None = None
) -> tuple[PreTrainedModel, Checkpoint]:
    """Return a run's model in host memory, in fp32, with the weights of a checkpoint, and the checkpoint.

    Args:
        config: the run's.
        folder: the run's.
        recipe: the run's.
        step: which checkpoint; the newest whole one if None.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ModelError: the model cannot be built.
    """
    checkpoint = _checkpoint_of(folder, step)
    model = recipe.empty_model(config, folder.processor_path, with_adapter=config.adapter.is_on)
    names, _ = own_names(model)
    check_model_source(checkpoint, names)
    with torch.no_grad():
        for tensor, name in names.items():
            checkpoint.read_into(f"model/{name}", tensor)
    model.train(mode=False)
    return model, checkpoint


def read_run(run: Path) -> tuple[RunConfig, RunFolder, Recipe]:
    """Return a run's configuration, folder and recipe.

    Args:
        run: its folder.

    Raises:
        RunFolderError: there is no run.
        ConfigError: its configuration is no recipe's.
    """
    folder = RunFolder.open(run)
    values = folder.read_config()
    name = values.get("recipe")
    if not isinstance(name, str):
        raise RunFolderError(f"{folder.config_path} does not say its recipe, so it is no run's configuration")
    config = config_from_mapping(values, where=str(folder.config_path), base=RunConfig.of(name))
    return config, folder, recipe_of(name)


def _checkpoint_of(folder: RunFolder, step: int | None) -> Checkpoint:
    places = dict(find_checkpoints(folder.checkpoints_path))
    if step is not None:
        if step not in places:
            there = ", ".join(str(number) for number in sorted(places)) or "none"
            raise CheckpointError(f"there is no checkpoint of step {step} in {folder.path}; there are: {there}")
        return open_checkpoint(places[step])
    found, damaged = newest_whole(folder.checkpoints_path)
    if found is None:
        why = f" ({damaged[0]})" if damaged else ""
        raise CheckpointError(f"there is no whole checkpoint in {folder.checkpoints_path}{why}")
    return found


def _write_model(
    pretrained: PreTrainedModel, weights: Mapping[str, torch.Tensor], save_processor: SaveProcessor, path: Path
) -> None:
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    with _quiet_transformers():
        pretrained.save_pretrained(path, state_dict=dict(weights))
        # What computes may be narrower than what is saved.
        pretrained.config.dtype = dtype
        pretrained.config.save_pretrained(path)
    save_processor(path)


def _write_adapter(
    weights: Mapping[str, torch.Tensor], config: LoraConfig, base: str | None, save_processor: SaveProcessor, path: Path
) -> None:
    save_adapter(weights, config, path, base=base)
    save_processor(path)


def _copy_files(source: Path, target: Path) -> None:
    for file in sorted(source.glob("*")) if source.is_dir() else ():
        (target / file.name).write_bytes(file.read_bytes())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars off the screen, where the run has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
