"""What a recipe is: all that the loop, the session, resume, verify and bench do not know of what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from albireo.config import RunConfig
from albireo.data import AnyBatch, AnyDataset, BatchLayout, StepLoader, evaluation_batches
from albireo.distributed import World
from albireo.models import Family
from albireo.plugins import ModelWrapper
from albireo.sharding import WeightSource
from albireo.training.progress import Progress

__all__ = ["Evaluation", "ModelPlan", "Recipe", "RunData", "TaskModel"]


class Evaluation(NamedTuple):
    """What the data that is held out came to.

    Attributes:
        loss: the mean over all that counts, in nats.
        accuracy: the share that was right, where there is right and wrong.
        confusion: of each class, a row of how often it was taken for each; where there are classes.
    """

    loss: float
    accuracy: float | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None


class TaskModel(nn.Module, ABC):
    """A transformers model as the training step calls it.

    Its forward takes what `Recipe.inputs` gives, and returns the loss's sum and the count of what it is over: an fp32
    and an int64 scalar. All its parts are modules, so that hooks fire on each.
    """

    @property
    @abstractmethod
    def pretrained(self) -> PreTrainedModel:
        """The transformers model, which keeps its own parameters and names."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on.

    Attributes:
        train: samples to train on.
        held_out: samples to evaluate on.
        fingerprint: says, for people too, what decides a sample; changes when any of it does.
        lines: what was read and made, for the user.
    """

    train: AnyDataset
    held_out: AnyDataset
    fingerprint: str
    lines: tuple[str, ...]

    @property
    def size(self) -> int:
        """Samples in an epoch."""
        return len(self.train)  # type: ignore[arg-type]  # torch leaves __len__ out of Dataset

    @property
    def is_ragged(self) -> bool:
        """Batches have different shapes."""
        return False

    def steps(self, layout: BatchLayout, *, seed: int, start_sample: int = 0, steps: int, pin: bool) -> StepLoader:
        """Return the micro-batches of some optimizer steps of one rank.

        Args:
            layout: how a step is dealt to ranks and micro-batches.
            seed: which order.
            start_sample: the global sample index at which the first step begins.
            steps: how many.
            pin: put batches into page-locked memory.
        """
        return StepLoader(self.train, layout, seed=seed, start_sample=start_sample, steps=steps, pin_memory=pin)

    def evaluation(self, batch_size: int, world: World, *, pin: bool) -> Iterator[AnyBatch]:
        """Yield this rank's share of the held-out samples.

        Args:
            batch_size: samples in a batch of one rank.
            world: the ranks.
            pin: put batches into page-locked memory.
        """
        return evaluation_batches(self.held_out, batch_size, world.rank, world.world_size, pin_memory=pin)

    def save(self, folder: Path) -> None:
        """Write what goes with a model into its folder, such as the tokenizer. Here: nothing.

        Args:
            folder: a Hugging Face folder.
        """


class ModelPlan(ABC):
    """A model that is chosen and not yet built.

    Attributes:
        parameters: how many it has, an adapter's too.
        trained: how many of them are trained.
    """

    parameters: int
    trained: int

    @property
    @abstractmethod
    def family(self) -> Family:
        """What tells the model's parts."""

    def identity(self, config: RunConfig) -> Mapping[str, str]:  # noqa: ARG002  for plans that have more
        """Return what else of the model must be the same when a run goes on from a checkpoint, in words.

        Args:
            config: a resolved configuration.
        """
        return {}

    @abstractmethod
    def fetched(self, config: RunConfig) -> ModelPlan:
        """Return the plan with all that it needs on this machine, after a look at it.

        Args:
            config: a resolved configuration.

        Raises:
            ModelError: something is missing or damaged, or does not go together.
        """

    @abstractmethod
    def build(self, data: RunData, config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
        """Build the model on a device, in fp32, and return it with lines for the user.

        Args:
            data: what it is to read.
            config: a resolved configuration.
            device: where.

        Raises:
            ModelError: the weights cannot be loaded, or do not go with the data.
        """

    @abstractmethod
    def build_lazily(self, data: RunData, config: RunConfig) -> tuple[PreTrainedModel, WeightSource, list[str]]:
        """Build the same model without memory for its parameters, for a plugin that fills them where they are to lie.

        Args:
            data: what it is to read.
            config: a resolved configuration.

        Returns:
            The model in fp32, whose parameters are on the meta device, but for an adapter's; where the values of all of
            them come from, which is to be closed; and lines for the user.

        Raises:
            ModelError: the weights cannot be found, or do not go with the data.
        """


class Recipe(ABC):
    """What is trained and on what. Stateless: all that a run has is in what it returns.

    The methods are called in the order in which they stand here: what costs nothing to look at comes first, then what is
    fetched, then what is read and built.

    Attributes:
        name: as in `albireo train NAME`.
        title: of its models, as people write it.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def with_full_names(self, config: RunConfig) -> RunConfig:
        """Return the configuration with the model's name as it is found again from any folder, and an adapter's targets.

        Args:
            config: as the user gave it.

        Raises:
            ModelError: there is no such model.
        """

    @abstractmethod
    def fixed(self, config: RunConfig) -> Mapping[str, Any]:
        """Return the options, by flag, with which a run's checkpoints stand and fall; None where nothing is known.

        Args:
            config: a resolved configuration.
        """

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Say at once what is wrong with a path, or with the form of a name; nothing is read or fetched.

        Args:
            config: a resolved configuration.

        Raises:
            DataError: there is nothing of that name.
        """

    @abstractmethod
    def plan(self, config: RunConfig) -> ModelPlan:
        """Choose the model. Nothing is fetched and no weight is read yet.

        Args:
            config: a resolved configuration.

        Raises:
            ModelError: there is no such model, or it does not go with the options.
        """

    @abstractmethod
    def load_data(self, config: RunConfig, planned: ModelPlan, progress: Progress) -> RunData:
        """Read and prepare the data. Every rank calls this at the same time.

        Args:
            config: a resolved configuration.
            planned: the model, fetched.
            progress: shows how far it is.

        Raises:
            DataError: it cannot be read, or is too little.
        """

    @abstractmethod
    def wrap(self, pretrained: PreTrainedModel, family: Family, data: RunData) -> TaskModel:
        """Return a model as the training step calls it.

        Args:
            pretrained: what the plan has built.
            family: what tells its parts.
            data: what it is to read.
        """

    @abstractmethod
    def base_name(self, config: RunConfig) -> str | None:
        """Return what an adapter stands beside, as others load it: a hub id or a folder. None for random weights.

        Args:
            config: a resolved configuration.
        """

    @abstractmethod
    def empty_model(self, config: RunConfig, processor: Path, *, with_adapter: bool) -> PreTrainedModel:
        """Return a run's model in host memory, in fp32 and uninitialised, to be filled from a checkpoint.

        Args:
            config: the run's.
            processor: the folder of what goes with the model, such as its tokenizer, as `RunData.save` wrote it.
            with_adapter: put the run's adapter on it.

        Raises:
            ModelError: it cannot be built.
        """

    @abstractmethod
    def inputs(self, batch: AnyBatch) -> dict[str, torch.Tensor]:
        """Return a batch as the arguments of the wrapped model's forward.

        Args:
            batch: one micro-batch.
        """

    @abstractmethod
    def evaluate(self, model: ModelWrapper, batches: Iterable[AnyBatch], world: World) -> Evaluation:
        """Return the mean loss over every rank's batches, and what else says how good the model is.

        Args:
            model: the boosted model.
            batches: this rank's share.
            world: the ranks.
        """

    def leave(
        self,
        model: ModelWrapper,  # noqa: ARG002  for recipes that have more to leave
        data: RunData,  # noqa: ARG002
        found: Evaluation | None,  # noqa: ARG002
        world: World,  # noqa: ARG002
    ) -> Mapping[str, bytes]:
        """Return files for the run's folder by name, when a run has come to its end. Every rank calls this; the main one's count.

        Args:
            model: the boosted model.
            data: what it was trained on.
            found: the last evaluation; None if there was none.
            world: the ranks.
        """
        return {}

    @abstractmethod
    def output_bytes(self, config: RunConfig, planned: ModelPlan, device: torch.device) -> int:
        """Return what the loss holds of the model's outputs at a time.

        Args:
            config: a resolved configuration.
            planned: the model.
            device: where it computes.
        """
