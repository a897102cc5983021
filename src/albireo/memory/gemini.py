"""Gemini put together: a model's chunks, what moves them, and what decides where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from albireo.device.pool import DevicePool
from albireo.distributed import World
from albireo.errors import ConfigError, OutOfMemoryError
from albireo.memory.budget import Trace
from albireo.memory.chunk import Chunk, States
from albireo.memory.conductor import Conductor
from albireo.memory.host_steps import HostSteps
from albireo.memory.itinerary import Itinerary
from albireo.memory.layout import ChunkPlan, ParameterFacts, UnitFacts, plan_chunks
from albireo.memory.module import hook_units
from albireo.memory.optimizer import GeminiOptimizer
from albireo.memory.placement import Placement
from albireo.memory.planner import MemoryLimits, PlacementPolicy, Planner
from albireo.memory.sizes import ChunkSizes
from albireo.memory.stats import MemStatsCollector
from albireo.memory.streamed_steps import StreamedSteps
from albireo.memory.tensors import StatefulTensorManager, places_of
from albireo.memory.tracing.tracer import Tracer, TracingSetting
from albireo.memory.units import Unit, find_units
from albireo.optim import HostStepper, LossScale
from albireo.sharding import FlatLayout, FlatParameters, GradientOffload, Gradients, LocalGradients, ReducedGradients
from albireo.sharding.weight_source import WeightSource

__all__ = ["Gemini", "Setting"]

# What is kept free beside what was seen, for each time that it did not suffice.
_MORE_EACH_TIME = 1.25
# What the step of states on the device takes beside them: 16-bit gradients are cast in pieces of so many elements.
_STEP_ELEMENTS = 40 * 2**20


@dataclass(frozen=True)
class Setting:
    """Where and how a model is to be trained.

    Attributes:
        world: the ranks.
        pool: the device's memory.
        policy: what the user says of placement.
        limits: what memory there is.
        chunk_elements: how many elements a chunk has, about.
        peak_bytes: returns the most that was allocated on the device since the last call.
        say: takes a line about each placement.
        tracing: who is to get the timeline of a step; None: nobody.
    """

    world: World
    pool: DevicePool
    policy: PlacementPolicy
    limits: MemoryLimits
    chunk_elements: int
    peak_bytes: Callable[[], int]
    say: Callable[[str], None]
    tracing: TracingSetting | None = None


class Gemini:
    """A model in chunks. Making it moves all of its parameters of floating point there, and hooks its units.

    Args:
        model: any module, whose parameters may be without memory.
        dtypes: what each parameter computes in; those that are not here stay as they are.
        trained: parameters that an optimizer is to step.
        source: where the first weights come from.
        setting: where and how.

    Attributes:
        chunks: those that the next forward needs first, first.
        gradients: takes the gradients of those that are trained.
        manager: moves chunks.
        conductor: hears what units do.

    Raises:
        OutOfMemoryError: no placement can work.
    """

    def __init__(
        self,
        model: nn.Module,
        dtypes: Mapping[nn.Parameter, torch.dtype],
        trained: frozenset[nn.Parameter],
        source: WeightSource,
        setting: Setting,
    ) -> None:
        self._setting = setting
        units = [
            Unit(unit.name, unit.module, tuple(p for p in unit.parameters if p in dtypes and p.numel() > 0))
            for unit in find_units(model)
        ]
        parameters = [parameter for unit in units for parameter in unit.parameters]
        plans = _plan(units, parameters, dtypes, trained, setting)
        sizes = [_sizes(plan, parameters, dtypes, trained, setting.world) for plan in plans]
        orders = [[n for n, plan in enumerate(plans) if number in plan.units] for number in range(len(units))]
        self._planner = Planner(sizes, orders, setting.policy, setting.limits)
        placement = self._planner.initial()
        self.chunks = tuple(
            _make_chunk(number, [parameters[place] for place in plan.parameters], sizes[number], source, setting,
                        placement)
            for number, plan in enumerate(plans)
        )  # fmt: skip
        self.manager = StatefulTensorManager(self.chunks, setting.pool)
        for chunk in self.chunks:
            if chunk.resident:
                setting.pool.take_back(chunk.compute)
        self.gradients = self._make_gradients()
        self._collector = MemStatsCollector(setting.peak_bytes, self._model_bytes)
        self.conductor = Conductor(
            units,
            {unit: [self.chunks[number] for number in order] for unit, order in zip(units, orders, strict=True)},
            trained,
            self.manager,
            self._collector,
            prefetch=setting.policy.prefetch,
        )
        self._names = [
            [unit.name for unit, order in zip(units, orders, strict=True) if n in order] for n in range(len(plans))
        ]
        self._may_stream: Callable[[], bool] = lambda: False
        self._tracer: Tracer | None = None
        if setting.tracing is not None:
            self._tracer = Tracer(setting.tracing, setting.pool, self.manager, self.conductor, self._names)
        self.conductor.on_step_begins = self._begin_step
        if isinstance(self.gradients, ReducedGradients):
            self.conductor.on_backward_enters = partial(_pace, self.gradients)
        self.gradients.on_gradient = self._hear_gradient
        hook_units(units, self.conductor)
        self._optimizer: torch.optim.Optimizer | None = None
        # The trace of the largest batch so far, and how large that was.
        self._trace: Trace | None = None
        # A simulated device holds chunks alone.
        elements = sum(chunk.numel for chunk in sizes if chunk.trained and chunk.dtype != torch.float32)
        self._step_bytes = 0 if setting.pool.is_simulated else 4 * min(elements, _STEP_ELEMENTS)
        self._elements = self._watched = 0
        self._accumulates = False
        # How many times as much as was seen is kept free for what is not model data.
        self._caution = 1.0
        # How often a step that goes another way than the trace is watched anew: one that goes two ways would be for ever.
        self._watches_left = 3
        self.placement = placement

    def wrap(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        loss_scale: LossScale | None,
        max_norm: float,
        make_stepper: Callable[[], HostStepper] | None,
    ) -> GeminiOptimizer:
        """Return an optimizer over the chunks' parameters.

        Args:
            optimizer: the user's.
            loss_scale: for fp16.
            max_norm: clip to this norm in each step that has not been clipped; 0 does not.
            make_stepper: makes what steps on the host beside the rest; None: the optimizer itself steps there.
        """
        trained = [chunk for chunk in self.chunks if chunk.trained]
        wrapped = GeminiOptimizer(
            optimizer,
            self.gradients,
            self._setting.world,
            manager=self.manager,
            conductor=self.conductor,
            chunks=trained,
            loss_scale=loss_scale,
            max_norm=max_norm,
        )
        can_stream = make_stepper is not None and self._setting.world.world_size == 1
        if self._setting.policy.stream_optim_frac and not can_stream:
            raise ConfigError(
                "states are streamed on one rank, for Adam and AdamW: leave stream_optim_frac out, or take HybridAdam on one rank"
            )
        self._may_stream = lambda: can_stream and wrapped.waits_for_backward
        if make_stepper is not None:
            largest = max((chunk.layout.partition_numel for chunk in trained), default=0)
            wrapped.make_streamed_steps = partial(StreamedSteps, optimizer, self._setting.pool, largest=largest)
            wrapped.make_host_steps = lambda: HostSteps(make_stepper(), self._setting.pool.to_device)
        wrapped.before_clip = self._end_backwards
        wrapped.is_settled = lambda: self.is_settled
        if self._tracer is not None:
            wrapped.on_stepped = self._tracer.step_ends
        self._optimizer = optimizer
        return wrapped

    @property
    def is_settled(self) -> bool:
        """True if nothing is to be decided in this step: chunks stay where they are."""
        return self._trace is not None and not self._collector.is_collecting

    def flush(self) -> None:
        """Finish steps that are under way, before weights or states are read."""
        self.manager.flush()

    def plan(self) -> dict[str, Any]:
        """Return what is where now, as JSON values; see `plan_data`."""
        return self._planner.data(self.placement, self._names, accumulates=self._accumulates)

    def make_room(self) -> bool:
        """Keep more of the device free than was seen to be needed: an allocation has failed, in a step that was abandoned.

        Returns:
            True if less of them stays there now, and no weight is half stepped: the step can be repeated. False over ranks
            too, which would have to agree in the middle of a collective.
        """
        if self._trace is None or self._setting.world.world_size > 1 or self.manager.half_stepped:
            return False
        self._setting.say("memory     ran out in a step: less stays on the device from here on")
        before, caution = self.placement, self._caution
        self._caution *= _MORE_EACH_TIME
        try:
            self._apply(self._trace, accumulates=self._accumulates)
        except OutOfMemoryError:  # nothing more can leave
            self._caution = caution
            return False
        now = self.placement
        return (now.states_on_device, now.resident, now.keeps) != (
            before.states_on_device,
            before.resident,
            before.keeps,
        )

    def kept_gradient_bytes(self) -> int | None:
        """Return what gradients that wait on the device for the step take at the end of backward.

        None while it is not decided what is where, and where anything moves.
        """
        trained = [chunk for chunk in self.chunks if chunk.trained]
        stays = all(chunk.resident for chunk in self.chunks) and all(c.states_place == "device" for c in trained)
        if self._trace is None or not stays:
            return None
        # Over ranks they are reduced as they come.
        return sum(chunk.weight_bytes for chunk in trained) if self._setting.world.world_size == 1 else 0

    def readable_weights(self) -> Iterator[nn.Parameter]:
        """Yield parameters as they compute, a chunk at a time; each may be read until the next one is asked for."""
        self.flush()
        for chunk in self.chunks:
            self.manager.use(chunk)
            yield from chunk.parameters
            self.manager.drop(chunk)

    def _make_gradients(self) -> Gradients:
        trained = [chunk for chunk in self.chunks if chunk.trained]
        # About the order in which gradients come; the root's are complete last.
        ordered = [c for c in reversed(trained) if not c.is_root] + [c for c in trained if c.is_root]
        world, pool = self._setting.world, self._setting.pool
        offload = GradientOffload(world.device, pool.to_host, takes=self._is_on_host, takes_each=True)
        if world.world_size == 1:
            return LocalGradients(ordered, offload)
        return ReducedGradients(ordered, world, scatter=True, overlap=True, paced=True, offload=offload)

    def _hear_gradient(self, bucket: FlatParameters, number: int) -> None:
        if isinstance(bucket, Chunk):
            self.conductor.gradient_came(bucket, bucket.parameters[number])

    def _is_on_host(self, bucket: object) -> bool:
        return isinstance(bucket, Chunk) and bucket.states_place == "host"

    def _begin_step(self, elements: int) -> None:
        self._see_batch(elements)
        if self._tracer is not None:
            self._tracer.step_begins(settled=self.is_settled)

    def _see_batch(self, elements: int) -> None:
        """See whether anything is known of a batch as large as this one."""
        elements = int(max(row[0] for row in self._setting.world.gather_numbers([float(elements)])))
        if elements <= self._elements and not (self.conductor.was_lost and self._watches_left > 0):
            # A larger one may have begun and failed.
            self._collector.is_collecting = False
            return
        if elements <= self._elements:
            # The order of uses is another one than was seen.
            self._watches_left -= 1
        elif self._trace is not None:
            # Before it is too late: activations grow as the batch does.
            self._apply(self._planner.scaled(self._trace, elements / self._elements), accumulates=self._accumulates)
        self._watched = max(elements, self._elements)
        self._collector.start()

    def _end_backwards(self) -> None:
        """Decide, by what was seen, where chunks are from here on; the step is made there already."""
        if self._collector.is_collecting:
            trace = self._collector.finish(self._setting.world, step_bytes=self._step_bytes)
            if len(trace) > 1:
                self._accumulates = self.conductor.backwards > 1
                self._apply(trace, accumulates=self._accumulates)
                self._trace, self._elements = trace, self._watched

    def _apply(self, trace: Trace, *, accumulates: bool) -> None:
        self.placement = self._planner.place(
            self._planner.scaled(trace, self._caution), accumulates=accumulates, may_stream=self._may_stream()
        )
        offload = self.gradients.offload
        for chunk in self.manager.apply(self.placement, self._optimizer):
            self.gradients.recall(chunk)
            if offload is not None:
                offload.release(chunk)
        # Of those whose states went to the host, gradients follow before anything is done to them.
        self.gradients.send_kept()
        self.conductor.itinerary = Itinerary(trace, self.placement)
        self._setting.say(self._planner.describe(self.placement))

    def _model_bytes(self) -> int:
        """Return what chunks, their states and the gradients that wait for the step take on the device."""
        on_device = [chunk for chunk in self.chunks if chunk.trained and chunk.states_place == "device"]
        states = 0
        for fragment in (fragment for chunk in on_device for fragment in chunk.fragments):
            kept = self._optimizer.state.get(fragment.master, {}) if self._optimizer is not None else {}
            states += sum(t.numel() * t.element_size() for t in kept.values() if isinstance(t, torch.Tensor))
        return self._setting.pool.owned_bytes + states + sum(self.gradients.kept_bytes(chunk) for chunk in on_device)


def _pace(gradients: ReducedGradients, done: frozenset[Chunk]) -> None:
    """Reduce gradients up to the first chunk whose backward is not over, the same on all ranks."""
    buckets = gradients.buckets
    gradients.send_until(next((place for place, bucket in enumerate(buckets) if bucket not in done), len(buckets)))


def _plan(
    units: list[Unit],
    parameters: list[nn.Parameter],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    trained: frozenset[nn.Parameter],
    setting: Setting,
) -> list[ChunkPlan]:
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    policy = setting.policy
    static = policy.kind == "static"
    return plan_chunks(
        [ParameterFacts(parameter.numel(), (dtypes[parameter], parameter in trained)) for parameter in parameters],
        [UnitFacts(unit.name, tuple(numbers[p] for p in unit.parameters)) for unit in units],
        root=len(units) - 1,
        chunk_elements=setting.chunk_elements,
        borders=(policy.offload_optim_frac, policy.offload_param_frac, policy.shard_param_frac) if static else (),
    )


def _sizes(
    plan: ChunkPlan,
    parameters: list[nn.Parameter],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    trained: frozenset[nn.Parameter],
    world: World,
) -> ChunkSizes:
    members = [parameters[place] for place in plan.parameters]
    numel = FlatLayout.of([member.shape for member in members], world.world_size).numel
    return ChunkSizes(numel, world.world_size, dtypes[members[0]], members[0] in trained, plan.is_root)


def _make_chunk(
    number: int,
    members: list[nn.Parameter],
    sizes: ChunkSizes,
    source: WeightSource,
    setting: Setting,
    placement: Placement,
) -> Chunk:
    resident = number in placement.resident
    states: States
    states, home = places_of(sizes, resident=resident, on_device=number in placement.states_on_device)
    chunk = Chunk(
        number,
        members,
        sizes,
        setting.world,
        setting.pool,
        source,
        states=states,
        home=home,
    )
    chunk.resident = resident
    return chunk
