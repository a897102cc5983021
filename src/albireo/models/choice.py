"""Which model a user means: a named size, a folder, or a name on the hub."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albireo.errors import ModelError
from albireo.models.families import FAMILIES, family_of
from albireo.models.family import Family
from albireo.models.hub import download_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ModelChoice", "fetch_model", "resolve_model"]

# Neither code from the hub, nor attention by a kernel from there, nor what a flag of Albireo decides.
_NOT_TAKEN_OVER = ("auto_map", "attn_implementation", "_attn_implementation", "gradient_checkpointing", "use_cache")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelChoice:
    """A model that exists, of a family that is supported.

    Attributes:
        name: as the user typed it.
        family: what it is.
        size: the family's name for it, or None.
        hub_id: where on the hub it is, or None.
        folder: where on this machine it is, with `config.json` at least; None for a size that was not fetched.
    """

    name: str
    family: Family
    size: str | None = None
    hub_id: str | None = None
    folder: Path | None = None

    def config(self, *, dropout: float = 0.0) -> PreTrainedConfig:
        """Return the model's configuration, a new one at each call.

        Args:
            dropout: the probability with which hidden states are dropped, whatever the model's own files say.

        Raises:
            ModelError: `config.json` is malformed.
        """
        if self.folder is None:
            return self.family.config_for(str(self.size), dropout=dropout)
        path = self.folder / "config.json"
        options = {**_read_config(path), **self.family.dropout_options(dropout)}
        for name in _NOT_TAKEN_OVER:
            options.pop(name, None)
        if not self.family.has_padding_row:
            options["pad_token_id"] = None
        try:
            return self.family.make_config(options)
        except Exception as error:  # whatever a wrong value makes the configuration's own checks raise
            raise ModelError(f"{path} describes no {self.family.name} model: {error}") from error


def resolve_model(name: str, family: Family | None = None) -> ModelChoice:
    """Find out which model a name means.

    A size comes before a folder of the same name, and a folder before a name on the hub; for that alone the network
    is asked.

    Args:
        name: a size such as `125m` or `6.7`, a Hugging Face folder, or a hub id such as `facebook/opt-125m`.
        family: which family it must be of, and whose sizes are meant. None: of any; a size that several have is the
            first one's.

    Raises:
        ModelError: there is no such model, or it is of another family or of none that is supported.
    """
    families = list(FAMILIES.values()) if family is None else [family]
    for candidate in families:
        size = candidate.parse_size(name)
        if size is not None:
            return ModelChoice(name, candidate, size=size, hub_id=candidate.sizes[size].hub_id)
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        choice = _in_folder(name, path)
    elif not _HUB_ID.fullmatch(name):
        sizes = ", ".join(size for candidate in families for size in candidate.sizes)
        raise ModelError(f"there is no model {name!r}: expected one of {sizes}, a Hugging Face folder, or a hub id")
    else:
        choice = dataclasses.replace(_in_folder(name, download_model(name, weights=False)), hub_id=name)
    if choice.family not in families:
        raise ModelError(
            f"the model in {name} is of type {choice.family.name!r}, and this recipe trains {families[0].name!r}: take "
            f"another model, or `albireo train {choice.family.name}`"
        )
    return choice


def fetch_model(choice: ModelChoice) -> ModelChoice:
    """Return the choice with a folder that holds its trained weights, fetched from the hub if need be.

    Args:
        choice: what `resolve_model` found.

    Raises:
        ModelError: nobody publishes its weights, or the hub cannot be reached.
    """
    if choice.hub_id is None:
        if choice.folder is None:
            raise ModelError(f"the model {choice.name} has no published weights: use --init random")
        return choice
    return dataclasses.replace(choice, folder=download_model(choice.hub_id, weights=True))


def _in_folder(name: str, path: Path) -> ModelChoice:
    if not path.is_dir():
        raise ModelError(f"{name} is a file: expected a Hugging Face folder with config.json and the weights")
    if not (path / "config.json").is_file():
        raise ModelError(f"the folder {name} holds no config.json, so it is no Hugging Face model{_hint(path)}")
    options = _read_config(path / "config.json")
    model_type = options.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{path / 'config.json'} has no model_type, so it describes no Hugging Face model{_hint(path)}"
        )
    if "quantization_config" in options:
        raise ModelError(f"the model in {name} is quantised, which is not supported: expected 16-bit or fp32 weights")
    return ModelChoice(name, family_of(model_type), folder=path)


def _hint(path: Path) -> str:
    """Point from a run's folder, which has a config.json of its own, to the model in it."""
    inside = path / "model"
    return f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(options, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return options
