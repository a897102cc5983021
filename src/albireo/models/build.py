"""From a choice to a model in memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from albireo.errors import ModelError
from albireo.models.choice import ModelChoice, fetch_model
from albireo.models.initialise import initialise, initialise_module
from albireo.models.lazy import LazyInitContext
from albireo.models.pretrained import load_weights, weight_files
from albireo.models.vocabulary import Init, Vocabulary, reconcile_vocabulary
from albireo.models.weight_sources import FolderWeights, RandomWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build_model", "build_model_lazily", "configure_model", "materialise"]


def configure_model(
    choice: ModelChoice,
    *,
    init: Init,
    vocabulary: Vocabulary | None = None,
    dropout: float = 0.0,
    sequence_length: int | None = None,
) -> tuple[PreTrainedConfig, list[str]]:
    """Decide a model's configuration, without memory for its weights.

    Args:
        choice: which model.
        init: where the weights come from.
        vocabulary: what the tokenizer asks for; None keeps the model's own.
        dropout: the probability with which hidden states are dropped.
        sequence_length: tokens a text; None if it is not known yet.

    Returns:
        The configuration, and lines that tell the user where model and tokenizer differ.

    Raises:
        ModelError: model, tokenizer and sequence length do not go together, or there are no trained weights.
    """
    if init == "pretrained" and choice.hub_id is None:
        if choice.folder is None:
            raise ModelError(f"the model {choice.name} has no published weights: use --init random")
        weight_files(choice.folder)
    config = choice.config(dropout=dropout)
    limit = choice.family.max_sequence_length(config)
    if sequence_length is not None and sequence_length > limit:
        raise ModelError(
            f"--sequence-length {sequence_length} is more than the {limit} positions of the model {choice.name}: "
            f"use {limit} or less"
        )
    lines: list[str] = []
    if vocabulary is not None:
        if not choice.family.has_padding_row:
            vocabulary = dataclasses.replace(vocabulary, pad=None)
        fits = choice.size is not None and choice.family.sizes[choice.size].fits_vocabulary
        changes, lines = reconcile_vocabulary(config, vocabulary, init=init, fits_vocabulary=fits)
        config.update(changes)
    return config, lines


def build_model(
    choice: ModelChoice,
    config: PreTrainedConfig,
    *,
    init: Init,
    seed: int,
    device: torch.device | str = "cpu",
    new_head: bool = False,
) -> PreTrainedModel:
    """Build a model in fp32, in training mode, with its weights on a device.

    It takes no more memory than the weights, and a few megabytes or one tensor of a file besides.

    Args:
        choice: which model.
        config: from `configure_model`.
        init: random weights, decided by the seed, or trained ones, from the choice's folder or the hub.
        seed: decides random weights.
        device: where the weights go.
        new_head: the head is random, whatever the rest is: it is for other classes.

    Raises:
        ModelError: the weights cannot be found, read, or do not fit the configuration.
    """
    family = choice.family
    if init == "pretrained":
        choice = fetch_model(choice)
    config.dtype = torch.float32
    model = family.make_model(config)
    materialise(model, torch.device(device))
    if init == "pretrained" and choice.folder is not None:
        load_weights(model, choice.folder, family, but_head=new_head)
        if new_head:
            initialise_module(family.head(model), family.head_name, seed, config)
    else:
        initialise(model, seed)
    model.train()
    return model


def build_model_lazily(
    choice: ModelChoice, config: PreTrainedConfig, *, init: Init, seed: int, new_head: bool = False
) -> tuple[PreTrainedModel, FolderWeights | RandomWeights]:
    """Build the model that `build_model` does, in fp32 and in training mode, without memory for its parameters.

    Args:
        choice: which model.
        config: from `configure_model`.
        init: random weights, decided by the seed, or trained ones, from the choice's folder or the hub.
        seed: decides random weights.
        new_head: the head is random, whatever the rest is.

    Returns:
        The model, whose parameters are on the meta device and whose buffers are in host memory; and where the values
        of its parameters come from, which is to be closed.

    Raises:
        ModelError: the weights cannot be found, or do not fit the configuration.
    """
    family = choice.family
    if init == "pretrained":
        choice = fetch_model(choice)
    config.dtype = torch.float32
    # The family asks for the meta device, for buffers too. The context has seen how they come to be.
    with LazyInitContext(seed=seed):
        model = family.make_model(config)
    nn.Module.float(model)
    model.train()
    if init == "pretrained" and choice.folder is not None:
        head = RandomWeights(model, seed) if new_head else None
        return model, FolderWeights(model, choice.folder, family, head=head)
    return model, RandomWeights(model, seed)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory, in fp32 and uninitialised. Parameters that are one stay one.

    Args:
        model: the model.
        device: where to.

    Raises:
        ModelError: it has a buffer, which neither a seed nor a file of weights would fill.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                raise ModelError(f"the buffer {prefix}.{name} of a {type(module).__name__} would stay uninitialised")
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                empty = torch.empty_like(parameter, dtype=torch.float32, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
