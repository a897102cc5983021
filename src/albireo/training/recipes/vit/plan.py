"""Which model of pictures a run trains: where its weights come from, and how it is built."""

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
from albireo.config import RunConfig
from albireo.data import PictureForm, load_picture_form
from albireo.models import (
    VIT,
    Family,
    Init,
    ModelChoice,
    QuantisedWeights,
    build_model,
    build_model_lazily,
    check_weights,
    fetch_model,
    materialise,
    resolve_model,
)
from albireo.sharding import WeightSource, WithOwnValues
from albireo.training.language_model import lora_plan
from albireo.training.recipe import ModelPlan, RunData
from albireo.training.recipes.vit.data import PictureRunData

__all__ = ["PicturePlan", "plan_picture_model"]


@dataclass(frozen=True)
class PicturePlan(ModelPlan):
    """A model that is chosen and not yet built.

    Attributes:
        choice: which model.
        init: where its weights come from.
        parameters: how many it has, an adapter's too; of the head as many as for its own classes.
        trained: how many of them are trained.
        form: what it wants of a picture.
    """

    choice: ModelChoice
    init: Init
    parameters: int
    trained: int
    form: PictureForm

    @property
    def family(self) -> Family:
        """What tells the model's parts."""
        return self.choice.family

    def identity(self, config: RunConfig) -> Mapping[str, str]:
        """Return the adapter, whose shapes alone do not tell what it computes."""
        adapter = _adapter(config)
        return {} if adapter is None else {"adapter": adapter.describe()}

    def fetched(self, config: RunConfig) -> PicturePlan:  # noqa: ARG002  plans of other models need it
        """Return the plan with its weights on this machine, after a look at all but the head.

        Raises:
            ModelError: weights or image processor are missing or damaged, or do not go together.
        """
        choice, form = self.choice, self.form
        if self.init == "pretrained":
            choice = fetch_model(choice)
            if choice.folder is not None:
                own = choice.config()
                check_weights(choice.folder, choice.family, own, but_head=True)
                form = load_picture_form(choice.folder, _size(own))
        return dataclasses.replace(self, choice=choice, form=form)

    def build(self, data: RunData, config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
        """See the base class: the head is a new one where the classes are others than the model's own."""
        return self.build_for(_classes(data), config, device)

    def build_for(
        self, classes: tuple[str, ...], config: RunConfig, device: torch.device
    ) -> tuple[PreTrainedModel, list[str]]:
        """Build the model on a device; see `build`.

        Args:
            classes: the names of what it tells apart.
            config: seed, dropout and adapter.
            device: where.
        """
        model_config = self._config(classes, config)
        model = build_model(
            self.choice,
            model_config,
            init=self.init,
            seed=config.schedule.seed,
            device=device,
            new_head=self._has_new_head(classes),
        )
        said, _ = self._with_adapter(model, config)
        return model, [*self._lines(classes), *said]

    def build_lazily(self, data: RunData, config: RunConfig) -> tuple[PreTrainedModel, WeightSource, list[str]]:
        """See the base class."""
        classes = _classes(data)
        model, values = build_model_lazily(
            self.choice,
            self._config(classes, config),
            init=self.init,
            seed=config.schedule.seed,
            new_head=self._has_new_head(classes),
        )
        source: WeightSource = values
        try:
            said, waiting = self._with_adapter(model, config)
        except BaseException:
            source.close()
            raise
        if config.adapter.is_on:
            source = WithOwnValues(QuantisedWeights(source, waiting) if waiting else source)
        return model, source, [*self._lines(classes), *said]

    def empty(self, classes: tuple[str, ...], config: RunConfig, *, with_adapter: bool) -> PreTrainedModel:
        """Return the model in host memory, in fp32 and uninitialised.

        Args:
            classes: the names of what it tells apart.
            config: the run.
            with_adapter: put the run's adapter on it.
        """
        model_config = self._config(classes, config)
        model_config.dtype = torch.float32
        model = self.family.make_model(model_config)
        materialise(model, torch.device("cpu"))
        adapter = _adapter(config) if with_adapter else None
        if adapter is not None:
            attach_adapter(model, adapter, seed=config.schedule.seed)
        return model

    def _config(self, classes: tuple[str, ...], config: RunConfig) -> PreTrainedConfig:
        made = self.choice.config(dropout=config.model.dropout)
        made.id2label = dict(enumerate(classes))
        made.label2id = {name: number for number, name in enumerate(classes)}
        return made

    def _has_new_head(self, classes: tuple[str, ...]) -> bool:
        if self.init != "pretrained":
            return False
        own = self.choice.config().id2label or {}
        return tuple(str(name) for _, name in sorted(own.items())) != classes

    def _lines(self, classes: tuple[str, ...]) -> list[str]:
        if not self._has_new_head(classes):
            return []
        return [f"head       a new one, for {len(classes)} classes: the model's own are others"]

    def _with_adapter(self, model: PreTrainedModel, config: RunConfig) -> tuple[list[str], list[QuantisedLayer]]:
        adapter = _adapter(config)
        if adapter is None:
            return [], []
        waiting = attach_adapter(model, adapter, seed=config.schedule.seed)
        parameters = count_weights(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        share = f"{trained:,} of {parameters:,} parameters are trained ({100 * trained / parameters:.4f}%)"
        return [f"adapter    {adapter.describe()}: {share}"], waiting


def plan_picture_model(config: RunConfig) -> PicturePlan:
    """Choose the model. Nothing is fetched and no weight is read yet: see `PicturePlan.fetched`.

    Args:
        config: a resolved configuration of the recipe vit.

    Raises:
        ModelError: there is no such model.
        ConfigError: an adapter is to be put on what the model has not.
    """
    choice = resolve_model(config.model.model, VIT)
    init: Init = "pretrained" if config.model.init == "pretrained" else "random"
    model_config = choice.config()
    shapes = choice.family.make_model(model_config)
    parameters = trained = sum(parameter.numel() for parameter in shapes.parameters())
    plan = _adapter(config)
    if plan is not None:
        require_peft()  # now, and not when the data has been read
        trained = count_lora(shapes, plan)
        parameters += trained
    return PicturePlan(choice, init, parameters, trained, PictureForm(*_size(model_config)))


def _adapter(config: RunConfig) -> LoraPlan | None:
    plan = lora_plan(config)
    return None if plan is None else dataclasses.replace(plan, head=VIT.head_name)


def _size(config: PreTrainedConfig) -> tuple[int, int]:
    found = config.image_size
    return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))


def _classes(data: RunData) -> tuple[str, ...]:
    if not isinstance(data, PictureRunData):
        raise TypeError(f"expected pictures, not a {type(data).__name__}")
    return data.classes
