"""Steps of chunks whose states are on the host, streamed through the device and stepped there, beside the next forward."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from albireo.device.lanes import Arrival, CopyLane
from albireo.device.pool import DevicePool
from albireo.device.watch import WaitWatch, WorkLabel, waiting
from albireo.memory.chunk import Chunk
from albireo.memory.host_steps import SentGradient
from albireo.memory.stream_pieces import SLOTS, Piece, pieces_of, slot_elements
from albireo.optim import AdamValues, fused_step
from albireo.sharding import Fragment

__all__ = ["StreamedSteps"]

# Chunks that are enqueued at a time. All at once would keep the loop from launching the next forward.
_AHEAD = 2


class _Slot:
    """Device memory for one piece.

    Attributes:
        states: masters and two moments, fp32, each 1-D of a slot's elements.
        gradient: fp32.
        free: when the piece before has left; None: there was none.
    """

    def __init__(self, pool: DevicePool, elements: int) -> None:
        self.states = tuple(pool.empty(elements, torch.float32) for _ in range(3))
        self.gradient = pool.empty(elements, torch.float32)
        self._narrow = pool.empty(2 * elements, torch.uint8)
        self.free: Arrival | None = None

    def narrow(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the room for 16-bit numbers: a gradient's, and then those of new weights."""
        return self._narrow.view(dtype)


@dataclass(frozen=True, eq=False)
class _Job:
    """A chunk to be stepped.

    Attributes:
        chunk: which.
        gradients: by the fragment's number, its gradient's place on the host and when it is there.
        values: by the fragment's number, what its group said when the step was opened, and which step of its it is.
        gradient_of: by dtype, where the chunk's gradients lie on the host, laid out as its partition.
        factor: what gradients are multiplied by.
    """

    chunk: Chunk
    gradients: dict[int, SentGradient]
    values: dict[int, tuple[AdamValues, float]]
    gradient_of: dict[torch.dtype, torch.Tensor]
    factor: float


