"""The typed configuration of a run: each option is declared once, here, and flags and files follow from it."""

from albireo.config.adapter import AdapterConfig
from albireo.config.facts import MachineFacts
from albireo.config.layers import config_from_mapping, config_to_mapping, merge, read_config_file
from albireo.config.option import OptionInfo, option, options_of
from albireo.config.paths import user_path
from albireo.config.recipes import (
    RECIPE_SECTIONS,
    DataConfig,
    InstructionConfig,
    LanguageDataConfig,
    LanguageModelConfig,
    ModelConfig,
    PictureConfig,
    PictureModelConfig,
    TextConfig,
)
from albireo.config.resolve import resolve
from albireo.config.run import OptimizerConfig, PluginConfig, RunConfig, ScheduleConfig

__all__ = [
    "RECIPE_SECTIONS",
    "AdapterConfig",
    "DataConfig",
    "InstructionConfig",
    "LanguageDataConfig",
    "LanguageModelConfig",
    "MachineFacts",
    "ModelConfig",
    "OptimizerConfig",
    "OptionInfo",
    "PictureConfig",
    "PictureModelConfig",
    "PluginConfig",
    "RunConfig",
    "ScheduleConfig",
    "TextConfig",
    "config_from_mapping",
    "config_to_mapping",
    "merge",
    "option",
    "options_of",
    "read_config_file",
    "resolve",
    "user_path",
]
