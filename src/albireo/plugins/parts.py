"""What plugins have in common whose ranks own parts of fp32 weights and states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from albireo.checkpoint import TensorSlice, TensorSource, whole
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.optim import OptimizerWrapper
from albireo.plugins.base import Criterion, ModelWrapper, Plugin
from albireo.plugins.casting import CriterionInFp32
from albireo.plugins.importing import check_model_source
from albireo.plugins.state_files import on_all
from albireo.sharding import (
    FlatParameters,
    Fragment,
    Gradients,
    ShardedOptimizer,
    fragment_slice,
    optimizer_slices,
    restore_optimizer,
)

__all__ = ["PartsPlugin", "ShardedModel", "sharded_model", "sharded_optimizer"]


class _Flushes(Protocol):
    """What has work under way that a reader must not see half done."""

    def flush(self) -> None: ...


class ShardedModel(ModelWrapper):
    """A model whose parameters lie in flat buffers.

    Attributes:
        buckets: all of them.
        gradients: what takes the gradients of those that are trained; None without an optimizer.
        world: the ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        original: nn.Module,
        buckets: Sequence[FlatParameters],
        gradients: Gradients | None,
        world: World,
        *,
        flushes: _Flushes | None = None,
    ) -> None:
        super().__init__(module, original)
        self.buckets = tuple(buckets)
        self.gradients = gradients
        self.world = world
        self._flushes = flushes

    @property
    def fragments(self) -> Iterable[Fragment]:
        """This rank's part of all parameters."""
        return (fragment for bucket in self.buckets for fragment in bucket.fragments)

    def weight_tensors(self) -> Iterator[torch.Tensor]:
        """See the base class: what computes, and fp32 weights in whatever form."""
        yield from super().weight_tensors()
        for bucket in self.buckets:
            yield from (tensor for tensor in (bucket.master, bucket.rest) if tensor is not None)

    def flush(self) -> None:
        """Finish what is under way, before weights or states are read."""
        if self._flushes is not None:
            self._flushes.flush()


class PartsPlugin(Plugin):
    """A plugin whose ranks own parts of parameters in fp32: what it saves and loads are those parts."""

    compute_form = "copy"

    def configure_criterion(self, criterion: Criterion, world: World) -> Criterion:
        """See the base class: a loss of 16-bit outputs is computed in fp32."""
        return criterion if self.precision == "fp32" else CriterionInFp32(criterion)

    def export_model(
        self, model: ModelWrapper, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: weights in fp32, by their owners."""
        sharded: set[torch.Tensor] = set()
        sharded_model(model).flush()
        for bucket in sharded_model(model).buckets:
            sharded.update(bucket.parameters)
            for fragment in bucket.fragments:
                if fragment.parameter in names:
                    yield fragment_slice(f"model/{names[fragment.parameter]}", fragment, fragment.weights())
        for tensor, name in names.items() if world.is_main else ():
            if tensor not in sharded:
                yield whole(f"model/{name}", tensor)

    def export_optimizer(
        self,
        optimizer: OptimizerWrapper,
        names: Mapping[nn.Parameter, str],
        world: World,
    ) -> Iterable[TensorSlice]:
        """See the base class: states by their owners."""
        wrapped = sharded_optimizer(optimizer)
        wrapped.flush()
        return optimizer_slices(wrapped.unwrap(), wrapped.fragments, names)

    def export_gradients(
        self,
        optimizer: OptimizerWrapper,
        names: Mapping[nn.Parameter, str],
        world: World,
    ) -> Iterable[TensorSlice]:
        """See the base class: gradients by their owners."""
        for fragment, gradient in sharded_optimizer(optimizer).exported_gradients():
            yield fragment_slice(f"gradient/{names[fragment.parameter]}", fragment, gradient)

    def import_model(self, model: ModelWrapper, names: Mapping[torch.Tensor, str], source: TensorSource) -> None:
        """See the base class: each rank reads its own part."""
        sharded = sharded_model(model)
        sharded.flush()
        owned: dict[torch.Tensor, Fragment] = {fragment.parameter: fragment for fragment in sharded.fragments}
        in_buckets: set[torch.Tensor] = {p for bucket in sharded.buckets for p in bucket.parameters}

        def read() -> None:
            check_model_source(source, names)
            with torch.no_grad():
                for tensor, name in names.items():
                    if tensor not in in_buckets:
                        source.read_into(f"model/{name}", tensor)
                    elif tensor in owned:
                        fragment = owned[tensor]
                        values = fragment.weights()
                        source.read_slice_into(f"model/{name}", fragment.cut.start, values)
                        fragment.replace_weights(values)

        # A rank that cannot read must not leave the others waiting for its part.
        on_all(sharded.world, read)
        for bucket in sharded.buckets:
            bucket.publish().wait()

    def import_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], source: TensorSource
    ) -> None:
        """See the base class: each rank reads its own part."""
        wrapped = sharded_optimizer(optimizer)
        wrapped.flush()
        stepped = {p: names[p] for group in wrapped.model_groups for p in group}
        restore_optimizer(wrapped.unwrap(), wrapped.fragments, stepped, source)


def sharded_model(model: ModelWrapper) -> ShardedModel:
    """Return a boosted model as one of flat buffers.

    Raises:
        ConfigError: another plugin has boosted it.
    """
    if not isinstance(model, ShardedModel):
        raise ConfigError("give the model that boost returned with this plugin")
    return model


def sharded_optimizer(optimizer: OptimizerWrapper) -> ShardedOptimizer:
    """Return a boosted optimizer as one over parts.

    Raises:
        ConfigError: another plugin has boosted it.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        raise ConfigError("give the optimizer that boost returned with this plugin")
    return optimizer
