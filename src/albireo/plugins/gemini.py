"""Gemini: chunks of weights and states that move between device and host under a cap (after PatrickStar, Fang et al., 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from albireo.device.cap import device_room_bytes
from albireo.device.cores import usable_cores
from albireo.device.memory import host_room_bytes
from albireo.device.pool import DevicePool, device_pool
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.memory import Gemini, MemoryLimits, PlacementPolicy, Setting
from albireo.memory.tracing import Timeline, write_trace
from albireo.memory.tracing.tracer import TracingSetting
from albireo.optim import HostStepper, LossScale, LossScalePolicy, OptimizerWrapper, stepper_threads
from albireo.plugins.base import PRECISIONS, ModelWrapper
from albireo.plugins.casting import CastInputs, bytes_of, compute_dtypes
from albireo.plugins.parts import PartsPlugin, ShardedModel, sharded_model
from albireo.plugins.preparing import check_parameters, copy_from_main
from albireo.sharding import ShardedOptimizer
from albireo.sharding.weight_source import ParameterValues, WeightSource

__all__ = ["GeminiPlugin"]

# What a plan leaves of the room that torch's allocator has, for pieces that fit nothing: they are of the size of
# activations, so of small rooms it is a larger share (7 GB: 0.34 GB were lost so).
_LEFT_BYTES = int(0.7 * 2**30)
_LEFT_SHARES = 0.04, 0.1


class _GeminiModel(ShardedModel):
    """A model in chunks.

    Attributes:
        gemini: the mechanism.
    """

    def __init__(self, module: nn.Module, original: nn.Module, gemini: Gemini, world: World) -> None:
        super().__init__(module, original, gemini.chunks, gemini.gradients, world, flushes=gemini)
        self.gemini = gemini

    def streamed_parameters(self) -> Iterable[nn.Parameter]:
        """See the base class."""
        return [parameter for chunk in self.gemini.chunks if chunk.streams for parameter in chunk.parameters]


class GeminiPlugin(PartsPlugin):
    """Weights, gradients and states in chunks, of which each is on the device only while it has to be.

    Without arguments it is automatic: a first step with all states on the host shows what a step needs besides, and from
    then on as little moves as the cap allows; where everything fits, nothing does. Giving a fraction makes it static.
    Names and meanings of the arguments are those of Colossal-AI where it has them.

    Args:
        placement_policy: "auto" or "static"; None: static if a fraction is given, else auto.
        shard_param_frac: over several ranks, the share of weights of which each rank has its part alone.
        offload_optim_frac: the share of optimizer states (and fp32 weights) that are in host memory and stepped there.
        offload_param_frac: the share of weights that are at home in host memory, and fetched for each use.
        precision: "fp32", "fp16" (with a dynamic loss scale) or "bf16"; None: that of the facade, or else fp16.
        master_weights: True; False is refused.
        pin_memory: host memory that is copied from and to is always page-locked; either value is taken.
        max_prefetch: how many units (blocks) ahead fetches begin.
        enable_gradient_accumulation: gradients can always be accumulated; either value is taken.
        min_chunk_size_m: a chunk has about so many million elements.
        max_norm: clip the gradient to this global norm in every step that has not clipped it otherwise; 0 does not.
        mem_cap_bytes: what this process may take on the device; None: what there is. On a CPU the device is simulated,
            and this bounds what chunks take on it.
        host_cap_bytes: what this machine's ranks may take of the host's memory together; None: what there is.
        initial_scale: the first loss scale.
        min_scale: it never falls below this.
        growth_factor: what it is multiplied by after `growth_interval` steps without overflow.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: see `growth_factor`.
        hysteresis: how many overflows it takes until each makes it fall.
        max_scale: it never grows beyond this.
        trace: a folder, which gets the timeline of one step, once nothing is decided any more, as a picture and as JSON; None:
            nothing is traced.
        stream_optim_frac: of the optimizer states that are in host memory, the share that comes to the device to be stepped
            there, and goes back; None: none; "auto": with a placement that is decided by itself, as much as makes steps quicker
            that wait for the gradient's norm.

    Raises:
        ConfigError: an option has no such value.
    """

    name = "gemini"
    fills_weights = True
    repeats_steps = True

    def __init__(  # noqa: PLR0913  the arguments are those that scripts pass
        self,
        placement_policy: str | None = None,
        shard_param_frac: float | None = None,
        offload_optim_frac: float | None = None,
        offload_param_frac: float | None = None,
        precision: str | None = None,
        master_weights: bool = True,
        pin_memory: bool = True,
        max_prefetch: int = 2,
        enable_gradient_accumulation: bool = True,
        min_chunk_size_m: float = 32,
        max_norm: float = 0.0,
        mem_cap_bytes: int | None = None,
        host_cap_bytes: int | None = None,
        initial_scale: float = 2.0**16,
        min_scale: float = 1.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
        max_scale: float = 2.0**32,
        trace: str | Path | None = None,
        stream_optim_frac: float | Literal["auto"] | None = None,
    ) -> None:
        if not master_weights:
            raise ConfigError("fp32 weights are always kept: leave master_weights=True")
        if max_norm < 0:
            raise ConfigError(f"max_norm is a bound, or 0 for none, not {max_norm:g}")
        if not min_chunk_size_m > 0:
            raise ConfigError(f"min_chunk_size_m is more than 0, not {min_chunk_size_m:g}")
        if max_prefetch < 0:
            raise ConfigError(f"max_prefetch is a number of units, or 0 for none, not {max_prefetch}")
        for what, cap in (("mem_cap_bytes", mem_cap_bytes), ("host_cap_bytes", host_cap_bytes)):
            if cap is not None and cap <= 0:
                raise ConfigError(f"{what} is more than 0, or None for no cap, not {cap}")
        self.take_precision(precision, default="fp16")
        self._policy = _policy(placement_policy, shard_param_frac, offload_optim_frac, offload_param_frac, max_prefetch)
        if stream_optim_frac != "auto":
            share = stream_optim_frac or 0.0
            if not 0 <= share <= 1:
                raise ConfigError(f"stream_optim_frac is a share from 0 to 1, or 'auto', not {share:g}")
            self._policy = dataclasses.replace(self._policy, stream_optim_frac=share)
        self._scale = LossScalePolicy(
            initial_scale, min_scale, max_scale, growth_factor, backoff_factor, growth_interval, hysteresis
        )
        self._chunk_elements = max(1, int(min_chunk_size_m * 2**20))
        self._max_norm = max_norm
        self._mem_cap_bytes = mem_cap_bytes
        self._host_cap_bytes = host_cap_bytes
        self._trace_folder = None if trace is None else Path(trace)

    def plan(self, model: ModelWrapper) -> dict[str, Any] | None:
        """See the base class: where each chunk is, and what that takes; see `albireo.memory.plan`."""
        return model.gemini.plan() if isinstance(model, _GeminiModel) else None

    def trace_into(self, folder: Path) -> None:
        """See the base class."""
        self._trace_folder = folder

    def place(self, model: nn.Module, device: torch.device, weights: WeightSource | None) -> None:
        """See the base class: parameters go to their chunks, one by one; buffers to the device."""
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)  # noqa: SLF001  as `Module.to` does
        for parameter in model.parameters():
            in_chunks = parameter.is_floating_point() or parameter.dtype == torch.uint8
            if not in_chunks or parameter.numel() == 0:
                parameter.data = parameter.data.to(device)

    def configure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """See the base class."""
        check_parameters(model, optimizer)
        stepped = {p for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
        if optimizer is not None:
            ShardedOptimizer.check(optimizer)
        dtype = PRECISIONS[self.precision]
        if weights is None:
            copy_from_main(model, world)
        pool = device_pool(world.device, budget_bytes=self._mem_cap_bytes if world.device.type == "cpu" else None)
        gemini = Gemini(
            model,
            {**compute_dtypes(model, dtype), **bytes_of(model)},
            frozenset(p for p in stepped if p.requires_grad),
            weights if weights is not None else ParameterValues(),
            self._setting(world, pool),
        )
        wrapped: OptimizerWrapper | None = None
        if optimizer is not None:
            wrapped = gemini.wrap(
                optimizer,
                loss_scale=LossScale(self._scale, world.device) if self.precision == "fp16" else None,
                max_norm=self._max_norm,
                make_stepper=_stepper_for(optimizer, world),
            )
        module = model if dtype == torch.float32 else CastInputs(model, dtype)
        return _GeminiModel(module, model, gemini, world), wrapped

    def readable_weights(self, model: ModelWrapper) -> Iterator[nn.Parameter]:
        """See the base class: a chunk at a time is fetched."""
        if not isinstance(model, _GeminiModel):
            raise ConfigError("give the model that boost returned with this plugin")
        seen: set[nn.Parameter] = set()
        for parameter in model.gemini.readable_weights():
            seen.add(parameter)
            yield parameter
        yield from (parameter for parameter in model.unwrap().parameters() if parameter not in seen)

    def gradient_bytes(self, model: ModelWrapper) -> int | None:
        """See the base class: where chunks come and go, memory is planned to the last byte."""
        return model.gemini.kept_gradient_bytes() if isinstance(model, _GeminiModel) else None

    def make_room(self, model: ModelWrapper) -> bool:
        """See the base class: states and weights that stayed on the device leave it."""
        return isinstance(model, _GeminiModel) and model.gemini.make_room()

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class: there is no room for whole gradients, so each micro-batch's go where they are stepped."""
        return self.accumulation_context(model)

    def accumulation_context(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """See the base class."""
        gradients = sharded_model(model).gradients
        return nullcontext() if gradients is None else gradients.more_to_come()

    def _report(self, line: str) -> None:
        if self.say is not None:
            self.say(line)

    def _write_trace(self, timeline: Timeline) -> None:
        if self._trace_folder is not None:
            write_trace(timeline, self._trace_folder)
            self._report(
                f"trace      step {timeline.step} is in {self._trace_folder}: albireo trace {self._trace_folder}"
            )

    def _setting(self, world: World, pool: DevicePool) -> Setting:
        device: int | None = self._mem_cap_bytes
        if world.device.type == "cuda":
            room = device_room_bytes(world.device, self._mem_cap_bytes or 0)
            least, most = (int(share * room) for share in _LEFT_SHARES)
            device = room - min(max(least, _LEFT_BYTES), most)
        peaks = self.peaks(world.device)
        return Setting(
            world=world,
            pool=pool,
            policy=self._policy,
            limits=MemoryLimits(device, host_room_bytes(self._host_cap_bytes, world.local_world_size)),
            chunk_elements=self._chunk_elements,
            peak_bytes=peaks.interval_peak_bytes,
            say=self._report if world.is_main else _nothing,
            tracing=TracingSetting(peaks, self._write_trace)
            if self._trace_folder is not None and world.is_main
            else None,
        )


def _nothing(_: str) -> None:
    """Say nothing."""


def _policy(
    kind: str | None, shard: float | None, optim: float | None, param: float | None, prefetch: int
) -> PlacementPolicy:
    given = {"shard_param_frac": shard, "offload_optim_frac": optim, "offload_param_frac": param}
    given = {name: value for name, value in given.items() if value is not None}
    if kind not in (None, "auto", "static"):
        raise ConfigError(f"placement_policy is auto or static, not {kind!r}")
    if kind == "auto" and given:
        raise ConfigError(
            f"{next(iter(given))} is for placement_policy='static': with 'auto' the cap decides, so leave one of them out"
        )
    for name, value in given.items():
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} is a share from 0 to 1, not {value:g}")
    chosen: Literal["auto", "static"] = "static" if given or kind == "static" else "auto"
    return PlacementPolicy(
        chosen,
        offload_optim_frac=optim or 0.0,
        offload_param_frac=param or 0.0,
        shard_param_frac=1.0 if shard is None else shard,
        prefetch=prefetch,
    )


class _StepperMaker:
    """Makes the host stepper when the first chunk is to be stepped there: its kernel takes a moment to compile."""

    def __init__(self, optimizer: torch.optim.Optimizer, threads: int) -> None:
        self._optimizer = optimizer
        self._threads = threads

    def __call__(self) -> HostStepper:
        return HostStepper(self._optimizer, threads=self._threads)


def _stepper_for(optimizer: torch.optim.Optimizer, world: World) -> _StepperMaker | None:
    """Return what makes the host stepper; None for an optimizer that it does not step."""
    try:
        HostStepper.check(optimizer)
    except ConfigError:  # it steps Adam and AdamW alone; the optimizer itself steps others on the host
        return None
    return _StepperMaker(optimizer, stepper_threads(usable_cores(), ranks=world.local_world_size))
