"""The recipe gpt2: a GPT-2 language model on instructions, each a sample of its own length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from albireo.config import RunConfig
from albireo.models import GPT2
from albireo.training.language_recipe import LanguageRecipe, language_plan
from albireo.training.progress import Progress
from albireo.training.recipe import ModelPlan, RunData
from albireo.training.recipes.gpt2.data import check_run_data, instruction_options, load_run_data

__all__ = ["Gpt2Recipe"]


class Gpt2Recipe(LanguageRecipe):
    """GPT-2 on instructions."""

    name = "gpt2"
    title = "GPT-2"
    family = GPT2

    def fixed(self, config: RunConfig) -> Mapping[str, Any]:
        """See the base class: the order of samples and what counts in them too."""
        options = instruction_options(config)
        return {**super().fixed(config), "--loss-on": options.loss_on, "--bucket": options.bucket}

    def check(self, config: RunConfig) -> None:
        """See the base class."""
        check_run_data(config)

    def load_data(self, config: RunConfig, planned: ModelPlan, progress: Progress) -> RunData:
        """See the base class."""
        plan = language_plan(planned)
        return load_run_data(config, tokenizer=plan.tokenizer, vocab_size=plan.rows, progress=progress)
