"""An optimizer over chunks: each is stepped where its states are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from albireo.device.watch import WorkLabel, waiting
from albireo.distributed import World
from albireo.memory.chunk import Chunk
from albireo.memory.conductor import Conductor
from albireo.memory.host_steps import HostSteps, SentGradient
from albireo.memory.streamed_steps import StreamedSteps
from albireo.memory.tensors import StatefulTensorManager
from albireo.optim import LossScale
from albireo.sharding import FlatParameters, Fragment, Gradients, ShardedOptimizer

__all__ = ["GeminiOptimizer"]


class GeminiOptimizer(ShardedOptimizer):
    """Wraps an element-wise torch optimizer whose groups come to hold this rank's parts of the chunks' parameters.

    Args:
        optimizer: over the parameters of the chunks.
        gradients: takes and keeps their gradients.
        world: the ranks.
        manager: where the chunks are.
        conductor: hears when backward begins and ends.
        chunks: those that are stepped, in the order in which the next forward needs them.
        loss_scale: for fp16.
        max_norm: clip to this norm in `step`, if it has not been done before; 0 does not.

    Attributes:
        make_host_steps: makes what steps chunks on the host, beside the next forward, when it is first needed; None:
            torch's own optimizer steps them, within `step`.
        make_streamed_steps: makes what streams states through the device, likewise; None: nothing is streamed.
        waits_for_backward: chunks on the host are stepped after backward alone, as far as is known of a step.
        before_clip: called once a step, after its last backward and before anything is done with the gradients.
        is_settled: returns True if chunks stay where they are in this step.
        on_stepped: called when a step has been launched.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        world: World,
        *,
        manager: StatefulTensorManager,
        conductor: Conductor,
        chunks: list[Chunk],
        loss_scale: LossScale | None = None,
        max_norm: float = 0.0,
    ) -> None:
        super().__init__(optimizer, gradients, world, loss_scale=loss_scale, max_norm=max_norm)
        self._manager = manager
        self._conductor = conductor
        self._chunks = chunks
        self._placed = False
        self._steps_early = False
        self.make_host_steps: Callable[[], HostSteps] | None = None
        self.make_streamed_steps: Callable[[], StreamedSteps] | None = None
        self.waits_for_backward = True
        self.before_clip: Callable[[], None] | None = None
        self.is_settled: Callable[[], bool] | None = None
        self.on_stepped: Callable[[], None] | None = None

    def expect_step(self, max_norm: float) -> None:
        """See the base class: without a bound on the norm, chunks on the host are stepped as their gradients arrive.

        Not in fp16, where an overflow is known after backward alone, and not over several ranks, where what is used
        anywhere is.
        """
        clips = max_norm > 0 or self._max_norm > 0
        alone = self._world.world_size == 1 and self._loss_scale is None
        self.waits_for_backward = not alone or clips
        self._steps_early = not self.waits_for_backward and self.is_settled is not None and self.is_settled()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients; see the base class. Steps that are still under way are finished first.

        Raises:
            Exception: what stopped the host stepper.
        """
        self._placed = False
        early, self._steps_early = self._steps_early, False
        with self._conductor.backward():
            offload = self._gradients.offload
            steps = self._host_steps() if early and offload is not None and self._on_host() else None
            if steps is None or offload is None:
                super().backward(loss)
                return
            # Steps count as changes of ours, and would cover those of others.
            for chunk in self._chunks:
                chunk.check_untouched()
            # A gradient comes after all that still reads its weights.
            steps.open(1.0, fenced=False)
            offload.on_sent = self._hand_over
            try:
                super().backward(loss)
            finally:
                offload.on_sent = None

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Unscale the gradients, and clip them by their global norm; see the base class."""
        self._place()
        return super().clip_grad_by_norm(max_norm, norm_type)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step each chunk where its states are; see the base class. Steps on the host go on beside what comes next."""
        if closure is None:
            self._place()
        super().step(closure)
        self._conductor.end_step()
        if self.on_stepped is not None:
            self.on_stepped()

    def abandon_step(self, *, reduced: bool = False) -> None:
        """Forget a step that failed on this rank, so that it fails on all."""
        self._steps_early = False
        try:
            if self._manager.host_steps is not None:
                self._manager.half_stepped |= self._manager.host_steps.abandon()
        finally:
            # Ranks that fetch weights together stand at a fetch, not at a reduction: there is no collective that this one
            # could still come to. The watchdog ends them, and names it.
            super().abandon_step(reduced=reduced or self._world.world_size > 1)
            self._conductor.abandon()

    def flush(self) -> None:
        """Finish steps that are under way.

        Raises:
            Exception: what stopped the host stepper.
        """
        self._manager.flush()

    @property
    def _steps_on_device(self) -> bool:
        """See the base class."""
        return all(chunk.states_place == "device" for chunk in self._chunks)

    def _place(self) -> None:
        if not self._placed and self.before_clip is not None:
            self._placed = True
            self.before_clip()

    def _step_all(self) -> None:
        try:
            self._step_both_sides()
        except BaseException:
            # Some may have been stepped, on either side.
            self._manager.half_stepped = True
            if self._manager.host_steps is not None:
                self._manager.host_steps.abandon()
            raise

    def _step_both_sides(self) -> None:
        host = self._on_host()
        steps = self._host_steps() if host else None
        if steps is None:
            self._step_where_states_are(host)
        else:
            streamed = self._streamed_steps() if any(chunk.streams for chunk in host) else None
            number = self._factor()
            if not steps.is_open:
                steps.open(number, fenced=True)
            if streamed is not None:
                streamed.open(number)
            for chunk in host:
                # What has no gradient of the last micro-batch has not been handed over in backward.
                if streamed is not None and chunk.streams:
                    self._hand_to_stream(streamed, chunk)
                elif not steps.has(chunk):
                    self._hand_over(chunk)
            steps.seal()
        self._step_where_states_are([chunk for chunk in self._chunks if chunk.states_place == "device"])

    def _factor(self) -> float:
        """Return what gradients are to be multiplied by; waits for the device where that follows from their norm."""
        factor = self._gradients.factor
        if factor is None:
            return 1.0
        with waiting(self._conductor.watch, WorkLabel("norm of gradients")):
            return float(factor)

    def _on_host(self) -> list[Chunk]:
        return [chunk for chunk in self._chunks if chunk.states_place == "host"]

    def _host_steps(self) -> HostSteps | None:
        """Return what steps on the host beside the rest; made when it is first needed."""
        if self._manager.host_steps is None and self.make_host_steps is not None:
            self._manager.host_steps = self.make_host_steps()
        return self._manager.host_steps

    def _streamed_steps(self) -> StreamedSteps | None:
        """Return what streams states through the device; made when it is first needed."""
        if self._manager.streamed_steps is None and self.make_streamed_steps is not None:
            self._manager.streamed_steps = self.make_streamed_steps()
        return self._manager.streamed_steps

    def _hand_to_stream(self, streamed: StreamedSteps, chunk: Chunk) -> None:
        offload = self._gradients.offload
        if offload is not None:
            streamed.hand_over(chunk, offload.in_flight, offload.buffer, self._manager.stale)

    def _hand_over(self, bucket: FlatParameters) -> None:
        steps = self._manager.host_steps
        # What is streamed waits for the end of backward, where the bus has room.
        if steps is not None and isinstance(bucket, Chunk) and not bucket.streams:
            steps.hand_over(bucket, self._sent_gradient, self._manager.stale)

    def _sent_gradient(self, fragment: Fragment) -> SentGradient | None:
        offload = self._gradients.offload
        return None if offload is None else offload.in_flight(fragment)
