"""Data parallelism with whole copies on every rank: torch's DistributedDataParallel over fp32 weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from albireo.checkpoint import TensorSlice, TensorSource, whole
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.optim import OptimizerWrapper, ScaledOptimizer, named_state, restore_named_state
from albireo.plugins.base import PRECISIONS, Criterion, ModelWrapper, Plugin
from albireo.plugins.importing import check_model_source
from albireo.sharding.weight_source import WeightSource

__all__ = ["TorchDDPPlugin"]


class _Autocast(nn.Module):
    """Calls a module, or a function, under autocast."""

    def __init__(self, module: Callable[..., Any], device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._device_type = device_type
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device_type, dtype=self._dtype):
            return self.module(*args, **kwargs)


class TorchDDPPlugin(Plugin):
    """Every rank holds all weights, gradients and states in fp32; fp16 and bf16 compute under autocast.

    On one rank nothing is wrapped for communication at all.

    Args:
        precision: "fp32", "fp16" (with a dynamic loss scale) or "bf16"; None: that of the facade, or else fp32.
        broadcast_buffers: send the main rank's buffers before each forward.
        bucket_cap_mb: size of a bucket of gradients in MB (2**20 bytes).
        find_unused_parameters: look for parameters that a forward did not use.
        gradient_as_bucket_view: gradients are views of the buckets, which saves their size once.
        static_graph: the graph is the same in every step; not with accumulation.

    Raises:
        ConfigError: the precision is unknown.
    """

    name = "torch_ddp"
    compute_form = "autocast"
    takes_uneven_micro_batches = True

    def __init__(
        self,
        *,
        precision: str | None = None,
        broadcast_buffers: bool = True,
        bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
    ) -> None:
        self.take_precision(precision, default="fp32")
        self._ddp_options: dict[str, int] = {
            "bucket_cap_mb": bucket_cap_mb,
            "find_unused_parameters": find_unused_parameters,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }
        if not broadcast_buffers:  # torch 2.13 warns of this name even if it is given the default
            self._ddp_options["broadcast_buffers"] = False

    def configure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """See the base class."""
        module: nn.Module = model
        dtype = None if self.precision == "fp32" else PRECISIONS[self.precision]
        if dtype is not None:
            module = _Autocast(module, world.device.type, dtype)
        alone = module
        # torch refuses a model of which nothing is trained, such as one that is only to be evaluated.
        if world.world_size > 1 and any(parameter.requires_grad for parameter in model.parameters()):
            device_ids = [world.device] if world.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=device_ids, **self._ddp_options)  # type: ignore[arg-type]
        wrapped = None
        if optimizer is not None:
            scaled = self.precision == "fp16"
            wrapped = ScaledOptimizer(optimizer, world.device) if scaled else OptimizerWrapper(optimizer)
        return ModelWrapper(module, model, evaluation_module=alone), wrapped

    def configure_criterion(self, criterion: Criterion, world: World) -> Criterion:
        """See the base class."""
        dtype = None if self.precision == "fp32" else PRECISIONS[self.precision]
        return criterion if dtype is None else _Autocast(criterion, world.device.type, dtype)

    def gradient_bytes(self, model: ModelWrapper) -> int:
        """See the base class: over ranks, torch's buckets are there all the time."""
        if isinstance(model.module, DistributedDataParallel):
            return 0
        return sum(p.numel() * p.element_size() for p in model.unwrap().parameters() if p.requires_grad)

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class."""
        if isinstance(model.module, DistributedDataParallel):
            if self._ddp_options["static_graph"]:
                # torch counts the hooks of its first synchronised backward, and fails with an internal error here.
                raise ConfigError("static_graph does not go together with accumulation: leave it out")
            return model.module.no_sync()
        return nullcontext()

    def export_model(
        self, model: ModelWrapper, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: every rank holds the same, so the main rank alone exports."""
        for tensor, name in names.items() if world.is_main else ():
            yield whole(f"model/{name}", tensor)

    def export_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: every rank holds the same, so the main rank alone exports."""
        for name, tensor in named_state(optimizer.unwrap(), names).items() if world.is_main else ():
            yield whole(f"optimizer/{name}", tensor)

    def export_gradients(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: every rank holds the same, so the main rank alone exports."""
        scale = optimizer.gradient_scale()
        for parameter, name in names.items() if world.is_main else ():
            if parameter.grad is not None:
                gradient = parameter.grad.float() if scale is None else parameter.grad.float() / scale
                yield whole(f"gradient/{name}", gradient)

    def import_model(self, model: ModelWrapper, names: Mapping[torch.Tensor, str], source: TensorSource) -> None:
        """See the base class."""
        check_model_source(source, names)
        with torch.no_grad():
            for tensor, name in names.items():
                source.read_into(f"model/{name}", tensor)

    def import_optimizer(
        self, optimizer: OptimizerWrapper, names: Mapping[nn.Parameter, str], source: TensorSource
    ) -> None:
        """See the base class."""
        prefix = "optimizer/"
        states = {name.removeprefix(prefix): source.info(name) for name in source.names(prefix)}
        restore_named_state(
            optimizer.unwrap(), names, states, lambda name, tensor: source.read_into(prefix + name, tensor)
        )
