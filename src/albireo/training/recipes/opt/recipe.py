"""The recipe opt: an OPT language model on text, packed into blocks of one length."""

from __future__ import annotations

from albireo.config import RunConfig
from albireo.models import OPT
from albireo.training.language_recipe import LanguageRecipe, language_plan
from albireo.training.progress import Progress
from albireo.training.recipe import ModelPlan, RunData
from albireo.training.recipes.opt.data import check_run_data, load_run_data

__all__ = ["OptRecipe"]


class OptRecipe(LanguageRecipe):
    """OPT on text."""

    name = "opt"
    title = "OPT"
    family = OPT

    def check(self, config: RunConfig) -> None:
        """See the base class."""
        check_run_data(config)

    def load_data(self, config: RunConfig, planned: ModelPlan, progress: Progress) -> RunData:
        """See the base class."""
        plan = language_plan(planned)
        return load_run_data(config, tokenizer=plan.tokenizer, vocab_size=plan.rows, progress=progress)
