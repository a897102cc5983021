"""Which language model a run trains: its family, where its weights and its tokenizer come from, and how it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from albireo.adapters import (
    LoraPlan,
    QuantisedLayer,
    attach_adapter,
    count_lora,
    count_weights,
    require_peft,
)
from albireo.config import LanguageDataConfig, LanguageModelConfig, RunConfig
from albireo.data import TextTokenizer, load_tokenizer
from albireo.errors import ModelError
from albireo.models import (
    Family,
    Init,
    ModelChoice,
    QuantisedWeights,
    Vocabulary,
    build_model,
    build_model_lazily,
    check_weights,
    configure_model,
    fetch_model,
    materialise,
    resolve_model,
)
from albireo.ops.quantise import Code
from albireo.sharding import WeightSource, WithOwnValues
from albireo.training.language_data import LanguageData
from albireo.training.recipe import ModelPlan, RunData

__all__ = ["LanguageModelPlan", "lora_plan", "plan_language_model"]


@dataclass(frozen=True)
class LanguageModelPlan(ModelPlan):
    """A model that is chosen and not yet built.

    Attributes:
        choice: which model.
        init: where its weights come from.
        parameters: how many it has, an adapter's too.
        trained: how many of them are trained.
        rows: of its vocabulary, as far as is known before the tokenizer is.
        tokenizer: its own or the user's, which goes with it; None if there is none, or one is trained on the data.
    """

    choice: ModelChoice
    init: Init
    parameters: int
    trained: int
    rows: int
    tokenizer: TextTokenizer | None

    @property
    def family(self) -> Family:
        """What tells the model's parts."""
        return self.choice.family

    def identity(self, config: RunConfig) -> Mapping[str, str]:
        """Return the adapter, whose shapes alone do not tell what it computes."""
        adapter = lora_plan(config)
        return {} if adapter is None else {"adapter": adapter.describe()}

    def fetched(self, config: RunConfig) -> LanguageModelPlan:
        """Return the plan with its weights on this machine and its tokenizer loaded, after a look at both.

        Whoever is off line, or has damaged weights or too large a tokenizer, should not wait for text to be tokenized.

        Args:
            config: as for `plan_language_model`.

        Raises:
            ModelError: weights or tokenizer are missing or damaged, or do not go together.
        """
        choice, name = self.choice, _model_options(config).tokenizer
        if self.init == "pretrained":
            choice = fetch_model(choice)
            name = name or str(choice.folder)
        # Random ids come of no tokenizer, and a model's folder may have none.
        tokenizer = load_tokenizer(name) if name is not None and config.data.data != "random" else None
        if self.init == "pretrained" and choice.folder is not None:
            check_weights(choice.folder, choice.family, choice.config())
        configure_model(choice, init=self.init, vocabulary=_vocabulary(tokenizer))
        return dataclasses.replace(self, choice=choice, tokenizer=tokenizer)

    def build(self, data: RunData, config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
        """Build the model on a device.

        Args:
            data: whose ids it is to read.
            config: seed and dropout.
            device: where.

        Returns:
            The model in fp32, and lines for the user.

        Raises:
            ModelError: the weights cannot be loaded, or do not go with the tokenizer.
        """
        return self.build_for(_tokenizer_of(data), config, device)

    def build_lazily(self, data: RunData, config: RunConfig) -> tuple[PreTrainedModel, WeightSource, list[str]]:
        """Build the same model without memory for its parameters; an adapter's have theirs, in host memory.

        Args:
            data: whose ids it is to read.
            config: seed and dropout.

        Returns:
            The model in fp32, with its parameters on the meta device; where their values come from, which is to be
            closed; and lines for the user.

        Raises:
            ModelError: the weights cannot be found, or do not go with the tokenizer.
        """
        model_config, lines = self._configured(_tokenizer_of(data), config)
        model, values = build_model_lazily(self.choice, model_config, init=self.init, seed=config.schedule.seed)
        source: WeightSource = values
        try:
            said, waiting = self._with_adapter(model, config)
        except BaseException:
            source.close()
            raise
        if config.adapter.is_on:
            source = WithOwnValues(QuantisedWeights(source, waiting) if waiting else source)
        return model, source, lines + said

    def build_for(
        self, tokenizer: TextTokenizer | None, config: RunConfig, device: torch.device
    ) -> tuple[PreTrainedModel, list[str]]:
        """Build the model on a device; see `build`.

        Args:
            tokenizer: whose ids it is to read; None for random ids.
            config: seed and dropout.
            device: where.
        """
        model_config, lines = self._configured(tokenizer, config)
        model = build_model(self.choice, model_config, init=self.init, seed=config.schedule.seed, device=device)
        said, _ = self._with_adapter(model, config)
        return model, lines + said

    def _with_adapter(self, model: PreTrainedModel, config: RunConfig) -> tuple[list[str], list[QuantisedLayer]]:
        """Put the run's adapter on a model, if there is one, and say so; return quantised layers that have no memory."""
        adapter = lora_plan(config)
        if adapter is None:
            return [], []
        waiting = attach_adapter(model, adapter, seed=config.schedule.seed)
        # Counted here: a vocabulary that fits the data was not known when the plan was made.
        parameters = count_weights(model)
        share = f"{self.trained:,} of {parameters:,} parameters are trained ({100 * self.trained / parameters:.4f}%)"
        return [f"adapter    {adapter.describe()}: {share}"], waiting

    def empty(self, tokenizer: TextTokenizer | None, config: RunConfig, *, with_adapter: bool) -> PreTrainedModel:
        """Return the model in host memory, in fp32 and uninitialised.

        Args:
            tokenizer: whose ids it reads; None for random ids.
            config: the run.
            with_adapter: put the run's adapter on it.
        """
        model_config, _ = self._configured(tokenizer, config)
        model_config.dtype = torch.float32
        model = self.family.make_model(model_config)
        materialise(model, torch.device("cpu"))
        adapter = lora_plan(config) if with_adapter else None
        if adapter is not None:
            attach_adapter(model, adapter, seed=config.schedule.seed)
        return model

    def _configured(self, tokenizer: TextTokenizer | None, config: RunConfig) -> tuple[PreTrainedConfig, list[str]]:
        return configure_model(
            self.choice, init=self.init, vocabulary=_vocabulary(tokenizer), dropout=config.model.dropout
        )


def plan_language_model(config: RunConfig, family: Family | None = None) -> LanguageModelPlan:
    """Choose the model. Nothing is fetched and no weight is read yet: see `LanguageModelPlan.fetched`.

    Args:
        config: a resolved configuration of a language recipe.
        family: which the model must be of; any if None.

    Raises:
        ModelError: there is no such model, or it cannot read sequences of this length.
        ConfigError: an adapter is to be put on what the model has not.
    """
    choice = resolve_model(config.model.model, family)
    init: Init = "pretrained" if config.model.init == "pretrained" else "random"
    length = config.data.sequence_length if isinstance(config.data, LanguageDataConfig) else None
    model_config, _ = configure_model(choice, init=init, sequence_length=length)
    try:
        shapes = choice.family.make_model(model_config)
    except ModelError as error:
        raise ModelError(f"--model {choice.name}: {error}") from error
    parameters = trained = sum(parameter.numel() for parameter in shapes.parameters())
    plan = lora_plan(config)
    if plan is not None:
        require_peft()  # now, and not when the data has been read
        trained = count_lora(shapes, plan)
        parameters += trained
    return LanguageModelPlan(
        choice=choice,
        init=init,
        parameters=parameters,
        trained=trained,
        rows=int(model_config.vocab_size),
        tokenizer=None,
    )


def lora_plan(config: RunConfig) -> LoraPlan | None:
    """Return the adapter that a resolved configuration asks for, or None.

    Args:
        config: with its adapter's targets.
    """
    adapter = config.adapter
    if not adapter.is_on:
        return None
    rank = adapter.lora_rank or 8
    base: Code | None = {8: "int8", 4: "nf4"}.get(adapter.bits or 0)  # type: ignore[assignment]
    return LoraPlan(rank, adapter.lora_alpha or 2.0 * rank, adapter.lora_dropout or 0.0, adapter.targets, base)


def _model_options(config: RunConfig) -> LanguageModelConfig:
    if not isinstance(config.model, LanguageModelConfig):
        raise TypeError(f"expected a language recipe's configuration, not {config.recipe}'s")
    return config.model


def _tokenizer_of(data: RunData) -> TextTokenizer | None:
    return data.tokenizer if isinstance(data, LanguageData) else None


def _vocabulary(tokenizer: TextTokenizer | None) -> Vocabulary | None:
    if tokenizer is None:
        return None
    return Vocabulary(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
