"""Trained weights out of a Hugging Face folder, tensor by tensor, from safetensors alone.

Nothing is trusted: each name, shape and dtype is compared with the model before a byte is read, since transformers
only warns where a weight is missing and leaves it random. No more than one tensor is held beside the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from albireo.errors import ModelError
from albireo.models.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_weights", "load_weights", "places_of_weights", "tied_weights_differ", "weight_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a folder's weights, one or as many as its index names.

    Raises:
        ModelError: there are none, or the index is malformed or names a file that is not there.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise ModelError(
                f"{folder} holds pickled weights only, which can run any code when they are read: convert them to "
                "safetensors (https://huggingface.co/docs/safetensors/convert-weights), or use --init random"
            )
        raise ModelError(f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}; or use --init random")
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names {name!r}, which is no file in {folder}: the folder is not whole")
    return [folder / name for name in names]


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read as JSON: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} has no weight_map of names and files")
    return weight_map


def load_weights(model: PreTrainedModel, folder: Path, family: Family, *, but_head: bool = False) -> None:
    """Fill a model's parameters from a folder, cast to their dtype.

    Of tied weights one is enough. If the folder holds several, they must be equal.

    Args:
        model: the model; its parameters have memory.
        folder: a Hugging Face folder.
        family: the model's.
        but_head: leave the head as it is, and what the folder has of one aside.

    Raises:
        ModelError: a file is missing or damaged, or a tensor is missing, unknown, there twice, of another shape or of
            a type that holds no plain numbers. The message names it.
    """
    targets = model.state_dict(keep_vars=True)
    files = weight_files(folder)
    places = places_of_weights(files, targets, family, but_head=but_head)
    filled: dict[Tensor, str] = {}
    with torch.no_grad():
        for file in files:
            with _opened(file) as tensors:
                for key in (key for key, (place, _) in places.items() if place == file):
                    name = places[key][1]
                    target, value = targets[name], tensors.get_tensor(key)
                    if target not in filled:
                        target.copy_(value)
                        filled[target] = name
                    elif not torch.equal(target, value.to(target)):
                        raise tied_weights_differ(file, name, filled[target])


def check_weights(folder: Path, family: Family, config: PreTrainedConfig, *, but_head: bool = False) -> None:
    """Compare a folder's weights with a configuration by names, shapes and types, without reading a number.

    Args:
        folder: a Hugging Face folder.
        family: the model's.
        config: the model's configuration.
        but_head: whatever the head is.

    Raises:
        ModelError: as `load_weights` would.
    """
    targets = family.make_model(config).state_dict(keep_vars=True)
    places_of_weights(weight_files(folder), targets, family, but_head=but_head)


def places_of_weights(
    files: list[Path], targets: Mapping[str, Tensor], family: Family, *, but_head: bool = False
) -> dict[str, tuple[Path, str]]:
    """Return the file and the model's name of each tensor in a folder, after comparing all of them with the model.

    Args:
        files: the folder's, as `weight_files` lists them.
        targets: the model's tensors by its own names for them; they need no memory.
        family: the model's.
        but_head: without the head, which may be of another shape, or not be there.

    Raises:
        ModelError: as `load_weights` would, but for tied weights, whose values are not looked at.
    """
    places: dict[str, tuple[Path, str]] = {}
    found: dict[str, str] = {}
    head = f"{family.head_name}."
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118  no mapping: it has no other way to list its names
                name = _own_name(key, targets, family)
                if family.is_obsolete(name) or (but_head and name.startswith(head)):
                    continue
                if name not in targets:
                    raise ModelError(f"{file} holds {key}, which the model of its config.json has no place for")
                if name in found:
                    raise ModelError(f"{file} holds {key}, which is there already as {found[name]}")
                part = tensors.get_slice(key)
                shape, dtype = list(part.get_shape()), part.get_dtype()
                if shape != list(targets[name].shape):
                    raise ModelError(
                        f"{file} holds {key} of shape {shape}; the model of its config.json needs "
                        f"{list(targets[name].shape)}"
                    )
                if dtype not in _FLOATS:
                    raise ModelError(f"{file} holds {key} as {dtype}: expected weights that are not quantised")
                found[name], places[key] = key, (file, name)
    there = {targets[name] for name in found}
    wanted = {name: target for name, target in targets.items() if not (but_head and name.startswith(head))}
    missing = [name for name, target in wanted.items() if target not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{files[0].parent} holds no weights for {missing[0]}{more}, which its config.json asks for")
    return places


def tied_weights_differ(file: Path, name: str, other: str) -> ModelError:
    """Return the error of a file that has another value for a parameter than the one read under another name."""
    return ModelError(
        f"{file} holds other values for {name} than for {other}, which config.json says are one: set "
        "tie_word_embeddings to false in it, or take the right file"
    )


def _own_name(key: str, targets: Mapping[str, Tensor], family: Family) -> str:
    """Return the model's name for a name in a file, which may be as an older version of the family wrote it."""
    if key in targets:
        return key
    renamed = family.renamed(key)
    if renamed in targets:
        return renamed
    return next((new + key.removeprefix(old) for old, new in family.prefixes.items() if key.startswith(old)), key)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or cut short: {error}") from error
