"""What options each recipe has, and what it decides for them."""

from __future__ import annotations

from typing import Any

import pytest

from albireo.config import (
    RECIPE_SECTIONS,
    MachineFacts,
    RunConfig,
    TextConfig,
    config_from_mapping,
    config_to_mapping,
    merge,
    resolve,
)
from albireo.errors import ConfigError

CPU = MachineFacts("cpu", 1, bf16_is_native=False)


def resolved(recipe: str, **options: Any) -> RunConfig:
    return resolve(merge(RunConfig.of(recipe), options), CPU)


@pytest.mark.parametrize("recipe", RECIPE_SECTIONS)
def test_every_recipe_declares_each_option_once_and_explains_it(recipe: str) -> None:
    names = [info.name for info in RunConfig.options(recipe)]
    assert len(names) == len(set(names))
    assert all(len(info.help) > 10 for info in RunConfig.options(recipe))
    assert RunConfig.of(recipe).recipe == recipe


def test_an_option_of_another_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="the recipe gpt2 has no option 'text_field'"):
        merge(RunConfig.of("gpt2"), {"text_field": "body"})
    with pytest.raises(ConfigError, match="the recipe opt has no option 'loss_on'"):
        merge(RunConfig.of("opt"), {"loss_on": "all"})
    with pytest.raises(ConfigError, match=r"unknown key data\.text_field"):
        config_from_mapping({"data": {"text_field": "a"}}, where="mine.json", base=RunConfig.of("gpt2"))
    with pytest.raises(ConfigError, match="model of the recipe 'gpt2' is a Gpt2ModelConfig"):
        RunConfig("gpt2", data=TextConfig())
    with pytest.raises(ConfigError, match="a recipe is one of opt, gpt2, vit, not 'vti'"):
        RunConfig.of("vti")


def test_gpt2s_defaults() -> None:
    config = resolved("gpt2", data="a.json")
    assert (config.model.model, config.model.init) == ("124m", "pretrained")
    assert (config.data.sequence_length, config.data.loss_on, config.data.bucket) == (1024, "answer", 8)
    assert (config.optimizer.learning_rate, config.optimizer.batch_size, config.schedule.epochs) == (5e-5, 8, 3.0)
    tiny = resolved("gpt2", model="tiny")
    assert (tiny.model.init, tiny.data.sequence_length, tiny.optimizer.learning_rate) == ("random", 128, 1e-3)


def test_a_bucket_is_a_step_and_stays_what_it_was() -> None:
    begun = resolved("gpt2", batch_size=2, accumulate=3, gpus=4)
    assert begun.data.bucket == 24
    again = config_from_mapping(config_to_mapping(begun), where="config.json", base=RunConfig.of("gpt2"))
    assert resolve(merge(again, {"batch_size": 7}), CPU).data.bucket == 24
    assert resolved("gpt2", data="random").data.bucket is None
    assert RunConfig.of("gpt2").data.left_open == ("sequence_length", "bucket")
    assert begun.data.left_open == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "random", "tokenizer": "a/b"}, "needs no --tokenizer"),
        ({"data": "random", "loss_on": "all"}, "--loss-on all says nothing"),
        ({"data": "random", "bucket": 4}, "--bucket 4 says nothing"),
        ({"data": "synthetic", "max_malformed": 3.0}, "--max-malformed 3 says nothing"),
        ({"lora_rank": 4}, "--lora-rank is for --adapter lora"),
        ({"lora_alpha": 4.0}, "--lora-alpha is for --adapter lora"),
        ({"lora_dropout": 0.1}, "--lora-dropout is for --adapter lora"),
        ({"lora_targets": "c_fc"}, "--lora-targets is for --adapter lora"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolved("gpt2", model="tiny", **options)


@pytest.mark.parametrize("recipe", RECIPE_SECTIONS)
def test_an_adapters_defaults(recipe: str) -> None:
    config = resolved(recipe, model="125m" if recipe == "opt" else "124m", adapter="lora")
    adapter = config.adapter
    assert (adapter.lora_rank, adapter.lora_alpha, adapter.lora_dropout) == (8, 16.0, 0.0)
    assert config.optimizer.learning_rate == 3e-4
    assert not config.drops_out
    assert resolved(recipe, model="tiny", adapter="lora", lora_rank=2).adapter.lora_alpha == 4.0
    assert resolved(recipe, model="tiny", adapter="lora", lora_dropout=0.1).drops_out
    # Another kind of adapter begins with its own defaults.
    assert merge(config, {"adapter": "none"}).adapter == RunConfig.of(recipe).adapter


def test_targets_are_names_with_commas() -> None:
    def targets(text: str) -> tuple[str, ...]:
        return merge(RunConfig(), {"adapter": "lora", "lora_targets": text}).adapter.targets

    assert targets("q_proj, fc1,,q_proj ") == ("q_proj", "fc1")
    with pytest.raises(ConfigError, match="at least one name"):
        targets(" , ")
