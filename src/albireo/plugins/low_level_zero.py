"""ZeRO stages 1 and 2 (Rajbhandari et al., 2020): every rank computes with whole weights and owns its part of the rest."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from albireo.device.cores import usable_cores
from albireo.device.lanes import copy_lane
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.optim import HostStepper, LossScale, LossScalePolicy, OptimizerWrapper, stepper_threads
from albireo.plugins.base import PRECISIONS, ModelWrapper
from albireo.plugins.casting import CastInputs, compute_dtypes
from albireo.plugins.parts import PartsPlugin, ShardedModel, sharded_model
from albireo.plugins.preparing import check_parameters, copy_from_main
from albireo.sharding import (
    Bucket,
    GradientOffload,
    Gradients,
    LocalGradients,
    OffloadedStep,
    ReducedGradients,
    ShardedOptimizer,
    make_buckets,
    steps_in_parts,
)
from albireo.sharding.weight_source import WeightSource

__all__ = ["LowLevelZeroPlugin"]


class LowLevelZeroPlugin(PartsPlugin):
    """Every rank computes with whole weights in the plugin's precision, and owns its part of fp32 weights and states.

    Stage 1 all-reduces gradients, once a step; stage 2 reduce-scatters them, so that a rank keeps only its part. Both
    reduce in fp32 while backward runs. Names and meanings of the arguments are those of Colossal-AI.

    Args:
        stage: 1 or 2.
        precision: "fp32", "fp16" (with a dynamic loss scale) or "bf16"; None: that of the facade, or else fp16.
        initial_scale: the first loss scale.
        min_scale: it never falls below this.
        growth_factor: what it is multiplied by after `growth_interval` steps without overflow.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: see `growth_factor`.
        hysteresis: how many overflows it takes until each makes it fall.
        max_scale: it never grows beyond this.
        max_norm: clip the gradient to this global norm in every step that has not clipped it otherwise; 0 does not.
        reduce_bucket_size_in_m: gradients are reduced in buckets of about so many million elements.
        communication_dtype: None or torch.float32: sums over ranks are made in fp32.
        overlap_communication: reduce while backward runs.
        overlap_allgather: fetch new weights while others are stepped.
        cpu_offload: fp32 weights and optimizer states are in host memory; Adam and AdamW are stepped there on threads
            of their own, other optimizers by torch.
        master_weights: True; False is refused.

    Raises:
        ConfigError: an option has no such value.
    """

    name = "low_level_zero"

    def __init__(  # noqa: PLR0913  the arguments are those that scripts pass
        self,
        stage: int = 1,
        precision: str | None = None,
        initial_scale: float = 2.0**16,
        min_scale: float = 1.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2.0**32,
        max_norm: float = 0.0,
        reduce_bucket_size_in_m: float = 12,
        communication_dtype: torch.dtype | None = None,
        overlap_communication: bool = True,
        overlap_allgather: bool = True,
        cpu_offload: bool = False,
        master_weights: bool = True,
    ) -> None:
        if stage not in (1, 2):
            raise ConfigError(f"stage is 1 or 2, not {stage!r}; TorchFSDPPlugin shards weights too (stage 3)")
        if communication_dtype not in (None, torch.float32):
            raise ConfigError(
                f"gradients are reduced in fp32, not in {communication_dtype}: leave communication_dtype out"
            )
        if not master_weights:
            raise ConfigError("fp32 weights are always kept: leave master_weights=True")
        if max_norm < 0:
            raise ConfigError(f"max_norm is a bound, or 0 for none, not {max_norm:g}")
        if not reduce_bucket_size_in_m > 0:
            raise ConfigError(f"reduce_bucket_size_in_m is more than 0, not {reduce_bucket_size_in_m:g}")
        self.stage: Literal[1, 2] = 1 if stage == 1 else 2
        self.take_precision(precision, default="fp16")
        self._policy = LossScalePolicy(
            initial_scale, min_scale, max_scale, growth_factor, backoff_factor, growth_interval, hysteresis
        )
        self._max_norm = max_norm
        self._bucket_elements = max(1, int(reduce_bucket_size_in_m * 2**20))
        self._overlap_communication = overlap_communication
        self._overlap_gather = overlap_allgather
        self._cpu_offload = cpu_offload

    @property
    def step_ulps(self) -> int:
        """See the base class: a kernel of ours steps weights in halves, and one number in 2^17 is nudged to fit them."""
        return 2 if self._keeps_halves else 0

    @property
    def _keeps_halves(self) -> bool:
        """True if fp32 weights are kept as bf16 ones and the rest, on the device."""
        return self.precision == "bf16" and not self._cpu_offload

    def configure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """See the base class."""
        parameters = list(model.parameters())
        stepped = {p for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        check_parameters(model, optimizer)
        if optimizer is not None:
            ShardedOptimizer.check(optimizer)
        dtype = PRECISIONS[self.precision]
        dtypes = compute_dtypes(model, dtype)
        copy_from_main(model, world)
        sharded = [p for p in parameters if p in dtypes and p.numel() > 0]
        trained = [p for p in sharded if p.requires_grad and p in stepped]
        others = [p for p in sharded if not (p.requires_grad and p in stepped)]
        elements, on_host = self._bucket_elements, self._cpu_offload
        in_halves = self._keeps_halves and optimizer is not None and steps_in_parts(optimizer)
        made = make_buckets(trained, dtypes, world, bucket_elements=elements, on_host=on_host, in_halves=in_halves)
        # What is not stepped is saved as it came, to the bit.
        kept = make_buckets(others, dtypes, world, bucket_elements=elements, on_host=on_host)
        gradients: Gradients | None = None
        wrapped: OptimizerWrapper | None = None
        if optimizer is not None:
            gradients = self._gradients(made, world)
            wrapped = ShardedOptimizer(
                optimizer,
                gradients,
                world,
                loss_scale=LossScale(self._policy, world.device) if self.precision == "fp16" else None,
                max_norm=self._max_norm,
                overlap_gather=self._overlap_gather,
                host_step=self._host_step(optimizer, made, world),
            )
        module = model if dtype == torch.float32 else CastInputs(model, dtype)
        return ShardedModel(module, model, [*made, *kept], gradients, world), wrapped

    def gradient_bytes(self, model: ModelWrapper) -> int:
        """See the base class: on one rank autograd's own are kept; over ranks and with offload they come and go."""
        gradients = sharded_model(model).gradients
        if not isinstance(gradients, LocalGradients) or self._cpu_offload:
            return 0
        return sum(p.numel() * p.element_size() for bucket in gradients.buckets for p in bucket.parameters)

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class: gradients are added up whole, in fp32, until a backward outside of this context."""
        gradients = sharded_model(model).gradients
        return nullcontext() if gradients is None else gradients.kept_local()

    def accumulation_context(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class: in stage 2 there is no room for whole gradients, so each micro-batch's are reduced."""
        gradients = sharded_model(model).gradients
        if gradients is None:
            return nullcontext()
        return gradients.kept_local() if self.stage == 1 else gradients.more_to_come()

    def _gradients(self, buckets: list[Bucket], world: World) -> Gradients:
        offload = GradientOffload(world.device, copy_lane(world.device)) if self._cpu_offload else None
        if world.world_size == 1:
            return LocalGradients(buckets, offload)
        return ReducedGradients(
            buckets, world, scatter=self.stage == 2, overlap=self._overlap_communication, offload=offload
        )

    def _host_step(self, optimizer: torch.optim.Optimizer, buckets: list[Bucket], world: World) -> OffloadedStep | None:
        """Return what steps on the host; None where the optimizer's own step does."""
        if not self._cpu_offload:
            return None
        try:
            stepper = HostStepper(optimizer, threads=stepper_threads(usable_cores(), ranks=world.local_world_size))
        except ConfigError:  # it steps Adam and AdamW alone
            return None
        return OffloadedStep(stepper, buckets, world.device, copy_lane(world.device))
