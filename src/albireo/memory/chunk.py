"""A chunk: a flat buffer of parameters, and where its parts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from albireo.device.lanes import Arrival
from albireo.device.pool import DevicePool
from albireo.distributed import World
from albireo.distributed.collectives import Transfer
from albireo.memory.sizes import ChunkSizes
from albireo.sharding import FlatLayout, Fragment
from albireo.sharding.untouched import moved_weight, version_of, written_weight
from albireo.sharding.weight_source import WeightSource

__all__ = ["Chunk", "Home", "States"]

States = Literal["device", "host"]
Home = Literal["storage", "device", "host"]


class Chunk:
    """Parameters in one flat buffer whose device memory comes and goes; see docs/gemini.md for its parts.

    Making it moves the parameters there. It begins away, with masters and home where it is told.

    Args:
        number: its place in the list of chunks.
        parameters: of floating point, not fp64, or frozen bytes; of one kind; with or without memory.
        sizes: what is known of it: what computes, and whether an optimizer steps it.
        world: the ranks that share it.
        pool: the device's memory.
        source: where the first weights come from.
        states: where masters and optimizer states are.
        home: where this rank's partition of what computes is.

    Attributes:
        dtype: what computes.
        trained: an optimizer steps it.
        is_root: it is in use from the beginning of forward to the end of backward.
        layout: where each parameter lies.
        compute: the storage, 1-D [layout.numel]; it has memory or none.
        partition: this rank's part of it, 1-D.
        home: this rank's part of what computes, 1-D, from which storage is filled again.
        home_place: where that is.
        master: this rank's part in fp32 (bytes as they are), 1-D; where what computes is the same, the home itself,
            wherever both lie in one memory.
        states_place: where masters and optimizer states are.
        fragments: this rank's parts of parameters.
        resident: its storage is never let go of.
        streams: its states are on the host, page-locked, and come to the device to be stepped.
        is_current: the storage holds the newest weights of all ranks.
        arrival: what is to be waited for before the storage is read; None: nothing.
        home_arrival: what is to be waited for before the home is read; None: nothing.
        on_publish: called when masters have been stepped.
    """

    def __init__(
        self,
        number: int,
        parameters: Sequence[nn.Parameter],
        sizes: ChunkSizes,
        world: World,
        pool: DevicePool,
        source: WeightSource,
        *,
        states: States,
        home: Home,
    ) -> None:
        self.number = number
        self.parameters = tuple(parameters)
        self.dtype, self.trained, self.is_root = sizes.dtype, sizes.trained, sizes.is_root
        self.layout = FlatLayout.of([parameter.shape for parameter in parameters], world.world_size)
        # What is not of floating point is frozen, and has no wider form.
        self._master_dtype = torch.float32 if self.dtype.is_floating_point else self.dtype
        self._pool = pool
        self.compute = pool.empty(self.layout.numel, self.dtype)
        first = world.rank * self.layout.partition_numel
        self.partition = self.compute[first : first + self.layout.partition_numel]
        # Views are made while there is memory: torch makes none of a storage of size zero.
        self._views = [self.compute[part.offset : part.stop].view(part.shape) for part in self.layout.segments]
        cuts = self.layout.cuts(world.rank)
        self._runs = [(cut, self.partition[cut.offset : cut.offset + cut.numel]) for cut in cuts]
        pool.let_go(self.compute)
        self.states_place: States = states
        self.home_place: Home = home
        self.resident = home == "storage"
        self.streams = False
        self.is_current = False
        self.is_attached = False
        self.arrival: Arrival | None = None
        self.home_arrival: Arrival | None = None
        self.on_publish: Callable[[Chunk], None] | None = None
        self.master = self._states_buffer(states, home)
        self.fragments = self._make_fragments(source)
        self.home = self._home_buffer(home)
        if self.home is not self.master:
            self.home.copy_(self.master)
        for parameter in self.parameters:
            parameter.grad = None
        self.detach()
        self._versions = [version_of(parameter) for parameter in self.parameters]

    @property
    def rest(self) -> None:
        """See `FlatParameters`: masters are whole."""
        return None

    def joined(self) -> AbstractContextManager[None]:
        """See `FlatParameters`: masters are whole."""
        return nullcontext()

    @property
    def ranks(self) -> int:
        """How many ranks share it."""
        return self.layout.ranks

    @property
    def is_here(self) -> bool:
        """True if the storage has memory, whatever is in it."""
        return self._pool.holds(self.compute)

    @property
    def writes_back(self) -> bool:
        """True if new weights are made on the device and are at home on the host."""
        return self.states_place == "device" and self.home_place == "host"

    @property
    def weight_bytes(self) -> int:
        """What the storage takes."""
        return self.layout.numel * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """What this rank's partition of it takes."""
        return self.layout.partition_numel * self.dtype.itemsize

    def attach(self) -> None:
        """Let the parameters be views of the storage.

        Raises:
            RuntimeError: somebody has cast, moved or replaced one while it was away; with what to do instead.
        """
        if self.is_attached:
            return
        away = self._pool.nan(self.dtype).data_ptr()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.data_ptr() != away:
                raise moved_weight(view.shape)
            parameter.data = view
        self.is_attached = True

    def detach(self) -> None:
        """Let the parameters be NaN, expanded to their shapes: a stray read is to show."""
        away = self._pool.nan(self.dtype)
        for parameter, segment in zip(self.parameters, self.layout.segments, strict=True):
            parameter.data = away.expand(segment.shape)
        self.is_attached = False

    def publish(self, *, is_cast: bool = False) -> Transfer:
        """Bring stepped masters home; see `FlatParameters`. Other ranks get them with the next fetch.

        Args:
            is_cast: the home has the new weights already.
        """
        if not is_cast and self.home is not self.master and not self.writes_back:
            self.home.copy_(self.master)
        self.count_change()
        if self.on_publish is not None:
            self.on_publish(self)
        return Transfer(None)

    def count_change(self) -> None:
        """Let autograd see that the weights are others: a backward through a forward of before would be wrong."""
        torch.autograd.graph.increment_version(list(self.parameters))
        self._versions = [version_of(parameter) for parameter in self.parameters]

    def check_untouched(self) -> None:
        """Refuse weights that somebody else has changed: the next step would undo it, or not see it.

        Raises:
            RuntimeError: with what to do instead.
        """
        away = self._pool.nan(self.dtype).data_ptr()
        parts = zip(self.parameters, self.layout.segments, self._views, self._versions, strict=True)
        for parameter, segment, view, version in parts:
            place = view.data_ptr() if self.is_attached else away
            if parameter.data_ptr() != place or parameter.dtype != self.dtype:
                raise moved_weight(segment.shape)
            if version_of(parameter) != version:
                raise written_weight(segment.shape)

    def place(
        self, states: States, home: Home, optimizer: torch.optim.Optimizer | None, *, streams: bool = False
    ) -> None:
        """Move masters, optimizer states and home. What is stepped and what computes keep every bit.

        Args:
            states: where masters and states are to be.
            home: where the home is to be.
            optimizer: whose states they are.
            streams: states that are on the host are to come to the device to be stepped.
        """
        if (states, home, streams) == (self.states_place, self.home_place, self.streams):
            return
        if self.home_arrival is not None:
            self.home_arrival.synchronize()
            self.home_arrival = None
        if home == "storage":
            self._pool.take_back(self.compute)
            # What the other ranks have is not there yet, and this rank's part is written below.
            self.is_current, self.arrival = False, None
        old_master, moves = self.master, (states, streams) != (self.states_place, self.streams)
        in_storage = self._master_is_home(self.states_place, self.home_place) and self.home_place == "storage"
        self.states_place, self.home_place, self.streams = states, home, streams
        if moves or in_storage or (self._master_is_home(states, home) and home == "storage"):
            self.master = self._states_buffer(states, home)
            self.master.copy_(old_master)
            self._rebind(optimizer)
        self.home = self._home_buffer(home)
        if self.home is not self.master:
            self.home.copy_(self.master)
        if home == "storage" and self.ranks == 1:
            self.is_current = True
            self.attach()

    def _rebind(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Point fragments at the new masters, and take their states along."""
        for fragment in self.fragments:
            fragment.master.data = self.master[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
            if optimizer is None or fragment.master not in optimizer.state:
                continue
            state = optimizer.state[fragment.master]
            for key, value in state.items():
                # A count of steps lies beside its parameter where a kernel counts, else on the host.
                if isinstance(value, torch.Tensor) and (value.dim() > 0 or _counts_on_device(optimizer, fragment)):
                    state[key] = value.to(self.master.device, copy=True)

    def _make_fragments(self, source: WeightSource) -> tuple[Fragment, ...]:
        fragments = []
        with torch.no_grad():
            for cut, compute in self._runs:
                parameter = self.parameters[cut.segment]
                run = slice(cut.offset, cut.offset + cut.numel)
                source.fill(parameter, cut.start, self.master[run])
                master = nn.Parameter(self.master[run], requires_grad=parameter.requires_grad)
                fragments.append(Fragment(parameter, cut.segment, cut, master, compute))
            for parameter in self.parameters:
                if parameter.is_meta:
                    # A parameter on the meta device takes no other data; its place in modules and optimizers stays. It
                    # begins with a tensor, and so with a count of changes, of its own.
                    own = torch.empty(0, dtype=self.dtype, device=self._pool.device)
                    real = nn.Parameter(own, requires_grad=parameter.requires_grad)
                    torch.utils.swap_tensors(parameter, real)  # type: ignore[no-untyped-call]
        return tuple(fragments)

    def _master_is_home(self, states: States, home: Home) -> bool:
        return self.dtype == self._master_dtype and (states == "host") == (home == "host")

    def _states_buffer(self, states: States, home: Home) -> torch.Tensor:
        numel = self.layout.partition_numel
        if self._master_is_home(states, home) and home == "storage":
            self._pool.take_back(self.compute)
            return self.partition
        if states == "device":
            return self._pool.empty(numel, self._master_dtype).zero_()
        # Copied to the device only where it is the home, or where it is stepped there; else no page has to be locked.
        if self._master_is_home(states, home) or self.streams:
            return self._pool.host(numel, self._master_dtype).zero_()
        return torch.zeros(numel, dtype=self._master_dtype)

    def _home_buffer(self, home: Home) -> torch.Tensor:
        if self._master_is_home(self.states_place, home):
            return self.master
        if home == "storage":
            self._pool.take_back(self.compute)
            return self.partition
        numel = self.layout.partition_numel
        return self._pool.empty(numel, self.dtype) if home == "device" else self._pool.host(numel, self.dtype)


def _counts_on_device(optimizer: torch.optim.Optimizer, fragment: Fragment) -> bool:
    group = next(g for g in optimizer.param_groups if any(p is fragment.master for p in g["params"]))
    return bool(group.get("fused") or group.get("capturable"))
