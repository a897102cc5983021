"""What recipes for language models share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.training.language_recipe import language_options, language_plan
from albireo.training.recipes import RECIPES, recipe_of

CPU = torch.device("cpu")


def config_of(**options: Any) -> RunConfig:
    return resolve(merge(RunConfig(), options), MachineFacts("cpu", 1, False))


def test_logits_are_counted_a_piece_at_a_time() -> None:
    recipe = recipe_of("opt")

    def counted(rows: int, **options: Any) -> int:
        config = config_of(model="125m", init="random", **options)
        return recipe.output_bytes(config, dataclasses.replace(language_plan(recipe.plan(config)), rows=rows), CPU)

    assert counted(100, sequence_length=5, batch_size=2) == 10 * 100 * 8
    assert 2**20 < counted(50272, batch_size=32) < 2**30


def test_checkpoints_stand_and_fall_with_a_size_and_not_with_a_folder() -> None:
    recipe = recipe_of("opt")
    known = {flag: value for flag, value in recipe.fixed(config_of(sequence_length=16)).items() if value is not None}
    assert known == {"--sequence-length": 16, "--holdout": 0.05, "--model": "tiny", "--adapter": "none"}
    adapted = recipe.fixed(config_of(adapter="lora", lora_rank=4))
    assert (adapted["--adapter"], adapted["--lora-rank"], adapted["--lora-alpha"]) == ("lora", 4, 8.0)
    assert recipe.fixed(config_of(model="/a/folder"))["--model"] is None


def test_each_recipe_goes_by_its_name() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}


def test_another_recipes_parts_are_a_fault_of_the_caller() -> None:
    with pytest.raises(TypeError, match="plan"):
        language_plan(object())  # type: ignore[arg-type]
    assert language_options(config_of()).sequence_length == 128
