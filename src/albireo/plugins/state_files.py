"""Models, optimizers and schedules of a user's own loop, in files: safetensors and JSON, whichever plugin trains.

The main rank alone writes, all at once or not at all, and no rank goes on before; if it fails, all ranks raise. What
other ranks hold it asks them for while it writes, a piece at a time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from albireo.checkpoint import (
    JSON,
    SavedTensors,
    TensorSlice,
    decode_document,
    decode_value,
    encode_document,
    encode_value,
    open_saved_tensors,
    refuse_pickle,
    tensor_names,
    write_file,
    write_saved_tensors,
    write_sharded_tensors,
)
from albireo.distributed import World
from albireo.errors import AlbireoError, CheckpointError
from albireo.files import FileOperations
from albireo.optim import OptimizerWrapper, complete_names, named_groups, restore_named_groups
from albireo.plugins.base import ModelWrapper, Plugin
from albireo.plugins.whole_tensors import WholeTensors, with_whole_tensors

__all__ = [
    "LoadedNames",
    "load_lr_scheduler",
    "load_model",
    "load_optimizer",
    "save_lr_scheduler",
    "save_model",
    "save_optimizer",
]

_MB = 2**20
_METADATA = "albireo"


class LoadedNames(NamedTuple):
    """What `load_model` left out, by torch's names for it.

    Attributes:
        missing_keys: the model's, that the file has not.
        unexpected_keys: the file's, that the model has not.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Place(NamedTuple):
    """Where tensors are written.

    Attributes:
        path: a file, or a folder of several files.
        shard_mb: the size of one of several files, in MB (2**20 bytes); None: there is one file.
        files: what touches the disk.
    """

    path: Path
    shard_mb: int | None
    files: FileOperations


def save_model(plugin: Plugin, model: ModelWrapper, place: Place, world: World, *, prefix: str = "") -> None:
    """Write a model's weights, tied ones once; all ranks call this.

    Args:
        plugin: that of the model.
        model: the wrapped model.
        place: where to.
        world: the ranks.
        prefix: put before each name.

    Raises:
        CheckpointError: the model keeps something that is no tensor, or the disk is full or cannot be written.
    """
    refuse_pickle(place.path)
    module = model.unwrap()
    names, aliases = tensor_names(module)
    for key in sorted(set(module.state_dict(keep_vars=True)) - set(aliases) - set(names.values())):
        raise CheckpointError(f"the model's {key} is neither parameter nor buffer, and cannot be saved")
    slices: list[TensorSlice] = []

    def collect() -> None:
        parts = plugin.export_model(model, names, world)
        slices.extend(replace(part, name=prefix + part.name.removeprefix("model/")) for part in parts)

    on_all(world, collect)
    _write(place, "model", slices, world, companions=_descriptions(module))


def load_model(plugin: Plugin, model: ModelWrapper, path: Path, world: World, *, strict: bool) -> LoadedNames:
    """Fill a model from a file, a folder or an index; all ranks call this.

    Of tied weights one is enough; if there are several, they must be equal. Nothing is filled unless all fits.

    Args:
        plugin: that of the model.
        model: the wrapped model.
        path: where its weights are.
        world: the ranks.
        strict: refuse names that only one of model and file has.

    Raises:
        CheckpointError: the file is missing, damaged or pickled, or of another model.
    """
    names, aliases = tensor_names(model.unwrap())
    loaded: list[LoadedNames] = []

    def read() -> None:
        with open_saved_tensors(path, "model") as saved:
            found = _found(names, aliases, saved)
            loaded.append(_compare(names, aliases, saved, found))
            _check_loaded(loaded[0], path, strict=strict)
            wanted = {tensor: name for tensor, name in names.items() if name in found}
            source = saved.renamed({f"model/{name}": key for name, key in found.items()})
            for tensor, name in wanted.items():
                source.check(f"model/{name}", tensor)
            plugin.import_model(model, wanted, source)

    on_all(world, read)
    return loaded[0]


def save_optimizer(plugin: Plugin, optimizer: OptimizerWrapper, place: Place, world: World) -> None:
    """Write an optimizer's states and settings under its parameters' names; all ranks call this.

    Args:
        plugin: that of the optimizer.
        optimizer: the wrapped optimizer.
        place: where to.
        world: the ranks.

    Raises:
        CheckpointError: a state is no tensor, a setting has no form in JSON, or the disk is full or cannot be written.
    """
    refuse_pickle(place.path)
    inner = optimizer.unwrap()
    groups = optimizer.model_groups
    names = complete_names(groups, optimizer.names)
    slices: list[TensorSlice] = []
    metadata: dict[str, str] = {}

    def collect() -> None:
        parts = plugin.export_optimizer(optimizer, names, world)
        slices.extend(replace(part, name=part.name.removeprefix("optimizer/")) for part in parts)
        content: dict[str, JSON] = {
            "optimizer": type(inner).__name__,
            "groups": encode_value(named_groups(inner, groups, names), "the optimizer's groups"),
            "scaler": optimizer.scaler_state(),
        }
        metadata[_METADATA] = encode_document(content).decode()

    on_all(world, collect)
    _write(place, "optimizer", slices, world, metadata=metadata)


