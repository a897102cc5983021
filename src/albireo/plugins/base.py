"""What every plugin does for the facade."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from albireo.checkpoint import TensorSlice, TensorSource
from albireo.data import EpochSampler
from albireo.device import PeakMemory, seed_of
from albireo.distributed import World, current_world
from albireo.errors import ConfigError
from albireo.optim import OptimizerWrapper
from albireo.plugins.model_wrapper import Criterion, ModelWrapper
from albireo.plugins.preparing import give_memory
from albireo.sharding.weight_source import WeightSource

__all__ = ["PRECISIONS", "Criterion", "ModelWrapper", "Plugin"]

PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)


class Plugin(ABC):
    """A way to train. The same calls serve every plugin; what differs is where weights, gradients and states live.

    Attributes:
        name: what the command line calls it.
        precision: "fp32", "fp16" or "bf16".
        compute_form: what computes in fp16 and bf16: "autocast" over fp32 weights, or a 16-bit "copy" of them, with
            inputs of floating point cast too.
        harmless_warnings: the beginnings of torch's warnings that mean nothing where `albireo train` is the caller, as
            regular expressions.
        needs_process_group: a single rank has to have one too.
        fills_weights: it takes a model whose parameters have no memory, and fills them where they are to lie.
        say: takes a line for the user, where the plugin has decided something; None: nobody listens.
        takes_uneven_micro_batches: ranks may come to a step with different numbers of micro-batches.
        repeats_steps: a step that has run out of memory may be made again, see `make_room`.
    """

    name: str
    precision: str
    say: Callable[[str], None] | None = None
    # One that says nothing of it has one precision, and no other.
    _precision_given: bool = True
    _peaks: PeakMemory | None = None
    compute_form: ClassVar[Literal["autocast", "copy"]] = "copy"
    harmless_warnings: ClassVar[tuple[str, ...]] = ()
    needs_process_group: ClassVar[bool] = False
    fills_weights: ClassVar[bool] = False
    takes_uneven_micro_batches: ClassVar[bool] = False
    repeats_steps: ClassVar[bool] = False

    def place(self, model: nn.Module, device: torch.device, weights: WeightSource | None) -> None:
        """Bring a model to the device before it is configured; parameters without memory get theirs there.

        Args:
            model: the user's model.
            device: what computes.
            weights: the first weights of parameters without memory.

        Raises:
            ConfigError: parameters have no memory, and nobody knows their weights.
        """
        give_memory(model, device, weights)
        model.to(device)

    @property
    def step_ulps(self) -> int:
        """How far a step may be from that of torch's own optimizer, in units in the last place; 0: equal to the bit."""
        return 0

    @abstractmethod
    def configure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """Wrap a model and its optimizer.

        Args:
            model: the user's model, as `place` has left it.
            optimizer: its optimizer, or None for evaluation alone.
            world: the ranks.
            weights: the first weights of a model whose parameters have no memory; None: they are in the parameters.
        """

    def plan(self, model: ModelWrapper) -> dict[str, Any] | None:
        """Return what this rank's plugin has decided about memory, as JSON values; None: nothing.

        Args:
            model: the wrapped model.
        """
        return None

    def trace_into(self, folder: Path) -> None:
        """Write the timeline of a step into a folder, of what is configured from now on.

        Args:
            folder: which.

        Raises:
            ConfigError: this plugin moves nothing whose timeline could be written.
        """
        raise ConfigError(f"{self.name} has no timeline to trace: take GeminiPlugin, or torch's own profiler")

    def readable_weights(self, model: ModelWrapper) -> Iterator[nn.Parameter]:
        """Yield the model's parameters as they compute; each may be read until the next one is asked for.

        Called by all ranks, between steps.

        Args:
            model: the wrapped model.
        """
        yield from model.unwrap().parameters()

    def gradient_bytes(self, model: ModelWrapper) -> int | None:
        """Return what gradients take on this rank's device at the end of a backward, and do not at its beginning.

        It is meant for steps of one backward.

        Args:
            model: the wrapped model.

        Returns:
            0, as here, where that is nothing, or not known; None where all memory is planned for another use.
        """
        return 0

    def make_room(self, model: ModelWrapper) -> bool:
        """Take less of the device from here on, after an allocation has failed in a step that was abandoned.

        Args:
            model: the wrapped model.

        Returns:
            True if there is more room now, and the step can be made again with the numbers it would have had.
        """
        return False

    @abstractmethod
    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """Return a context in which backward adds to local gradients and sends nothing."""

    def accumulation_context(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """Return the context of every micro-batch of a training step but the last.

        Args:
            model: the wrapped model.
        """
        return self.no_sync(model)

    def configure_criterion(self, criterion: Criterion, world: World) -> Criterion:
        """Return a criterion that computes in the plugin's precision.

        Args:
            criterion: the user's, on the world's device.
            world: the ranks.
        """
        return criterion

    def peaks(self, device: torch.device) -> PeakMemory:
        """Return the one reader of peaks of what this plugin trains, for all who measure or report them.

        Args:
            device: of this rank.
        """
        if self._peaks is None or self._peaks.device != device:
            self._peaks = PeakMemory(device)
        return self._peaks

    def take_precision(self, given: str | None, *, default: str) -> None:
        """Begin with a precision; the facade may choose another if none was given.

        Args:
            given: "fp32", "fp16" or "bf16"; None: it is left to the facade.
            default: what it is as long as nobody has chosen.

        Raises:
            ConfigError: there is no such precision.
        """
        self._precision_given = given is not None
        self.precision = _check_precision(default if given is None else given)

    def choose_precision(self, precision: str) -> None:
        """Take over a precision that the facade was given.

        Args:
            precision: "fp32", "fp16" or "bf16".

        Raises:
            ConfigError: there is no such precision, or the plugin was given another one.
        """
        _check_precision(precision)
        if self._precision_given and precision != self.precision:
            raise ConfigError(
                f"mixed_precision={precision!r} does not go together with {type(self).__name__}'s precision "
                f"{self.precision!r}: give one of them"
            )
        self.precision, self._precision_given = precision, True

    def prepare_dataloader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 1024,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
        distributed_sampler_cls: type[DistributedSampler[Any]] | None = None,
        **kwargs: Any,
    ) -> DataLoader[Any]:
        """Return a loader of this rank's share of a data set.

        Order and workers depend on the seed alone (workers on the rank too); the global random state is neither read
        nor moved. Each pass is a new epoch; `loader.sampler.set_epoch(n)` says which.

        Args:
            dataset: with a length; a sample is by its index.
            batch_size: samples in a batch of one rank.
            shuffle: another order in every epoch.
            seed: which orders.
            drop_last: leave out what makes no whole batch on every rank.
            pin_memory: put batches into page-locked host memory, where there is a GPU.
            num_workers: processes that read ahead; 0 reads in this one.
            distributed_sampler_cls: a class to be made as torch's DistributedSampler is, instead of `EpochSampler`.
            kwargs: more arguments of torch's DataLoader.

        Raises:
            ConfigError: the data set is an iterable one, or a sampler is given.
        """
        given = sorted({"sampler", "batch_sampler"} & set(kwargs))
        if given:
            raise ConfigError(
                f"prepare_dataloader makes the sampler: give distributed_sampler_cls instead of {given[0]}, or make a "
                "torch DataLoader of your own"
            )
        if isinstance(dataset, IterableDataset):
            raise ConfigError(
                "an IterableDataset decides itself what a rank sees: give it to torch's DataLoader, and take every "
                "world_size-th sample by DistCoordinator().rank in it"
            )
        world = current_world()
        make_sampler = distributed_sampler_cls or EpochSampler
        sampler = make_sampler(dataset, world.world_size, world.rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        # Workers draw their seeds from it: other ones on each rank, and none from the global generator.
        generator = torch.Generator().manual_seed(seed_of(seed, world.rank))
        options = {"generator": generator, **kwargs}
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            pin_memory=pin_memory and torch.cuda.is_available(),
            num_workers=num_workers,
            **options,
        )

    @abstractmethod
    def export_model(
        self, model: ModelWrapper, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """Yield this rank's part of all weights, as `model/NAME`.

        Args:
            model: the wrapped model.
            names: parameters and buffers to their names in the model's own family; a tied one has one name.
            world: the ranks.
        """

    @abstractmethod
    def export_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[torch.nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """Yield this rank's part of all of the optimizer's states, as `optimizer/STATE/NAME`.

        Args:
            optimizer: the wrapped optimizer.
            names: its parameters' names.
            world: the ranks.
        """

    @abstractmethod
    def export_gradients(
        self, optimizer: OptimizerWrapper, names: Mapping[torch.nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """Yield this rank's part of all gradients, as `gradient/NAME`, in fp32.

        Called by all ranks between the last backward of a step and the step. They are averaged over ranks, without a
        loss scale, and clipped if that has been done. A parameter that no rank has a gradient of is left out.

        Args:
            optimizer: the wrapped optimizer.
            names: its parameters' names.
            world: the ranks.
        """

    @abstractmethod
    def import_model(self, model: ModelWrapper, names: Mapping[torch.Tensor, str], source: TensorSource) -> None:
        """Fill weights; the arguments are those of `export_model`, and where `model/NAME` can be read.

        Raises:
            CheckpointError: the source has not just these names, or a tensor does not fit.
        """

    @abstractmethod
    def import_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[torch.nn.Parameter, str], source: TensorSource
    ) -> None:
        """Fill states; the arguments are those of `export_optimizer`, and where `optimizer/STATE/NAME` can be read.

        Raises:
            CheckpointError: a state is missing or too many, or does not fit.
        """

    def export_state(
        self, model: ModelWrapper, optimizer: OptimizerWrapper | None, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """Yield this rank's part of all weights (`model/NAME`) and states (`optimizer/STATE/NAME`).

        Args:
            model: the wrapped model.
            optimizer: its wrapped optimizer, if its states are to be saved.
            names: parameters and buffers to their names in the model's own family; a tied one has one name.
            world: the ranks.
        """
        yield from self.export_model(model, names, world)
        if optimizer is not None:
            yield from self.export_optimizer(optimizer, _parameters(names), world)

    def import_state(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper | None,
        names: Mapping[torch.Tensor, str],
        source: TensorSource,
    ) -> None:
        """Fill weights and states; the arguments are those of `export_state`, and where to read from."""
        self.import_model(model, names, source)
        if optimizer is not None:
            self.import_optimizer(optimizer, _parameters(names), source)


def _parameters(names: Mapping[torch.Tensor, str]) -> dict[nn.Parameter, str]:
    return {tensor: name for tensor, name in names.items() if isinstance(tensor, nn.Parameter)}


def _check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is one of {', '.join(PRECISIONS)}, not {precision!r}")
    return precision
