"""The sections that differ from recipe to recipe: which model, and what it is trained on.

A recipe has the options of its own sections and no others, so one that it does not have cannot be given to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Self

from albireo.config.option import option
from albireo.errors import ConfigError

__all__ = [
    "RECIPE_SECTIONS",
    "DataConfig",
    "Gpt2ModelConfig",
    "InstructionConfig",
    "LanguageDataConfig",
    "LanguageModelConfig",
    "ModelConfig",
    "PictureConfig",
    "PictureModelConfig",
    "TextConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """What is trained: what every recipe has."""

    model: str = option("tiny", "A size, a Hugging Face folder, or a hub id.", metavar="NAME")
    init: Literal["pretrained", "random"] | None = option(
        None, "Where the weights come from. Default: random for tiny, pretrained otherwise."
    )
    dropout: float = option(0.0, "Dropout of the hidden states.", minimum=0.0, maximum=0.95)
    checkpointing: bool = option(
        False, "Activation checkpointing: recompute activations in backward, a block at a time, to save memory."
    )
    checkpointing_slack: float = option(
        0.05,
        "With --checkpointing on a GPU: how much more memory a step may take, as a share of its peak, so that fewer blocks "
        "are recomputed.",
        minimum=0.0,
        maximum=100.0,
    )

    @property
    def is_tiny(self) -> bool:
        """The small model of its recipe, which has defaults of its own."""
        return self.model == "tiny"

    @property
    def paths(self) -> tuple[str, ...]:
        """Options that may be paths, and are made absolute."""
        return ()


@dataclass(frozen=True)
class LanguageModelConfig(ModelConfig):
    """What language models have besides, and OPT's sizes."""

    model: str = option(
        "tiny",
        "A size (tiny, 125m, 350m, 1.3b, 2.7b, 6.7b, 13b, 30b, 66b, 175b), a Hugging Face folder, or a hub id.",
        metavar="NAME",
    )
    tokenizer: str | None = option(
        None,
        "A folder (tokenizer.json, or vocab.json and merges.txt) or a hub id. Default: the model's own; for random "
        "weights, one trained on the data.",
        metavar="PATH",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """See the base class."""
        return ("tokenizer",)


@dataclass(frozen=True)
class DataConfig:
    """What every recipe's data has."""

    data: str = option("synthetic", "What to train on.", metavar="NAME")
    holdout: float = option(
        0.05,
        "The share held out for evaluation, where the data has no validation part of its own.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=0.5,
    )
    cache: str | None = option(
        None, "Where tokenized data is kept. Default: $ALBIREO_CACHE, or albireo in the user's cache.", metavar="DIR"
    )

    @property
    def is_made_up(self) -> bool:
        """The data is no path and no name on the hub: it is made on the spot."""
        return self.data in ("synthetic", "random")

    @property
    def left_open(self) -> tuple[str, ...]:
        """Options that `resolved` decides and that nobody has decided."""
        return ()

    def resolved(self, *, tiny: bool, samples_per_step: int) -> Self:  # noqa: ARG002  for recipes that need them
        """Return the section with every default decided that does not need the data.

        Args:
            tiny: the model is the small one.
            samples_per_step: samples of the global batch.
        """
        return self

    def check(self, model: ModelConfig) -> None:
        """Refuse options that the data has no use for: none is silently ignored.

        Args:
            model: the model's section.

        Raises:
            ConfigError: with what to do instead.
        """


@dataclass(frozen=True)
class LanguageDataConfig(DataConfig):
    """What data for a language model has: text, or token ids."""

    sequence_length: int | None = option(None, "Tokens in a sample. Default: 128 for tiny, 1024 otherwise.", minimum=2)

    @property
    def left_open(self) -> tuple[str, ...]:
        """See the base class."""
        return ("sequence_length",) if self.sequence_length is None else ()

    def resolved(self, *, tiny: bool, samples_per_step: int) -> Self:
        """See the base class."""
        decided = super().resolved(tiny=tiny, samples_per_step=samples_per_step)
        return dataclasses.replace(decided, sequence_length=self.sequence_length or (128 if tiny else 1024))

    def check(self, model: ModelConfig) -> None:
        """See the base class."""
        if self.data == "random" and isinstance(model, LanguageModelConfig) and model.tokenizer is not None:
            raise ConfigError(
                "--data random is made of ids, not of text, and needs no --tokenizer: leave one of them out"
            )


@dataclass(frozen=True)
class TextConfig(LanguageDataConfig):
    """Text for the recipe opt, packed into blocks."""

    data: str = option(
        "synthetic",
        "synthetic; a text file or a folder of them; JSON lines; a hub data set such as wikitext/wikitext-2-raw-v1; "
        "or random (uniform random tokens, for measuring).",
        metavar="NAME",
    )
    holdout: float = option(
        0.05,
        "The share of blocks held out for evaluation, where the data has no validation part of its own.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=0.5,
    )
    sequence_length: int | None = option(None, "Tokens in a block. Default: 128 for tiny, 1024 otherwise.", minimum=2)
    text_field: str = option("text", "The field that holds the text in JSON lines and hub data sets.", metavar="FIELD")

    def check(self, model: ModelConfig) -> None:
        """See the base class."""
        super().check(model)
        if self.is_made_up and self.text_field != TextConfig.text_field:
            raise ConfigError(
                f"--data {self.data} has no fields, so --text-field {self.text_field} says nothing: leave it out"
            )


@dataclass(frozen=True)
class Gpt2ModelConfig(LanguageModelConfig):
    """What the recipe gpt2 trains."""

    model: str = option(
        "124m", "A size (tiny, 124m, medium, large, xl), a Hugging Face folder, or a hub id.", metavar="NAME"
    )


@dataclass(frozen=True)
class InstructionConfig(LanguageDataConfig):
    """Instructions for the recipe gpt2, each a sample of its own length."""

    data: str = option(
        "synthetic",
        "Records with instruction, input and output: a .json or .jsonl file, a folder of them, a hub data set such as "
        "tatsu-lab/alpaca; synthetic; or random (uniform random tokens, for measuring).",
        metavar="NAME",
    )
    holdout: float = option(
        0.05,
        "The share of records held out for evaluation, where the data has no validation part of its own.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=0.5,
    )
    sequence_length: int | None = option(
        None,
        "The most tokens of a sample; what is longer is cut at its end. Default: 128 for tiny, 1024 otherwise.",
        minimum=2,
    )
    loss_on: Literal["answer", "all"] = option("answer", "The tokens that count: the answer's, or the prompt's too.")
    max_malformed: float = option(
        0.01,
        "How many records may be malformed and are left out: a share of all if below 1, a number otherwise.",
        minimum=0.0,
    )
    bucket: int | None = option(
        None,
        "So many samples of like length follow one another, which saves padding; 1 is random order. Default: the samples "
        "of one step.",
        minimum=1,
        maximum=10**9,
    )

    @property
    def left_open(self) -> tuple[str, ...]:
        """See the base class."""
        bucket = ("bucket",) if self.bucket is None and self.data != "random" else ()
        return (*super().left_open, *bucket)

    def resolved(self, *, tiny: bool, samples_per_step: int) -> Self:
        """See the base class."""
        decided = super().resolved(tiny=tiny, samples_per_step=samples_per_step)
        if self.data == "random":
            return decided
        return dataclasses.replace(decided, bucket=self.bucket or samples_per_step)

    def check(self, model: ModelConfig) -> None:
        """See the base class."""
        super().check(model)
        if self.data == "random":
            for flag, given, plain in (
                ("--loss-on", self.loss_on, InstructionConfig.loss_on),
                ("--bucket", self.bucket, None),
            ):
                if given != plain:
                    raise ConfigError(
                        f"--data random has no answers and one length only, so {flag} {given} says nothing: leave it out"
                    )
        if self.is_made_up and self.max_malformed != InstructionConfig.max_malformed:
            raise ConfigError(
                f"--data {self.data} has no malformed records, so --max-malformed {self.max_malformed:g} says nothing: "
                "leave it out"
            )


@dataclass(frozen=True)
class PictureModelConfig(ModelConfig):
    """What the recipe vit trains."""

    model: str = option(
        "base",
        "A size (tiny, small, base, large), a Hugging Face folder, or a hub id.",
        metavar="NAME",
    )


@dataclass(frozen=True)
class PictureConfig(DataConfig):
    """Pictures for the recipe vit, each of one class."""

    data: str = option(
        "synthetic",
        "A folder with a folder of pictures for each class, or with train and test folders of such; a hub data set such as "
        "AI-Lab-Makerere/beans; synthetic; or random (uniform noise, for measuring).",
        metavar="NAME",
    )
    holdout: float = option(
        0.1,
        "The share of pictures held out for evaluation, where the data has no test or validation part of its own.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=0.5,
    )
    cache: str | None = option(
        None,
        "Where it is kept which pictures can be read. Default: $ALBIREO_CACHE, or albireo in the user's cache.",
        metavar="DIR",
    )
    augment: bool = option(True, "Train on a random part of each picture, mirrored or not, another one in each epoch.")
    max_damaged: float = option(
        0.05,
        "How many pictures may be damaged and are left out: a share of all if below 1, a number otherwise.",
        minimum=0.0,
    )
    workers: int | None = option(
        None,
        "Processes that read pictures ahead; 0: none. Default: as many as cores are left, up to 8.",
        minimum=0,
        maximum=256,
    )

    def check(self, model: ModelConfig) -> None:
        """See the base class."""
        super().check(model)
        if self.is_made_up and self.max_damaged != PictureConfig.max_damaged:
            raise ConfigError(
                f"--data {self.data} has no damaged pictures, so --max-damaged {self.max_damaged:g} says nothing: leave it out"
            )


RECIPE_SECTIONS: Mapping[str, Mapping[str, type]] = MappingProxyType(
    {
        "opt": {"model": LanguageModelConfig, "data": TextConfig},
        "gpt2": {"model": Gpt2ModelConfig, "data": InstructionConfig},
        "vit": {"model": PictureModelConfig, "data": PictureConfig},
    }
)
"""Each recipe's own sections, by the names that they have in `RunConfig`."""
