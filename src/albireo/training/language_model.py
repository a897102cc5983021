"""Which language model a run trains: its family, where its weights and its tokenizer come from, and how it is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from albireo.config import RunConfig
from albireo.data import TextTokenizer, load_tokenizer
from albireo.errors import ModelError
from albireo.models import (
    Family,
    Init,
    ModelChoice,
    Vocabulary,
    build_model,
    check_weights,
    configure_model,
    fetch_model,
    resolve_model,
)

__all__ = ["LanguageModelPlan", "plan_language_model"]


@dataclass(frozen=True)
class LanguageModelPlan:
    """A model that is chosen and not yet built.

    Attributes:
        choice: which model.
        init: where its weights come from.
        parameters: how many it has.
        rows: of its vocabulary, as far as is known before the tokenizer is.
        tokenizer: its own or the user's, which goes with it; None if there is none, or one is trained on the data.
    """

    choice: ModelChoice
    init: Init
    parameters: int
    rows: int
    tokenizer: TextTokenizer | None

    @property
    def family(self) -> Family:
        """What tells the model's parts."""
        return self.choice.family

    def build(
        self, tokenizer: TextTokenizer | None, config: RunConfig, device: torch.device
    ) -> tuple[PreTrainedModel, list[str]]:
        """Build the model on a device.

        Args:
            tokenizer: whose ids it is to read; None for random ids.
            config: seed and dropout.
            device: where.

        Returns:
            The model in fp32, and lines for the user.

        Raises:
            ModelError: the weights cannot be loaded, or do not go with the tokenizer.
        """
        model_config, lines = configure_model(
            self.choice, init=self.init, vocabulary=_vocabulary(tokenizer), dropout=config.model.dropout
        )
        model = build_model(self.choice, model_config, init=self.init, seed=config.schedule.seed, device=device)
        return model, lines


def plan_language_model(config: RunConfig) -> LanguageModelPlan:
    """Choose the model and its tokenizer.

    Args:
        config: a resolved configuration.

    Raises:
        ModelError: there is no such model, it cannot read sequences of this length, or its tokenizer is missing,
            damaged or larger than its weights.
    """
    choice = resolve_model(config.model.model)
    init: Init = "pretrained" if config.model.init == "pretrained" else "random"
    model_config, _ = configure_model(choice, init=init, sequence_length=config.data.sequence_length)
    try:
        parameters = choice.family.count_parameters(model_config)
    except ModelError as error:
        raise ModelError(f"--model {choice.name}: {error}") from error
    # Before the data: whoever is off line, or has damaged weights, should not wait for it to be tokenized.
    name = config.model.tokenizer
    if init == "pretrained":
        choice = fetch_model(choice)
        name = name or str(choice.folder)
        if choice.folder is not None:
            check_weights(choice.folder, choice.family, model_config)
    # Random ids come of no tokenizer, and a model's folder may have none.
    tokenizer = load_tokenizer(name) if name is not None and config.data.data != "random" else None
    configure_model(choice, init=init, vocabulary=_vocabulary(tokenizer))
    return LanguageModelPlan(
        choice=choice,
        init=init,
        parameters=parameters,
        rows=int(model_config.vocab_size),
        tokenizer=tokenizer,
    )


def _vocabulary(tokenizer: TextTokenizer | None) -> Vocabulary | None:
    if tokenizer is None:
        return None
    return Vocabulary(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
