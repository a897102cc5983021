"""What a run's model takes pictures for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from albireo.adapters import load_adapter, merge_in_place
from albireo.config import AdapterConfig
from albireo.data import PictureForm, load_picture_form
from albireo.data.picture_source import read_picture
from albireo.errors import ConfigError, DataError, RunFolderError
from albireo.training.exporting import read_run, restored_model
from albireo.training.recipes.vit.data import read_classes
from albireo.training.recipes.vit.plan import plan_picture_model
from albireo.training.recipes.vit.recipe import VitRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TrainedPictureModel", "classify", "load_picture_model", "read_pictures"]

_AT_ONCE = 32


@dataclass(frozen=True)
class TrainedPictureModel:
    """A model of pictures that a run has trained.

    Attributes:
        model: in evaluation mode, on a device, in fp32; an adapter is merged into it.
        form: what it wants of a picture.
        classes: the names of what it tells apart.
        note: what the user should know of where it is from, or "".
    """

    model: PreTrainedModel
    form: PictureForm
    classes: tuple[str, ...]
    note: str


def load_picture_model(run: Path, device: torch.device) -> TrainedPictureModel:
    """Load what a run has trained: its `model/` or `adapter/`, or where it has not come to its end, its newest checkpoint.

    Args:
        run: the run's folder.
        device: where to.

    Raises:
        AlbireoError: there is no run, it is no model's of pictures, or it has nothing yet.
    """
    config, folder, recipe = read_run(run)
    if not isinstance(recipe, VitRecipe):
        raise ConfigError(f"the run in {run} is of the recipe {recipe.name}, which tells no pictures apart")
    note = ""
    cpu = torch.device("cpu")
    if folder.model_path.is_dir():
        own: dict[str, Any] = {"model": str(folder.model_path), "init": "pretrained"}
        of_folder = dataclasses.replace(config, model=dataclasses.replace(config.model, **own), adapter=AdapterConfig())
        classes, place = read_classes(folder.model_path), folder.model_path
        model, _ = plan_picture_model(of_folder).fetched(of_folder).build_for(classes, of_folder, cpu)
    elif folder.adapter_path.is_dir():
        classes, place = read_classes(folder.adapter_path), folder.adapter_path
        model, _ = plan_picture_model(config).fetched(config).build_for(classes, config, cpu)
        load_adapter(model, folder.adapter_path)
    elif folder.checkpoints_path.is_dir() and any(folder.checkpoints_path.iterdir()):
        classes, place = read_classes(folder.processor_path), folder.processor_path
        model, checkpoint = restored_model(config, folder, recipe)
        note = f"the run has not come to its end: this is its checkpoint of step {checkpoint.step}"
    else:
        raise RunFolderError(
            f"the run in {run} has no model yet: go on with it by albireo train {recipe.name} --resume {run}"
        )
    merge_in_place(model)
    model.train(mode=False)
    torch.nn.Module.to(model, device)
    found = model.config.image_size
    size = (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))
    return TrainedPictureModel(model, load_picture_form(place, size), classes, note)


def read_pictures(paths: list[Path]) -> list[Image]:
    """Read files, all before anything is computed.

    Args:
        paths: of pictures.

    Raises:
        DataError: one is missing or no picture; it is named.
    """
    found = []
    for path in paths:
        try:
            found.append(read_picture(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no picture, or it is damaged"
            raise DataError(f"{path} cannot be read: {reason}") from error
    return found


def classify(trained: TrainedPictureModel, pictures: list[Image]) -> list[dict[str, float]]:
    """Return the probability of each class for each picture, the likeliest first.

    Args:
        trained: the model.
        pictures: read.
    """
    device = next(trained.model.parameters()).device
    results = []
    for first in range(0, len(pictures), _AT_ONCE):
        pixels = torch.stack([trained.form.whole(picture) for picture in pictures[first : first + _AT_ONCE]])
        with torch.no_grad():
            read = trained.form.normalised(pixels.to(device))
            shares = trained.model(pixel_values=read).logits.float().softmax(dim=-1).cpu()
        for row in shares:
            order = row.argsort(descending=True).tolist()
            results.append({trained.classes[place]: float(row[place]) for place in order})
    return results
