"""The conductor: hears when units begin and end, and has chunks fetched and let go of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from albireo.errors import OutOfMemoryError
from albireo.memory.chunk import Chunk
from albireo.memory.itinerary import Itinerary
from albireo.memory.stats import MemStatsCollector, Phase
from albireo.memory.tensors import StatefulTensorManager
from albireo.memory.tracing.recorder import Recorder
from albireo.memory.units import Unit

__all__ = ["Conductor"]


class _UnitUse:
    """What one unit is doing.

    Attributes:
        unit: which.
        chunks: those of its parameters.
        calls: forwards that have begun and not ended.
        in_backward: its backward has begun, and it is not done.
        announced: its backward has begun in this backward.
        waits_for: trained parameters whose gradients have not come in this backward.
        inputs_pending: inputs whose gradients have not come; None: nothing will tell when they have.
    """

    def __init__(self, unit: Unit, chunks: Sequence[Chunk], trained: frozenset[nn.Parameter]) -> None:
        self.unit = unit
        self.chunks = tuple(chunks)
        self.trained = trained
        self.has_frozen = len(trained) < len(unit.parameters)
        self.calls = 0
        self.forget()

    def forget(self) -> None:
        """Begin another backward."""
        self.in_backward = self.announced = False
        self.waits_for = set(self.trained)
        self.inputs_pending: int | None = None

    @property
    def is_active(self) -> bool:
        return self.calls > 0 or self.in_backward

    @property
    def is_done(self) -> bool:
        """True if nothing in this backward reads its weights any more, as far as can be told."""
        return not self.waits_for and (not self.has_frozen or self.inputs_pending == 0)


class Conductor:
    """Turns the calls of units into uses of chunks.

    Args:
        units: in the order of execution; the last is the root.
        chunks_of: the chunks of each unit's parameters.
        trained: parameters that an optimizer steps.
        manager: moves chunks.
        collector: notes what a warm-up step uses.
        prefetch: how many units ahead fetches begin where nothing is known of the order yet.

    Attributes:
        itinerary: what is known of a step; None: nothing yet.
        on_step_begins: called with a training step's first forward and the elements of its inputs.
        on_backward_enters: called with the chunks that belong to none but units whose backward had begun before the one
            that begins.
        watch: is told when units begin and end; None: nobody looks.
        backwards: how many backwards this step has had.
        was_lost: the step before did not do what its trace says.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        chunks_of: Mapping[Unit, Sequence[Chunk]],
        trained: frozenset[nn.Parameter],
        manager: StatefulTensorManager,
        collector: MemStatsCollector,
        *,
        prefetch: int,
    ) -> None:
        self._uses = [
            _UnitUse(unit, chunks_of[unit], frozenset(p for p in unit.parameters if p in trained)) for unit in units
        ]
        self._root = self._uses[-1]
        self._use_of = {use.unit: use for use in self._uses}
        self._use_of_parameter = {p: use for use in self._uses for p in use.unit.parameters}
        self._manager = manager
        self._collector = collector
        self._prefetch = prefetch
        # Alone, a rank may do with less than was planned. With others it fetches what all fetch, in one order: what the
        # pool's budget refuses it refuses on all, but a device may be full on one alone.
        alone = all(chunk.ranks == 1 for chunk in manager.chunks)
        self._no_room: tuple[type[Exception], ...] = (
            (OutOfMemoryError, torch.OutOfMemoryError) if alone else (OutOfMemoryError,)
        )
        self._in_backward = False
        self._in_forward = self._in_training_forward = False
        self._step_began = False
        self.backwards = 0
        self.was_lost = False
        self.itinerary: Itinerary | None = None
        self.on_step_begins: Callable[[int], None] | None = None
        self.on_backward_enters: Callable[[frozenset[Chunk]], None] | None = None
        self.watch: Recorder | None = None
        manager.before_change = collector.change

    @property
    def in_backward(self) -> bool:
        """True while the engine runs: a forward within is a recomputation."""
        return self._in_backward

    def enter_forward(self, unit: Unit, input_elements: int) -> None:
        """A unit's forward begins.

        Args:
            unit: which.
            input_elements: of the tensors that it was called with; of the root's they tell how large a batch is.
        """
        use = self._use_of[unit]
        if self._in_backward:
            self.enter_backward(unit)
            return
        if use is self._root:
            if self._in_forward:
                # The one before has failed, and nobody has said so.
                self.abandon()
            self._in_forward, self._in_training_forward = True, torch.is_grad_enabled()
        # Reentrant checkpointing computes blocks without gradients, in the middle of a training step's forward.
        training = torch.is_grad_enabled() or self._in_training_forward
        if use is self._root and training and not self._step_began:
            self._step_began = True
            if self.on_step_begins is not None:
                self.on_step_begins(input_elements)
        # The root is in use up to the end of backward, however many micro-batches come before it.
        if use is not self._root or use.calls == 0:
            use.calls += 1
            self._enter(use, "forward", observed=training)

    def leave_forward(self, unit: Unit) -> None:
        """A unit's forward ends."""
        use = self._use_of[unit]
        if self._in_backward or use.calls == 0:
            return
        if use is self._root:
            self._in_forward = self._in_training_forward = False
        if use is self._root and torch.is_grad_enabled():
            return
        use.calls -= 1
        self._let_go(use.chunks)
        if self.watch is not None:
            self.watch.enters(self._root.unit.name, "forward")

    def touch_root(self) -> None:
        """See to it that the root's parameters are there, whoever calls a part of it by itself."""
        if not self._root.is_active:
            for chunk in self._root.chunks:
                self._manager.use(chunk)

    def enter_backward(self, unit: Unit) -> None:
        """A unit's backward begins: the gradient of one of its outputs has come, or it is computed again."""
        use = self._use_of[unit]
        if use.in_backward:
            return
        if self.on_backward_enters is not None:
            ahead = {chunk for other in self._uses if other is use or not other.announced for chunk in other.chunks}
            self.on_backward_enters(frozenset(c for u in self._uses for c in u.chunks if c not in ahead))
        use.in_backward = use.announced = True
        self._enter(use, "backward", observed=True)

    def expect_inputs(self, unit: Unit, count: int) -> None:
        """A unit was called with inputs whose gradients will come.

        Args:
            unit: which.
            count: how many inputs.
        """
        use = self._use_of[unit]
        use.inputs_pending = (use.inputs_pending or 0) + count

    def input_done(self, unit: Unit) -> None:
        """The gradient of one of a unit's inputs has come."""
        use = self._use_of[unit]
        if use.inputs_pending is not None:
            use.inputs_pending -= 1
            self._finish_if_done(use)

    def gradient_came(self, chunk: Chunk, parameter: nn.Parameter) -> None:
        """A parameter's gradient has come.

        Args:
            chunk: the parameter's.
            parameter: which.

        Raises:
            RuntimeError: its weights were away, so the gradient is NaN.
        """
        use = self._use_of_parameter[parameter]
        if not chunk.is_current or chunk.arrival is not None:
            raise RuntimeError(
                f"the backward of {use.unit.name or 'the model'} has run while its weights were away: its outputs must be "
                "what its forward returns (tensors, or lists, tuples and dicts of them), not attributes of the module"
            )
        use.waits_for.discard(parameter)
        self._finish_if_done(use)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The engine runs within."""
        # The next gradients go where those of the step before were read from.
        self._manager.flush()
        self._in_backward = True
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self._in_backward = False
        self.backwards += 1
        for use in self._uses:
            use.forget()
            use.calls = 0
        # What has been fetched ahead for the next micro-batch stays.
        self._let_go([chunk for chunk in self._manager.chunks if chunk.arrival is None])
        if self.watch is not None:
            self.watch.enters(self._root.unit.name, "step")

    def abandon(self) -> None:
        """A step has failed: nothing is in use any more."""
        self._in_backward = self._in_forward = self._in_training_forward = False
        for use in self._uses:
            use.forget()
            use.calls = 0
        self.end_step()
        self._let_go(self._manager.chunks)

    def end_step(self) -> None:
        """The next forward begins another step."""
        self._step_began = False
        self.backwards = 0
        if self.itinerary is not None:
            self.was_lost = self.itinerary.is_lost
            self.itinerary.restart()

    def _enter(self, use: _UnitUse, phase: Phase, *, observed: bool) -> None:
        if self.watch is not None:
            # What its use waits for is waited for in its name.
            self.watch.enters(use.unit.name, phase)
        active = frozenset(chunk.number for other in self._uses if other.is_active for chunk in other.chunks)
        known = self.itinerary if observed else None
        fetches = known.enter(active, phase) if known is not None else ()
        if known is not None and known.is_lost:
            # A step that does what nobody expected has no room promised to it.
            self._let_go(self._manager.chunks)
        self._use(use.chunks)
        if observed:
            self._collector.enter(active, phase)
        for number in fetches:
            self._manager.begin(self._manager.chunks[number])
        if known is None:
            # Nobody has kept room for these: where there is none, they come when they are used.
            with suppress(*self._no_room):
                for chunk in self._neighbours(use, phase):
                    self._manager.begin(chunk)

    def _use(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            try:
                self._manager.use(chunk)
            except self._no_room:
                # The room may be taken by what was fetched ahead, or kept for a use that is to come: a promise is worth
                # less than an error.
                used = {other for use in self._uses if use.is_active for other in use.chunks}
                for other in self._manager.chunks:
                    if other not in used:
                        self._manager.drop(other)
                self._manager.use(chunk)

    def _neighbours(self, use: _UnitUse, phase: Phase) -> Iterator[Chunk]:
        """Yield what is needed next, if units are called in their order."""
        if self._prefetch == 0 or use is self._root:
            return
        place = self._uses.index(use) + (1 if phase == "forward" else -1)
        if 0 <= place < len(self._uses) - 1:
            yield from self._uses[place].chunks

    def _finish_if_done(self, use: _UnitUse) -> None:
        if use is not self._root and use.in_backward and use.is_done:
            use.in_backward = False
            self._let_go(use.chunks)

    def _let_go(self, chunks: Sequence[Chunk]) -> None:
        """Drop what nobody uses and nobody has said to keep."""
        used = {chunk for use in self._uses if use.is_active for chunk in use.chunks}
        for chunk in chunks:
            if chunk not in used and not (self.itinerary is not None and self.itinerary.keeps(chunk.number)):
                self._manager.drop(chunk)