def load_optimizer(plugin: Plugin, optimizer: OptimizerWrapper, path: Path, world: World) -> None:
    """Fill an optimizer with what `save_optimizer` wrote; all ranks call this.

    Args:
        plugin: that of the optimizer.
        optimizer: the wrapped optimizer, over the same parameters in the same groups.
        path: the file or folder.
        world: the ranks.

    Raises:
        CheckpointError: the file is missing, damaged or pickled, or of another optimizer.
    """
    inner = optimizer.unwrap()
    groups = optimizer.model_groups
    names = complete_names(groups, optimizer.names)

    def read() -> None:
        with open_saved_tensors(path, "optimizer") as saved:
            if _METADATA not in saved.metadata:
                raise CheckpointError(f"{path} holds no optimizer: it was not written by save_optimizer")
            fields = decode_document(saved.metadata[_METADATA].encode(), str(path))
            restore_named_groups(inner, groups, names, decode_value(fields.array("groups")))
            source = saved.renamed({f"optimizer/{name}": name for name in saved.names()})
            plugin.import_optimizer(optimizer, names, source)
            optimizer.load_scaler_state(fields.mapping("scaler"))

    on_all(world, read)


def save_lr_scheduler(scheduler: Any, path: Path, world: World, files: FileOperations) -> None:
    """Write a schedule's state as JSON; all ranks call this.

    Args:
        scheduler: anything with a `state_dict` of plain values.
        path: the file.
        world: the ranks.
        files: what touches the disk.

    Raises:
        CheckpointError: the state has no form in JSON, or the disk is full or cannot be written.
    """
    refuse_pickle(path, ".json")

    def write() -> None:
        name = type(scheduler).__name__
        state = encode_value(scheduler.state_dict(), f"the state of {name}")
        write_file(path, encode_document({"lr_scheduler": name, "state": state}), files)

    on_main(world, write)


def load_lr_scheduler(scheduler: Any, path: Path, world: World) -> None:
    """Put a schedule where `save_lr_scheduler` found it; all ranks call this.

    Args:
        scheduler: one of the same kind.
        path: the file.
        world: the ranks.

    Raises:
        CheckpointError: the file is missing, damaged or pickled, or of another kind of schedule.
    """
    refuse_pickle(path, ".json")

    def read() -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        fields = decode_document(data, str(path))
        mine, theirs = type(scheduler).__name__, fields.text("lr_scheduler")
        if mine != theirs:
            raise CheckpointError(f"{path} is of a {theirs}, and a {mine} is to go on from it: build the same one")
        scheduler.load_state_dict(decode_value(fields.mapping("state")))

    on_all(world, read)


def on_main(world: World, action: Callable[[], None]) -> None:
    """Do something on the main rank while the others wait, and raise on all if it fails."""
    failure: Exception | None = None
    if world.is_main:
        try:
            action()
        except Exception as error:  # noqa: BLE001  raised again below, after the others know
            failure = error
    said = world.share_from_main(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if said is not None:
        raise CheckpointError(f"the main rank could not save: {said}")


def on_all(world: World, action: Callable[[], None]) -> None:
    """Do something on all ranks, and raise on all if it fails on one."""
    failure: Exception | None = None
    try:
        action()
    except Exception as error:  # noqa: BLE001  raised again below, after the others know
        failure = error
    failed = [rank for rank, (bad,) in enumerate(world.gather_numbers([float(failure is not None)])) if bad]
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError(f"rank {failed[0]} failed; its own message says why")


def _write(
    place: Place,
    stem: str,
    slices: list[TensorSlice],
    world: World,
    *,
    metadata: Mapping[str, str] | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    def write(tensors: WholeTensors) -> None:
        how: dict[str, Any] = {"metadata": metadata, "read": tensors.read}
        if place.shard_mb is None:
            write_saved_tensors(place.path, tensors.slices, place.files, **how)
        else:
            size = place.shard_mb * _MB
            write_sharded_tensors(place.path, stem, tensors.slices, size, place.files, companions=companions, **how)

    try:
        with_whole_tensors(slices, world, write)
    except AlbireoError as error:
        if world.is_main:
            raise
        raise CheckpointError(f"the main rank could not save: {error}") from error


def _descriptions(module: nn.Module) -> dict[str, bytes]:
    """Return what makes a folder of weights one that transformers can open."""
    transformers = sys.modules.get("transformers")  # without it, the model is none of its
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return {}
    config = copy.deepcopy(module.config)
    # torch's FSDP makes the module's class one of its own, before the user's.
    kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed"))
    config.architectures = [next(kinds).__name__]
    config.dtype = module.dtype
    described = {"config.json": config.to_json_string()}
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        described["generation_config.json"] = generation.to_json_string()
    return {name: text.encode() for name, text in described.items()}


def _found(names: Mapping[torch.Tensor, str], aliases: Mapping[str, str], saved: SavedTensors) -> dict[str, str]:
    """Return the first name of each tensor to the one of its names that the file has."""
    found: dict[str, str] = {}
    first_names = {**{name: name for name in names.values()}, **aliases}
    for name, first in first_names.items():
        if name not in saved:
            continue
        if first in found and not torch.equal(saved.read(name), saved.read(found[first])):
            raise CheckpointError(
                f"{saved.path} holds other values for {name} than for {found[first]}, which are one in this model"
            )
        found.setdefault(first, name)
    return found


def _compare(
    names: Mapping[torch.Tensor, str], aliases: Mapping[str, str], saved: SavedTensors, found: Mapping[str, str]
) -> LoadedNames:
    known = {*names.values(), *aliases}
    return LoadedNames(
        [name for name in names.values() if name not in found], [name for name in saved.names() if name not in known]
    )


def _check_loaded(loaded: LoadedNames, path: Path, *, strict: bool) -> None:
    if not strict:
        return
    for keys, what in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "holds")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            whose = "which the model has" if what == "lacks" else "which the model has not"
            raise CheckpointError(f"{path} {what} {keys[0]}{more}, {whose}; with strict=False that is left as it is")
