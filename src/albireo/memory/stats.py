"""MemStatsCollector: what a warm-up step saw of the order in which chunks are used, and of the rest of the memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Literal

from albireo.distributed import World
from albireo.errors import AlbireoError
from albireo.memory.budget import Trace, Use

__all__ = ["MemStatsCollector"]

Phase = Literal["forward", "backward", "step"]


class MemStatsCollector:
    """Notes each use of chunks, and the most that was on the device beside model data until the next one.

    Between two changes of what chunks take, what they take is known, so the rest of the peak is not theirs:
    activations, gradients in passing, scratch.

    Args:
        peak_bytes: returns the most that was allocated on the device since the last call.
        model_bytes: returns what chunks, their states and the gradients that are kept take on the device now.
    """

    def __init__(self, peak_bytes: Callable[[], int], model_bytes: Callable[[], int]) -> None:
        self._peak_bytes = peak_bytes
        self._model_bytes = model_bytes
        self._uses: list[tuple[frozenset[int], Phase]] = []
        self._others: list[int] = []
        self.is_collecting = False

    def start(self) -> None:
        """Begin a step: forget what there is."""
        self._uses, self._others = [], []
        self.is_collecting = True
        self._peak_bytes()

    def enter(self, chunks: frozenset[int], phase: Phase) -> None:
        """Note that a use begins.

        Args:
            chunks: the numbers of all that are in use now.
            phase: where the step is.
        """
        if not self.is_collecting:
            return
        self.change()
        self._uses.append((chunks, phase))
        self._others.append(0)

    def change(self) -> None:
        """Note that what chunks take on the device is about to change."""
        if self.is_collecting:
            other = self._peak_bytes() - self._model_bytes()
            if self._others:
                self._others[-1] = max(self._others[-1], other)

    def finish(self, world: World, *, step_bytes: int) -> Trace:
        """End the step, and agree with all ranks: the trace is the same on each, with the largest numbers of any.

        Args:
            world: the ranks.
            step_bytes: what the optimizer's step takes beside model data.

        Returns:
            The uses in their order, then the step.

        Raises:
            AlbireoError: ranks have used other chunks, or in another order, so that they would wait for each other.
        """
        self.change()
        self.is_collecting = False
        # 32 bits, which fp64 carries exactly.
        order = [float(zlib.crc32(f"{sorted(chunks)} {phase}".encode())) for chunks, phase in self._uses]
        told = world.gather_numbers([float(len(order))])
        if len({count for (count,) in told}) > 1 or any(row != order for row in world.gather_numbers(order)):
            raise AlbireoError(
                "ranks have used the model's units in different orders, and weights are fetched by all together: let every "
                "rank call the same modules, or take LowLevelZeroPlugin, which keeps whole weights"
            )
        others = [max(column) for column in zip(*world.gather_numbers([float(o) for o in self._others]), strict=True)]
        uses = [Use(chunks, int(other), phase) for (chunks, phase), other in zip(self._uses, others, strict=True)]
        self._uses, self._others = [], []
        return (*uses, Use(frozenset(), step_bytes, "step"))
