"""A run's model, loaded to be used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from albireo.adapters import load_adapter, merge_in_place
from albireo.config import AdapterConfig, RunConfig
from albireo.data import TextTokenizer, load_tokenizer
from albireo.errors import ConfigError, RunFolderError
from albireo.training.exporting import read_run, restored_model
from albireo.training.language_model import plan_language_model
from albireo.training.language_recipe import LanguageRecipe
from albireo.training.run_folder import RunFolder

__all__ = ["TrainedLanguageModel", "load_language_model"]


@dataclass(frozen=True)
class TrainedLanguageModel:
    """A language model that a run has trained.

    Attributes:
        model: in evaluation mode, on a device, in fp32; an adapter is merged into it.
        tokenizer: the run's.
        recipe: the recipe's name.
        note: what the user should know of where it is from, or "".
    """

    model: PreTrainedModel
    tokenizer: TextTokenizer
    recipe: str
    note: str


def load_language_model(run: Path, device: torch.device) -> TrainedLanguageModel:
    """Load what a run has trained: its `model/` or `adapter/`, or where it has not come to its end, its newest checkpoint.

    Args:
        run: the run's folder.
        device: where to.

    Raises:
        AlbireoError: there is no run, it is no language model's or was trained on random ids, or it has nothing yet.
    """
    config, folder, recipe = read_run(run)
    if not isinstance(recipe, LanguageRecipe):
        raise ConfigError(f"the run in {run} is of the recipe {recipe.name}, which generates no text")
    if not (folder.processor_path / "tokenizer.json").is_file() and config.data.data == "random":
        raise ConfigError(f"the run in {run} was trained on random ids, and has no tokenizer to read a text with")
    note = ""
    if folder.model_path.is_dir():
        model = _from_model_folder(config, folder, recipe)
        tokenizer = load_tokenizer(folder.model_path)
    elif folder.adapter_path.is_dir():
        tokenizer = load_tokenizer(folder.adapter_path)
        planned = plan_language_model(config, recipe.family).fetched(config)
        model, _ = planned.build_for(tokenizer, config, torch.device("cpu"))
        load_adapter(model, folder.adapter_path)
    elif folder.checkpoints_path.is_dir() and any(folder.checkpoints_path.iterdir()):
        model, checkpoint = restored_model(config, folder, recipe)
        tokenizer = load_tokenizer(folder.processor_path)
        note = f"the run has not come to its end: this is its checkpoint of step {checkpoint.step}"
    else:
        raise RunFolderError(
            f"the run in {run} has no model yet: go on with it by albireo train {recipe.name} --resume {run}"
        )
    merge_in_place(model)
    model.train(mode=False)
    torch.nn.Module.to(model, device)
    return TrainedLanguageModel(model, tokenizer, recipe.name, note)


def _from_model_folder(config: RunConfig, folder: RunFolder, recipe: LanguageRecipe) -> PreTrainedModel:
    """Build the model of a Hugging Face folder, whatever it was trained from."""
    # As it was saved: the tokenizer beside it, and no adapter.
    own: dict[str, Any] = {"tokenizer": None, "model": str(folder.model_path), "init": "pretrained"}
    of_folder = dataclasses.replace(config, model=dataclasses.replace(config.model, **own), adapter=AdapterConfig())
    planned = plan_language_model(of_folder, recipe.family)
    model, _ = planned.build_for(load_tokenizer(folder.model_path), of_folder, torch.device("cpu"))
    return model
