"""An optimizer over chunks: each is stepped where its states are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from albireo.distributed import World
from albireo.memory.chunk import Chunk
from albireo.memory.conductor import Conductor
from albireo.memory.host_steps import HostSteps
from albireo.memory.tensors import StatefulTensorManager
from albireo.optim import LossScale
from albireo.sharding import Fragment, Gradients, ShardedOptimizer

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
        before_clip: called once a step, after its last backward and before anything is done with the gradients.
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
        self.make_host_steps: Callable[[], HostSteps] | None = None
        self.before_clip: Callable[[], None] | None = None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients; see the base class. Steps that are still under way are finished first.

        Raises:
            Exception: what stopped the host stepper.
        """
        self._placed = False
        with self._conductor.backward():
            super().backward(loss)

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

    def abandon_step(self) -> None:
        """Forget a step that failed on this rank, so that it fails on all."""
        super().abandon_step()
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
        host = [chunk for chunk in self._chunks if chunk.states_place == "host"]
        if host and self.make_host_steps is not None:
            if self._manager.host_steps is None:
                self._manager.host_steps = self.make_host_steps()
            factor = self._gradients.factor
            self._manager.host_steps.begin(
                host, self._host_gradient, 1.0 if factor is None else float(factor), self._manager.stale
            )
        elif host:
            self._step_where_states_are(host)
        self._step_where_states_are([chunk for chunk in self._chunks if chunk.states_place == "device"])

    def _host_gradient(self, fragment: Fragment) -> tuple[torch.Tensor, Callable[[], object] | None] | None:
        offload = self._gradients.offload
        return None if offload is None else offload.in_flight(fragment)
