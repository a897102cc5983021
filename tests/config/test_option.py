import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.config import RunConfig, options_of
from albireo.config.option import OptionInfo
from albireo.config.run import OptimizerConfig, PluginConfig, ScheduleConfig
from albireo.errors import ConfigError


def info(section: type, name: str) -> OptionInfo:
    return next(item for item in options_of("any", section) if item.name == name)


def test_every_option_is_declared_once_and_explained() -> None:
    names = [item.name for item in RunConfig.options()]
    assert len(names) == len(set(names))
    assert all(len(item.help) > 10 for item in RunConfig.options())


def test_flags_are_spelled_with_dashes() -> None:
    assert info(OptimizerConfig, "batch_size").flag == "--batch-size"


def test_choices_and_optional_are_read_from_the_annotation() -> None:
    precision = info(PluginConfig, "precision")
    assert precision.choices == ("fp32", "fp16", "bf16")
    assert precision.optional
    assert precision.kind is str
    assert not info(PluginConfig, "plugin").optional


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        (OptimizerConfig, "batch_size", 0, "--batch-size must be at least 1, not 0"),
        (OptimizerConfig, "batch_size", 2.5, "--batch-size takes a whole number, not 2.5"),
        (OptimizerConfig, "batch_size", True, "--batch-size takes a whole number, not True"),
        (OptimizerConfig, "weight_decay", "much", "--weight-decay takes a number, not 'much'"),
        (OptimizerConfig, "weight_decay", math.nan, "--weight-decay takes a finite number, not nan"),
        (OptimizerConfig, "clip", -1.0, "--clip must be at least 0, not -1.0"),
        (OptimizerConfig, "clip", None, "--clip takes a number, not None"),
        (ScheduleConfig, "epochs", 0.0, "--epochs must be more than 0, not 0.0"),
        (ScheduleConfig, "schedule", "linar", "--schedule is one of linear, cosine, constant, not 'linar'"),
        (PluginConfig, "tf32", "yes", "--tf32 takes true or false, not 'yes'"),
    ],
)
def test_a_wrong_value_is_named(section: type, name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        info(section, name).check(value)
    assert str(caught.value) == message


@given(st.integers(min_value=1, max_value=10**9))
def test_a_right_number_comes_back_as_it_is(value: int) -> None:
    assert info(OptimizerConfig, "batch_size").check(value) == value
    as_float = info(OptimizerConfig, "clip").check(value)
    assert as_float == value
    assert isinstance(as_float, float)
