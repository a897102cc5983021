"""What all recipes for language models share: the model, its wrapper, and what goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from albireo.config import LanguageDataConfig, RunConfig
from albireo.data import AnyBatch, Batch, load_tokenizer
from albireo.distributed import World
from albireo.models import Family, resolve_model
from albireo.ops import default_piece_rows
from albireo.plugins import ModelWrapper
from albireo.training.causal_lm import CausalLanguageModel, inputs_of
from albireo.training.evaluation import evaluate
from albireo.training.language_model import LanguageModelPlan, plan_language_model
from albireo.training.recipe import Evaluation, ModelPlan, Recipe, RunData, TaskModel

__all__ = ["LanguageRecipe", "language_options", "language_plan"]


class LanguageRecipe(Recipe):
    """A causal language model, trained on what a recipe of its own makes of the data.

    Attributes:
        family: what its models are.
    """

    family: ClassVar[Family]

    def with_full_names(self, config: RunConfig) -> RunConfig:
        """See the base class."""
        choice = resolve_model(config.model.model, self.family)
        name = choice.name
        if choice.size is not None:
            name = choice.size
        elif choice.hub_id is None and choice.folder is not None:
            name = str(choice.folder.resolve())
        adapter = config.adapter
        if adapter.is_on and not adapter.targets:
            adapter = dataclasses.replace(adapter, lora_targets=",".join(self.family.lora_targets))
        return dataclasses.replace(config, model=dataclasses.replace(config.model, model=name), adapter=adapter)

    def fixed(self, config: RunConfig) -> Mapping[str, Any]:
        """See the base class: a folder may be another and its content the same, so only a size is judged by its name."""
        size = config.model.model if config.model.model in self.family.sizes else None
        return {
            "--sequence-length": language_options(config).sequence_length,
            "--holdout": config.data.holdout,
            "--model": size,
            "--adapter": config.adapter.adapter,
            "--lora-rank": config.adapter.lora_rank,
            "--lora-alpha": config.adapter.lora_alpha,
            "--lora-targets": config.adapter.lora_targets,
        }

    def plan(self, config: RunConfig) -> LanguageModelPlan:
        """See the base class."""
        return plan_language_model(config, self.family)

    def wrap(self, pretrained: PreTrainedModel, family: Family, data: RunData) -> TaskModel:  # noqa: ARG002
        """See the base class."""
        return CausalLanguageModel(pretrained, family)

    def base_name(self, config: RunConfig) -> str | None:
        """See the base class."""
        if config.model.init != "pretrained":
            return None
        size = self.family.sizes.get(config.model.model)
        return config.model.model if size is None else size.hub_id

    def empty_model(self, config: RunConfig, processor: Path, *, with_adapter: bool) -> PreTrainedModel:
        """See the base class."""
        tokenizer = load_tokenizer(processor) if (processor / "tokenizer.json").is_file() else None
        return self.plan(config).empty(tokenizer, config, with_adapter=with_adapter)

    def inputs(self, batch: AnyBatch) -> dict[str, torch.Tensor]:
        """See the base class."""
        return inputs_of(_token_ids(batch))

    def evaluate(self, model: ModelWrapper, batches: Iterable[AnyBatch], world: World) -> Evaluation:
        """See the base class: the mean over all counted tokens."""
        return Evaluation(evaluate(model, map(_token_ids, batches), world))

    def output_bytes(self, config: RunConfig, planned: ModelPlan, device: torch.device) -> int:
        """See the base class: a piece of logits and its gradient, two fp32 numbers each."""
        vocabulary = language_plan(planned).rows
        rows = (config.optimizer.batch_size or 1) * (language_options(config).sequence_length or 1)
        return default_piece_rows(rows, vocabulary, device) * vocabulary * 8


def _token_ids(batch: AnyBatch) -> Batch:
    if not isinstance(batch, Batch):
        raise TypeError(f"expected a batch of token ids, not a {type(batch).__name__}")
    return batch


def language_options(config: RunConfig) -> LanguageDataConfig:
    """Return the data's section of a language recipe.

    Raises:
        TypeError: it is another recipe's configuration.
    """
    if not isinstance(config.data, LanguageDataConfig):
        raise TypeError(f"expected a language recipe's configuration, not {config.recipe}'s")
    return config.data


def language_plan(planned: ModelPlan) -> LanguageModelPlan:
    """Return a language recipe's plan.

    Raises:
        TypeError: it is another recipe's.
    """
    if not isinstance(planned, LanguageModelPlan):
        raise TypeError(f"expected a language model's plan, not a {type(planned).__name__}")
    return planned
