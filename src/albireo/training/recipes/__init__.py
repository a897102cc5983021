"""The recipes there are. Each is a folder of the same files: `recipe.py` says what it does, `data.py` what it reads.

Another recipe is another such folder, its sections in `albireo.config.recipes`, and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from albireo.errors import ConfigError
from albireo.training.recipe import Recipe
from albireo.training.recipes.gpt2.recipe import Gpt2Recipe
from albireo.training.recipes.opt.recipe import OptRecipe
from albireo.training.recipes.vit.recipe import VitRecipe

__all__ = ["RECIPES", "recipe_of"]

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (OptRecipe(), Gpt2Recipe(), VitRecipe())}
)


def recipe_of(name: str) -> Recipe:
    """Return a recipe.

    Args:
        name: as in `albireo train NAME`.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"a recipe is one of {', '.join(RECIPES)}, not {name!r}")
    return RECIPES[name]
