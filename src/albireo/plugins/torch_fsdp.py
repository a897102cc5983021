"""Weights, gradients and states sharded by torch itself: FSDP2, `torch.distributed.fsdp.fully_shard`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from albireo.checkpoint import TensorSlice, TensorSource, whole
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.optim import LossScale, LossScalePolicy, OptimizerWrapper
from albireo.plugins.base import PRECISIONS, Criterion, ModelWrapper, Plugin
from albireo.plugins.casting import CriterionInFp32
from albireo.plugins.importing import check_model_source
from albireo.plugins.preparing import check_parameters, copy_from_main
from albireo.sharding import fragment_slice, optimizer_slices, restore_optimizer
from albireo.sharding.weight_source import WeightSource

if TYPE_CHECKING:
    # torch takes most of a second to load its FSDP, which only those who use it should wait for.
    from albireo.plugins.fully_sharded import FullyShardedModule
    from albireo.plugins.fully_sharded_optimizer import FullyShardedOptimizer

__all__ = ["TorchFSDPPlugin"]


class TorchFSDPPlugin(Plugin):
    """Every rank keeps some rows of each fp32 weight, gradient and state; whole weights are gathered block by block.

    Blocks compute in the plugin's precision, and gradients are reduced in fp32. A process group is needed on one rank
    too: `launch_from_torch` makes one. All ranks must call the same blocks; a parameter may be used on some ranks only.

    Args:
        precision: "fp32", "fp16" (with a dynamic loss scale) or "bf16"; None: that of the facade, or else fp32.
        cpu_offload: keep weights, gradients and states in host memory, and step there.
        block_classes: modules of these classes are gathered as one; None: the members of each `nn.ModuleList`; empty:
            the whole model is one block.
        reshard_after_forward: let go of a block's whole weights after forward and gather them again for backward;
            without it they stay, which takes memory and saves sending.

    Raises:
        ConfigError: the precision is unknown.
    """

    name = "torch_fsdp"
    compute_form = "copy"
    needs_process_group = True
    # Transformers' decoder layers return views, and nobody writes into what they return.
    harmless_warnings = ("FSDP2-wrapped module .* returned a view tensor",)

    def __init__(
        self,
        *,
        precision: str | None = None,
        cpu_offload: bool = False,
        block_classes: Collection[type[nn.Module]] | None = None,
        reshard_after_forward: bool = True,
    ) -> None:
        self.take_precision(precision, default="fp32")
        self.cpu_offload = cpu_offload
        self._block_classes = block_classes
        self._reshard_after_forward = reshard_after_forward

    def configure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """See the base class: the model's own parameters are replaced, and it is called as before."""
        from albireo.plugins.fully_sharded import FullyShardedModule, choose_blocks
        from albireo.plugins.fully_sharded_optimizer import FullyShardedOptimizer

        check_parameters(model, optimizer)
        if optimizer is not None:
            FullyShardedOptimizer.check(optimizer)
        _make_fp32(model)
        copy_from_main(model, world)
        names = {parameter: name for name, parameter in model.named_parameters()}
        sharded = FullyShardedModule(
            model,
            choose_blocks(model, self._block_classes),
            world,
            dtype=PRECISIONS[self.precision],
            cpu_offload=self.cpu_offload,
            reshard_after_forward=self._reshard_after_forward,
        )
        wrapped = None
        if optimizer is not None:
            # The parameters of before are no longer the model's.
            for group in optimizer.param_groups:
                group["params"] = [model.get_parameter(names[parameter]) for parameter in group["params"]]
            loss_scale = LossScale(LossScalePolicy(), world.device) if self.precision == "fp16" else None
            wrapped = FullyShardedOptimizer(optimizer, sharded, world, loss_scale=loss_scale)
        return ModelWrapper(sharded, model), wrapped

    def configure_criterion(self, criterion: Criterion, world: World) -> Criterion:
        """See the base class: a loss of 16-bit outputs is computed in fp32."""
        return criterion if self.precision == "fp32" else CriterionInFp32(criterion)

    def gradient_bytes(self, model: ModelWrapper) -> int | None:
        """See the base class: each rank's rows, reduced in the dtype of the weights."""
        if self.cpu_offload:
            return 0
        masters = [
            fragment.master for fragment in _sharded(model).fragments.values() if fragment.parameter.requires_grad
        ]
        return sum(master.numel() * master.element_size() for master in masters)

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class: whole gradients are added up, in fp32, until a backward outside of this context."""
        return _sharded(model).kept_local()

    def accumulation_context(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class: there is no room for whole gradients, so each micro-batch's are reduced."""
        return nullcontext()

    def export_model(
        self, model: ModelWrapper, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: each rank its rows; what is not sharded comes from the main rank."""
        sharded = _sharded(model)
        sharded.reshard()
        for tensor, name in names.items():
            if tensor in sharded.fragments:
                fragment = sharded.fragments[tensor]
                yield fragment_slice(f"model/{name}", fragment, fragment.master)
            elif world.is_main and tensor not in sharded.parts:
                yield whole(f"model/{name}", tensor)

    def export_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: each rank the states of its rows."""
        wrapped = _sharded_optimizer(optimizer)
        return optimizer_slices(wrapped.unwrap(), wrapped.fragments, names)

    def export_gradients(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: each rank its rows."""
        wrapped = _sharded_optimizer(optimizer)
        wrapped.gradients()  # a collective call: not only when somebody asks for the first slice
        return self._gradient_slices(wrapped, names)

    def import_model(self, model: ModelWrapper, names: Mapping[torch.Tensor, str], source: TensorSource) -> None:
        """See the base class: each rank reads its own rows."""
        sharded = _sharded(model)
        sharded.reshard()
        check_model_source(source, names)
        with torch.no_grad():
            for tensor, name in names.items():
                if tensor in sharded.fragments:
                    fragment = sharded.fragments[tensor]
                    source.read_slice_into(f"model/{name}", fragment.cut.start, fragment.master.detach())
                elif tensor not in sharded.parts:
                    source.read_into(f"model/{name}", tensor)

    def import_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], source: TensorSource
    ) -> None:
        """See the base class: each rank reads the states of its own rows."""
        wrapped = _sharded_optimizer(optimizer)
        stepped = {p: names[p] for parameters in wrapped.model_groups for p in parameters}
        restore_optimizer(wrapped.unwrap(), wrapped.fragments, stepped, source)

    def _gradient_slices(
        self, optimizer: FullyShardedOptimizer, names: Mapping[nn.Parameter, str]
    ) -> Iterator[TensorSlice]:
        scale = optimizer.gradient_scale()
        for fragment in optimizer.fragments:
            gradient = fragment.master.grad
            if gradient is not None:
                unscaled = gradient if scale is None else gradient / scale.to(gradient.device)
                yield fragment_slice(f"gradient/{names[fragment.parameter]}", fragment, unscaled)


def _make_fp32(model: nn.Module) -> None:
    """Give each parameter a form that FSDP takes: fp32, as all that is kept between steps, and contiguous."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32).contiguous()


def _sharded(model: ModelWrapper) -> FullyShardedModule:
    from albireo.plugins.fully_sharded import FullyShardedModule

    if not isinstance(model.module, FullyShardedModule):
        raise ConfigError("give the model that boost returned with this plugin")
    return model.module


def _sharded_optimizer(optimizer: OptimizerWrapper) -> FullyShardedOptimizer:
    from albireo.plugins.fully_sharded_optimizer import FullyShardedOptimizer

    if not isinstance(optimizer, FullyShardedOptimizer):
        raise ConfigError("give the optimizer that boost returned with this plugin")
    return optimizer
