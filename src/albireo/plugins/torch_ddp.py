"""Data parallelism with whole copies on every rank: torch's DistributedDataParallel over fp32 weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from albireo.checkpoint import Checkpoint, TensorSlice, whole
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError
from albireo.optim import OptimizerWrapper, ScaledOptimizer, named_state, restore_named_state
from albireo.plugins.base import ModelWrapper, Plugin

__all__ = ["TorchDDPPlugin"]

_AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class _Autocast(nn.Module):
    """Calls a module under autocast."""

    def __init__(self, module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._device_type = device_type
        self._dtype = dtype

    def forward(self, *args: object, **kwargs: object) -> object:
        with torch.autocast(self._device_type, dtype=self._dtype):
            return self.module(*args, **kwargs)


class TorchDDPPlugin(Plugin):
    """Every rank holds all weights, gradients and states in fp32; fp16 and bf16 compute under autocast.

    On one rank nothing is wrapped for communication at all.

    Args:
        precision: "fp32", "fp16" (with a dynamic loss scale) or "bf16".
        broadcast_buffers: send the main rank's buffers before each forward.
        bucket_cap_mb: size of a bucket of gradients in MB (2**20 bytes).
        find_unused_parameters: look for parameters that a forward did not use.
        gradient_as_bucket_view: gradients are views of the buckets, which saves their size once.
        static_graph: the graph is the same in every step; not with accumulation.

    Raises:
        ConfigError: the precision is unknown.
    """

    name = "torch_ddp"

    def __init__(
        self,
        *,
        precision: str = "fp32",
        broadcast_buffers: bool = True,
        bucket_cap_mb: int = 25,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
    ) -> None:
        if precision not in _AUTOCAST:
            raise ConfigError(f"precision is one of {', '.join(_AUTOCAST)}, not {precision!r}")
        self.precision = precision
        self._ddp_options = {
            "broadcast_buffers": broadcast_buffers,
            "bucket_cap_mb": bucket_cap_mb,
            "find_unused_parameters": find_unused_parameters,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }

    def configure(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, world: World
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """See the base class."""
        module: nn.Module = model
        dtype = _AUTOCAST[self.precision]
        if dtype is not None:
            module = _Autocast(module, world.device.type, dtype)
        alone = module
        if world.world_size > 1:
            device_ids = [world.device] if world.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=device_ids, **self._ddp_options)  # type: ignore[arg-type]
        wrapped = None
        if optimizer is not None:
            scaled = self.precision == "fp16"
            wrapped = ScaledOptimizer(optimizer, world.device) if scaled else OptimizerWrapper(optimizer)
        return ModelWrapper(module, model, evaluation_module=alone), wrapped

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class."""
        if isinstance(model.module, DistributedDataParallel):
            if self._ddp_options["static_graph"]:
                # torch counts the hooks of its first synchronised backward, and fails with an internal error here.
                raise ConfigError("static_graph does not go together with accumulation: leave it out")
            return model.module.no_sync()
        return nullcontext()

    def export_state(
        self, model: ModelWrapper, optimizer: OptimizerWrapper | None, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """See the base class: every rank holds the same, so the main rank alone exports."""
        if not world.is_main:
            return
        for tensor, name in names.items():
            yield whole(f"model/{name}", tensor)
        if optimizer is not None:
            for name, tensor in named_state(optimizer.unwrap(), _parameters(names)).items():
                yield whole(f"optimizer/{name}", tensor)

    def import_state(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper | None,
        names: Mapping[torch.Tensor, str],
        checkpoint: Checkpoint,
    ) -> None:
        """See the base class."""
        saved = set(checkpoint.names("model/")) - set(checkpoint.aliases)
        wanted = {f"model/{name}" for name in names.values()}
        for missing in sorted(wanted - saved):
            raise CheckpointError(f"{checkpoint.path} has no {missing}: it belongs to another model")
        for unknown in sorted(saved - wanted):
            raise CheckpointError(f"{checkpoint.path} has {unknown}, which this model has not: it belongs to another")
        with torch.no_grad():
            for tensor, name in names.items():
                checkpoint.read_into(f"model/{name}", tensor)
        if optimizer is not None:
            prefix = "optimizer/"
            states = {name.removeprefix(prefix): checkpoint.info(name) for name in checkpoint.names(prefix)}
            restore_named_state(
                optimizer.unwrap(),
                _parameters(names),
                states,
                lambda name, tensor: checkpoint.read_into(prefix + name, tensor),
            )


def _parameters(names: Mapping[torch.Tensor, str]) -> dict[nn.Parameter, str]:
    return {tensor: name for tensor, name in names.items() if isinstance(tensor, nn.Parameter)}