class StreamedSteps:
    """Streams masters and moments to the device, steps them there, and streams them back, a piece at a time.

    Three lanes form a pipeline over a ring of slots: in, step, out. A piece waits for its slot and its gradient; what
    the host has of a chunk is whole again when its last piece is out. New weights of a resident chunk are written into
    its storage by the step; those of all go home.

    Steps have the bits of torch's fused Adam on the device. Nothing here blocks the host but `flush`.

    Args:
        optimizer: a torch Adam or AdamW, see `HostStepper.check`.
        pool: the device's memory.
        largest: elements of the largest partition that is streamed.

    Attributes:
        lanes: in, step and out.
        watch: is told what waits; None: nobody looks.
        has_failed: some weights are stepped and others not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, pool: DevicePool, *, largest: int) -> None:
        self._optimizer = optimizer
        self._pool = pool
        self._elements = slot_elements(largest)
        self._slots = deque(_Slot(pool, self._elements) for _ in range(SLOTS))
        self._in, self._step_lane, self._out = pool.make_lane(), pool.make_lane(), pool.make_lane()
        # The ring's memory may have been another's, whose kernels are not done.
        self._in.follow()
        self.watch: WaitWatch | None = None
        self.has_failed = False
        self._moments: dict[Chunk, tuple[torch.Tensor, torch.Tensor]] = {}
        self._values: dict[torch.Tensor, AdamValues] = {}
        self._factor = 1.0
        self._waiting: deque[_Job] = deque()
        self._under_way: deque[Arrival] = deque()

    @property
    def lanes(self) -> tuple[CopyLane, CopyLane, CopyLane]:
        """In, step and out."""
        return self._in, self._step_lane, self._out

    def open(self, factor: float) -> None:
        """Begin a step, when the one before is done. All values of the optimizer's groups are copied now.

        Args:
            factor: what gradients are multiplied by in fp32.
        """
        self.flush()
        self._factor = factor
        self._values = {p: AdamValues.of(group) for group in self._optimizer.param_groups for p in group["params"]}
        # New weights are written where kernels that were launched before still read the old ones, and homes from which
        # copies may still be made. What comes later on the current stream waits for a chunk's arrival.
        self._step_lane.follow()
        self._out.follow()

    def hand_over(
        self,
        chunk: Chunk,
        gradients: Callable[[Fragment], SentGradient | None],
        buffers: Callable[[Chunk, torch.dtype], torch.Tensor],
        before: Callable[[Chunk], None],
    ) -> None:
        """Have a chunk stepped: in the order of the calls, beside what the current stream does next.

        Args:
            chunk: one of one rank, whose states are on the host and streamed.
            gradients: returns a fragment's gradient; None: it is not stepped.
            buffers: returns where a chunk's gradients of a dtype lie on the host, laid out as its partition.
            before: called with it first, if anything is stepped.
        """
        found = {n: sent for n, fragment in enumerate(chunk.fragments) if (sent := gradients(fragment)) is not None}
        if not found:
            return
        before(chunk)
        values = {number: self._count_step(chunk, chunk.fragments[number]) for number in found}
        dtypes = {gradient.dtype for gradient, _ in found.values()}
        self._waiting.append(
            _Job(chunk, found, values, {dtype: buffers(chunk, dtype) for dtype in dtypes}, self._factor)
        )
        self.pump()

    def pump(self) -> None:
        """Keep the pipeline fed; called now and then."""
        while self._under_way and self._under_way[0].has_run:
            self._under_way.popleft()
        while self._waiting and len(self._under_way) < _AHEAD:
            self._enqueue(self._waiting.popleft())

    def wait_for(self, chunk: Chunk) -> None:
        """See to it that a chunk's step is enqueued, if it is to be stepped: its arrivals are set from here on."""
        if any(job.chunk is chunk for job in self._waiting):
            while self._waiting:
                job = self._waiting.popleft()
                self._enqueue(job)
                if job.chunk is chunk:
                    return

    def enqueue_all(self) -> None:
        """Enqueue what is left: nobody will come by for a while."""
        while self._waiting:
            self._enqueue(self._waiting.popleft())

    def flush(self) -> None:
        """Block until all are stepped, and masters, moments and homes are whole on the host.

        Raises:
            Exception: what stopped a lane.
        """
        self.enqueue_all()
        with waiting(self.watch if self._under_way else None, WorkLabel("streamed step")):
            for lane in self.lanes:
                lane.drain()
        self._under_way.clear()

    def forget(self, chunk: Chunk) -> None:
        """Let a chunk's page-locked moments go: it is streamed no more. Its states have been copied elsewhere."""
        self._moments.pop(chunk, None)

    def _count_step(self, chunk: Chunk, fragment: Fragment) -> tuple[AdamValues, float]:
        """Count a fragment's step, and see that its moments lie in the chunk's page-locked memory."""
        if chunk not in self._moments:
            numel = chunk.layout.partition_numel
            # One block: small ones may share a page, which can be locked once only.
            both = self._pool.host(2 * numel, torch.float32).zero_()
            self._moments[chunk] = both[:numel], both[numel:]
        run = slice(fragment.cut.offset, fragment.cut.offset + fragment.cut.numel)
        state = self._optimizer.state[fragment.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name, arena in zip(("exp_avg", "exp_avg_sq"), self._moments[chunk], strict=True):
            place = arena[run]
            if name not in state:
                state[name] = place.zero_()
            elif state[name].data_ptr() != place.data_ptr():
                # Stepped elsewhere before, or loaded.
                state[name] = place.copy_(state[name])
        count = state["step"].numpy()
        count += 1
        return self._values[fragment.master], float(count)

    def _enqueue(self, job: _Job) -> None:
        try:
            self._enqueue_pieces(job)
        except BaseException:
            self.has_failed = True
            raise

    def _enqueue_pieces(self, job: _Job) -> None:
        chunk = job.chunk
        cuts = [fragment.cut for fragment in chunk.fragments]
        stepped: Arrival | None = None
        for piece in pieces_of(cuts, sorted(job.gradients), self._elements):
            stepped = self._enqueue_piece(job, piece)
        if stepped is None:
            return
        last = self._slots[-1].free
        if last is not None:
            self._under_way.append(last)
            chunk.home_arrival = last
        if chunk.resident:
            chunk.arrival = stepped
            chunk.is_current = True

    def _enqueue_piece(self, job: _Job, piece: Piece) -> Arrival:
        """Enqueue a piece's way, and return when its weights are in the storage."""
        slot = self._slots.popleft()
        self._slots.append(slot)
        chunk, numel = job.chunk, piece.numel
        run = slice(piece.begin, piece.stop)
        homes = [chunk.master[run], *(arena[run] for arena in self._moments[chunk])]
        arrived = _copy_all(
            self._in,
            [slot.free, *{id(sent[1]): sent[1] for sent in (job.gradients[p.fragment] for p in piece.parts)}.values()],
            [
                *zip((state[:numel] for state in slot.states), homes, strict=True),
                *((_gradient_place(slot, dtype)[:numel], buffer[run]) for dtype, buffer in job.gradient_of.items()),
            ],
            "states in",
            chunk,
        )

        def step() -> None:
            try:
                arrived.wait()
                _step(slot, job, piece)
            except BaseException:
                self.has_failed = True
                raise

        stepped = self._step_lane.run(step, WorkLabel("streamed step", chunk))
        leaving = list(zip(homes, (state[:numel] for state in slot.states), strict=True))
        if chunk.home is not chunk.master:
            leaving.append((chunk.home[run], slot.narrow(chunk.dtype)[:numel]))
        slot.free = _copy_all(self._out, [stepped], leaving, "states out", chunk)
        return stepped


def _copy_all(
    lane: CopyLane,
    after: Sequence[Arrival | None],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    kind: str,
    chunk: Chunk,
) -> Arrival:
    """Enqueue copies behind what another lane does, and return when all have run."""

    def wait() -> None:
        for arrival in after:
            if arrival is not None:
                arrival.wait()

    last = lane.run(wait)
    for target, source in pairs:
        last = lane.copy(target, source, WorkLabel(kind, chunk, source.numel() * source.element_size()))
    return last


def _gradient_place(slot: _Slot, dtype: torch.dtype) -> torch.Tensor:
    return slot.gradient if dtype == torch.float32 else slot.narrow(dtype)


@torch.no_grad()
def _step(slot: _Slot, job: _Job, piece: Piece) -> None:
    """Step a piece; runs on the step's lane."""
    chunk, numel = job.chunk, piece.numel
    master, *moments = slot.states
    local = [(part.fragment, slice(part.begin - piece.begin, part.stop - piece.begin)) for part in piece.parts]
    if torch.float32 not in job.gradient_of:
        slot.gradient[:numel].copy_(slot.narrow(next(iter(job.gradient_of)))[:numel])
    else:
        for number, run in local:
            dtype = job.gradients[number][0].dtype
            if dtype != torch.float32:
                slot.gradient[run].copy_(slot.narrow(dtype)[run])
    if job.factor != 1.0:
        slot.gradient[:numel].mul_(job.factor)
    alike: dict[tuple[AdamValues, float], list[slice]] = defaultdict(list)
    for number, run in local:
        alike[job.values[number]].append(run)
    for (values, count), runs in alike.items():
        fused_step(
            values,
            torch.full((), count, dtype=torch.float32, device=master.device),
            *([tensor[run] for run in runs] for tensor in (master, slot.gradient, *moments)),
        )
    new = master[:numel]
    if chunk.home is not chunk.master:
        new = slot.narrow(chunk.dtype)[:numel].copy_(new)
    if chunk.resident:
        chunk.partition[piece.begin : piece.stop].copy_(new)
