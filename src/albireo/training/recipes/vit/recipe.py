"""The recipe vit: a Vision Transformer on pictures, each of one class."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from albireo.config import RunConfig
from albireo.data import AnyBatch, evaluation_pictures
from albireo.distributed import World
from albireo.models import VIT, Family, resolve_model
from albireo.plugins import ModelWrapper
from albireo.training.picture_model import PictureModel, evaluate_pictures, picture_inputs, predict
from albireo.training.picture_plots import confusion_png, predictions_png
from albireo.training.progress import Progress
from albireo.training.recipe import Evaluation, ModelPlan, Recipe, RunData, TaskModel
from albireo.training.recipes.vit.data import (
    PictureRunData,
    check_run_data,
    load_run_data,
    picture_options,
    read_classes,
)
from albireo.training.recipes.vit.plan import PicturePlan, plan_picture_model

__all__ = ["VitRecipe"]

# So many are shown with what they are taken for.
_SHOWN = 24


class VitRecipe(Recipe):
    """ViT on pictures."""

    name = "vit"
    title = "ViT"

    def with_full_names(self, config: RunConfig) -> RunConfig:
        """See the base class."""
        choice = resolve_model(config.model.model, VIT)
        name = choice.name
        if choice.size is not None:
            name = choice.size
        elif choice.hub_id is None and choice.folder is not None:
            name = str(choice.folder.resolve())
        adapter = config.adapter
        if adapter.is_on and not adapter.targets:
            targets = VIT.lora_targets_of(VIT.make_model(choice.config()))
            adapter = dataclasses.replace(adapter, lora_targets=",".join(targets))
        return dataclasses.replace(config, model=dataclasses.replace(config.model, model=name), adapter=adapter)

    def fixed(self, config: RunConfig) -> Mapping[str, Any]:
        """See the base class."""
        return {
            "--holdout": config.data.holdout,
            "--augment": picture_options(config).augment,
            "--model": config.model.model if config.model.model in VIT.sizes else None,
            "--adapter": config.adapter.adapter,
            "--lora-rank": config.adapter.lora_rank,
            "--lora-alpha": config.adapter.lora_alpha,
            "--lora-targets": config.adapter.lora_targets,
        }

    def check(self, config: RunConfig) -> None:
        """See the base class."""
        check_run_data(config)

    def plan(self, config: RunConfig) -> PicturePlan:
        """See the base class."""
        return plan_picture_model(config)

    def load_data(self, config: RunConfig, planned: ModelPlan, progress: Progress) -> RunData:
        """See the base class."""
        return load_run_data(config, _plan(planned).form, progress)

    def wrap(self, pretrained: PreTrainedModel, family: Family, data: RunData) -> TaskModel:
        """See the base class: bytes become what the model reads on the device."""
        first = family.backbone(pretrained).get_submodule("embeddings.patch_embeddings.projection")
        return PictureModel(pretrained, _data(data).form, first)

    def base_name(self, config: RunConfig) -> str | None:
        """See the base class."""
        if config.model.init != "pretrained":
            return None
        size = VIT.sizes.get(config.model.model)
        return config.model.model if size is None else size.hub_id

    def empty_model(self, config: RunConfig, processor: Path, *, with_adapter: bool) -> PreTrainedModel:
        """See the base class."""
        return self.plan(config).empty(read_classes(processor), config, with_adapter=with_adapter)

    def inputs(self, batch: AnyBatch) -> dict[str, torch.Tensor]:
        """See the base class."""
        return picture_inputs(batch)

    def evaluate(self, model: ModelWrapper, batches: Iterable[AnyBatch], world: World) -> Evaluation:
        """See the base class: each held-out picture counts once."""
        module = model.unwrap()
        if not isinstance(module, PictureModel):
            raise TypeError(f"expected a model of pictures, not a {type(module).__name__}")
        return evaluate_pictures(model, batches, world, int(module.pretrained.config.num_labels or 0))

    def leave(self, model: ModelWrapper, data: RunData, found: Evaluation | None, world: World) -> Mapping[str, bytes]:
        """See the base class: a grid of held-out pictures, and which classes are taken for which."""
        pictures = _data(data)
        step = max(1, len(pictures.held_out) // _SHOWN)
        shown = pictures.held_out.some(range(0, step * _SHOWN, step))
        # The same on every rank: a sharded model computes together.
        (batch,) = evaluation_pictures(shown, len(shown), 0, 1)
        predicted = predict(model, batch, world.device)
        grid = [pixels.permute(1, 2, 0).numpy() for pixels in batch.pixel_values]
        left = {"predictions.png": predictions_png(grid, batch.labels.tolist(), predicted, pictures.classes)}
        if found is not None and found.confusion is not None:
            left["confusion.png"] = confusion_png(found.confusion, pictures.classes)
        return left

    def output_bytes(self, config: RunConfig, planned: ModelPlan, device: torch.device) -> int:  # noqa: ARG002
        """See the base class: logits of a few classes are nothing."""
        return 0


def _plan(planned: ModelPlan) -> PicturePlan:
    if not isinstance(planned, PicturePlan):
        raise TypeError(f"expected the plan of a model of pictures, not a {type(planned).__name__}")
    return planned


def _data(data: RunData) -> PictureRunData:
    if not isinstance(data, PictureRunData):
        raise TypeError(f"expected pictures, not a {type(data).__name__}")
    return data
