"""What a family of models is: its sizes, and where in a transformers model its parts are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from albireo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Family", "Size"]


@dataclass(frozen=True)
class Size:
    """One named size of a family.

    Attributes:
        hub_id: where its trained weights are; None if nobody publishes them.
        config: what sets it apart from the family's other sizes, in the names of the family's configuration.
        fits_vocabulary: the rows of its embedding are those of the tokenizer, not a published number.
    """

    hub_id: str | None
    config: Mapping[str, Any]
    fits_vocabulary: bool = False


@dataclass(frozen=True)
class Family:
    """A family of models, as transformers builds them: a backbone of equal blocks, and a head.

    It knows names and counts; the models themselves are transformers' own, and none of their code is changed.

    Attributes:
        name: the family's `model_type` in transformers.
        sizes: the named sizes, smallest first.
        model_class: name of the class in transformers that has the head.
        config_class: name of its configuration's class.
        backbone_name: the module that turns token ids into hidden states.
        head_name: the `nn.Linear` that turns hidden states into logits.
        blocks_name: the list of equal blocks.
        shared_config: what is the same for all sizes.
        dropout_names: options that the user's dropout sets.
        no_dropout_names: options of other kinds of dropout, which are always 0 here.
        prefixes: older beginnings of names in files of weights, each with today's.
        obsolete_names: names in older files that hold no weight.
        obsolete_endings: the same, by the ends of names.
        lora_targets: the modules that get an adapter, by the last parts of their names.
        aliases: other names of sizes.
        std_name: the option with the standard deviation of random weights.
        residual_endings: ends of the names of weights that write to the residual stream and begin smaller, by the root
            of how many there are.
        renames: parts of names as files of weights have them, each with what the model in memory has instead; in order.
        older_blocks_name: what the list of blocks is called in older versions of transformers.
        older_lora_targets: the same of the modules that get an adapter.
        drawn_names: last parts of the names of parameters that lie in no layer of their own, and begin as weights do.
        has_padding_row: the embedding keeps a row of zeros for the padding id. Without one, padding is the business of
            whoever makes the batches, and the model knows no such id.
    """

    name: str
    sizes: Mapping[str, Size]
    model_class: str
    config_class: str
    backbone_name: str
    head_name: str
    blocks_name: str
    shared_config: Mapping[str, Any]
    dropout_names: tuple[str, ...]
    no_dropout_names: tuple[str, ...]
    prefixes: Mapping[str, str]
    obsolete_names: tuple[str, ...]
    lora_targets: tuple[str, ...]
    obsolete_endings: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    std_name: str = "init_std"
    residual_endings: tuple[str, ...] = ()
    has_padding_row: bool = True
    renames: Mapping[str, str] = field(default_factory=dict)
    older_blocks_name: str = ""
    older_lora_targets: tuple[str, ...] = ()
    drawn_names: tuple[str, ...] = ()

    def parse_size(self, name: str) -> str | None:
        """Return the size that a user means by `1.3b`, `1.3`, `OPT-1.3B`; None if it is no size of this family.

        Args:
            name: as typed. A hub id, with a slash, is never a size.
        """
        text = name.strip().lower().removeprefix(f"{self.name}-")
        text = self.aliases.get(text, text)
        if text in self.sizes:
            return text
        matches = [size for size in self.sizes if size[:-1] == text and text[-1:].isdigit()]
        return matches[0] if len(matches) == 1 else None

    def config_for(self, size: str, *, vocab_size: int | None = None, dropout: float = 0.0) -> PreTrainedConfig:
        """Return the configuration of a named size.

        Args:
            size: a key of `sizes`.
            vocab_size: rows of the embedding; the size's own number if None.
            dropout: the probability with which hidden states are dropped.

        Raises:
            ModelError: there is no such size.
        """
        if size not in self.sizes:
            raise ModelError(f"{self.name} has no size {size!r}: choose one of {', '.join(self.sizes)}")
        options = {**self.shared_config, **self.sizes[size].config, **self.dropout_options(dropout)}
        if vocab_size is not None:
            options["vocab_size"] = vocab_size
        return self.make_config(options)

    def dropout_options(self, dropout: float) -> dict[str, float]:
        """Return the options of a configuration that set dropout to a probability."""
        return dict.fromkeys(self.no_dropout_names, 0.0) | dict.fromkeys(self.dropout_names, dropout)

    def make_config(self, options: Mapping[str, Any]) -> PreTrainedConfig:
        """Return a configuration of this family with options in its own names."""
        config: PreTrainedConfig = _class(self.config_class).from_dict(dict(options))
        return config

    def make_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Return a model without memory for its weights: all of it is on the meta device.

        Tied weights are one parameter already. Draws no random numbers.

        Raises:
            ModelError: no such model can be built; for instance, its heads do not divide its width.
        """
        try:
            with torch.device("meta"):
                model: PreTrainedModel = _class(self.model_class)(config)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"this configuration describes no {self.name} model: {error}") from error
        return model

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """Return the module that turns token ids into hidden states."""
        return model.get_submodule(self.backbone_name)

    def head(self, model: PreTrainedModel) -> nn.Linear:
        """Return the module that turns hidden states into logits.

        Raises:
            ModelError: it is no plain `nn.Linear`, so that its weight alone does not tell what it computes.
        """
        head = model.get_submodule(self.head_name)
        if not isinstance(head, nn.Linear):
            raise ModelError(f"the head {self.head_name} is a {type(head).__name__}: expected a torch.nn.Linear")
        return head

    def blocks(self, model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
        """Return the names and modules of the model's equal blocks, in the order of the forward."""
        place = self.blocks_name
        try:
            blocks = model.get_submodule(place)
        except AttributeError:
            place = self.older_blocks_name
            blocks = model.get_submodule(place)
        return [(f"{place}.{name}", block) for name, block in blocks.named_children()]

    def lora_targets_of(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return the modules of a model that get an adapter, as the version of transformers that there is names them."""
        last_parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return self.lora_targets if last_parts.issuperset(self.lora_targets) else self.older_lora_targets

    def renamed(self, name: str) -> str:
        """Return what the model in memory calls a tensor of a file."""
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return name

    def forward_arguments(self, input_ids: Tensor) -> dict[str, Any]:
        """Return what to call the backbone with, for texts without padding.

        Positions are given, so that the model does not add them up from a mask of ones, and are one row for all
        texts, so that their gradient is summed before it is scattered. Nothing is cached: keys and values would stay.

        Args:
            input_ids: `[batch, sequence]`.
        """
        positions = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return {"input_ids": input_ids, "position_ids": positions[None], "use_cache": False}

    def is_obsolete(self, name: str) -> bool:
        """Return True if a name in an older file holds no weight."""
        return name in self.obsolete_names or name.endswith(self.obsolete_endings)

    def weight_std(self, name: str, config: PreTrainedConfig) -> float:
        """Return the standard deviation with which a random weight begins.

        Args:
            name: the weight's name in the model.
            config: the model's.
        """
        std = float(getattr(config, self.std_name))
        if self.residual_endings and name.endswith(self.residual_endings):
            std /= math.sqrt(2 * config.num_hidden_layers)  # attention and MLP of each block
        return std

    def max_sequence_length(self, config: PreTrainedConfig) -> int:
        """Return how many tokens a text can have."""
        return int(config.max_position_embeddings)

    def count_parameters(self, config: PreTrainedConfig) -> int:
        """Return the exact number of parameters, tied ones once. Takes no memory for them."""
        return sum(parameter.numel() for parameter in self.make_model(config).parameters())

    def flops_per_token(self, config: PreTrainedConfig, sequence_length: int) -> float:
        """Return the floating-point operations of one token's forward and backward.

        6 for each parameter (a multiplication and an addition, in the forward and twice in the backward), and the
        products of causal attention, which the weights do not show: queries with keys and probabilities with values
        are 2 x 2 x width a layer for each of the sequence's tokens, half of them masked, times 3 for forward and
        backward: 6 x layers x width x sequence length. Recomputation is not counted (the model FLOPs of PaLM,
        appendix B, with attention halved).

        Args:
            config: the model's.
            sequence_length: tokens a text.
        """
        attention = 6 * config.num_hidden_layers * config.hidden_size * sequence_length
        return float(6 * self.count_parameters(config) + attention)


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)
