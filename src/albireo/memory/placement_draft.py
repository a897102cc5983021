"""A placement in the making: what has been given room on the device so far, and what is left at each moment. Pure."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence

from albireo.memory.budget import ChunkBytes, Trace, device_bytes_taken, first_gradients
from albireo.memory.placement_keeps import Gap, choose_gaps

__all__ = ["Draft"]


class Draft:
    """What has room on the device, and the room left.

    It begins with what each moment needs in any case, and the rest is given room by its methods, each of which takes
    only what is left.

    Attributes:
        states_on_device: chunks that are stepped on the device.
        resident: chunks whose weights never leave it.
        keeps: (use, chunk): after this use the chunk stays until its next one.
        fetches: by use, the chunks whose fetch begins with it, ahead of their own.
        present: by moment, the chunks that are there, but the resident ones.
        left_bytes: the room left by moment; negative where there was too little to begin with.
    """

    def __init__(
        self,
        trace: Trace,
        chunks: Sequence[ChunkBytes],
        device_bytes: int,
        *,
        states_on_device: Collection[int] = (),
        resident: Collection[int] = (),
    ) -> None:
        self._trace = trace
        self._chunks = chunks
        self._begins = first_gradients(trace, chunks)
        self.states_on_device = set(states_on_device)
        self.resident = set(resident)
        self.present = [set(use.chunks - self.resident) for use in trace]
        taken = device_bytes_taken(
            trace, chunks, states_on_device=states_on_device, resident=resident, present=self.present
        )
        self.left_bytes = [device_bytes - moment for moment in taken]
        self.keeps: set[tuple[int, int]] = set()
        self.fetches: list[list[int]] = [[] for _ in trace]

    def copy(self) -> Draft:
        """Return another one with the same in it, to try something with."""
        other = copy.copy(self)
        other.states_on_device = set(self.states_on_device)
        other.resident = set(self.resident)
        other.present = [set(present) for present in self.present]
        other.left_bytes = list(self.left_bytes)
        other.keeps = set(self.keeps)
        other.fetches = [list(fetches) for fetches in self.fetches]
        return other

    def make_resident(self, chunks: Iterable[int]) -> bool:
        """Give the weights of chunks room at every moment, or of none if not of all.

        Args:
            chunks: their numbers.

        Returns:
            Whether they fitted.
        """
        coming = set(chunks) - self.resident
        if not self._claim(self._weights_needed(chunk) for chunk in sorted(coming)):
            return False
        self._reside(coming)
        return True

    def step_on_device(self, chunk: int) -> bool:
        """Give the states of a chunk room, and its gradient from backward on.

        Args:
            chunk: its number. It is trained, and resident or shared by several ranks.

        Returns:
            Whether they fitted.
        """
        if chunk in self.states_on_device:
            return True
        if not self._claim([self._states_needed(chunk, is_resident=chunk in self.resident)]):
            return False
        self.states_on_device.add(chunk)
        return True

    def settle(self, chunk: int) -> bool:
        """Have all of a chunk on the device, or nothing if that does not fit.

        Where several ranks share it, its parts: whole weights take more, but those of the root, which are there anyway.

        Args:
            chunk: its number.

        Returns:
            Whether it fitted.
        """
        sizes = self._chunks[chunk]
        if not sizes.trained:
            return self.make_resident([chunk])
        if chunk in self.resident or (sizes.ranks > 1 and not sizes.is_root and self.step_on_device(chunk)):
            return self.step_on_device(chunk)
        if not self._claim([self._weights_needed(chunk), self._states_needed(chunk, is_resident=True)]):
            return False
        self._reside({chunk})
        self.states_on_device.add(chunk)
        return True

    def keep_in_place(self) -> None:
        """Let chunks stay that the very next use needs too. It takes no room."""
        for use, chunk, next_use in self._pairs_of_uses():
            if next_use == use + 1:
                self.keeps.add((use, chunk))

    def keep_what_fits(self) -> None:
        """Keep chunks between their uses, so that the fewest bytes are fetched."""
        gaps = [
            Gap(chunk, use, next_use, self._chunks[chunk].weights, self._chunks[chunk].shard)
            for use, chunk, next_use in self._pairs_of_uses()
            if next_use > use + 1
        ]
        for gap in choose_gaps(gaps, self.left_bytes):
            self.keeps.add((gap.use, gap.chunk))
            self._take(gap.chunk, range(gap.use + 1, gap.next_use))

    def fetch_ahead(self, depth: int) -> None:
        """Begin fetches before the uses that need them, those needed first first.

        A chunk that would be let go and fetched again at once is kept instead.

        Args:
            depth: by how many uses at most.
        """
        last_use: dict[int, int] = {}
        for number, use in enumerate(self._trace):
            for chunk in sorted(use.chunks - self.resident):
                begin = number
                while begin > max(0, number - depth) and self._has_room(chunk, begin - 1):
                    begin -= 1
                if begin == number:
                    continue
                if begin > 0 and chunk in self.present[begin - 1]:
                    self.keeps.add((last_use[chunk], chunk))
                else:
                    self.fetches[begin].append(chunk)
                self._take(chunk, range(begin, number))
            last_use.update(dict.fromkeys(use.chunks, number))

    def _pairs_of_uses(self) -> Iterator[tuple[int, int, int]]:
        """Yield a use of a chunk that may leave, the chunk, and its next use."""
        last_use: dict[int, int] = {}
        for number, use in enumerate(self._trace):
            for chunk in sorted(use.chunks - self.resident):
                if chunk in last_use:
                    yield last_use[chunk], chunk, number
                last_use[chunk] = number

    def _weights_needed(self, chunk: int) -> list[int]:
        """Return by moment what it takes beyond what is taken already to have a chunk's weights there."""
        sizes = self._chunks[chunk]
        # A home on the device lies in the weights from then on.
        home = sizes.shard if sizes.ranks > 1 and chunk in self.states_on_device else 0
        return [(0 if chunk in present else sizes.weights) - home for present in self.present]

    def _states_needed(self, chunk: int, *, is_resident: bool) -> list[int]:
        """Return by moment what it takes to step a chunk on the device."""
        sizes = self._chunks[chunk]
        constant = sizes.states + (0 if is_resident else sizes.shard)
        begin = self._begins.get(chunk, len(self._trace))
        return [constant + (sizes.gradients if moment >= begin else 0) for moment in range(len(self._trace))]

    def _claim(self, needs: Iterable[Sequence[int]]) -> bool:
        """Take from what is left at each moment, if there is enough at all of them."""
        left = list(self.left_bytes)
        for need in needs:
            left = [room - taken for room, taken in zip(left, need, strict=True)]
        if min(left, default=0) < 0:
            return False
        self.left_bytes = left
        return True

    def _reside(self, coming: set[int]) -> None:
        self.resident |= coming
        self.keeps = {(use, chunk) for use, chunk in self.keeps if chunk not in coming}
        for present in self.present:
            present -= coming

    def _has_room(self, chunk: int, moment: int) -> bool:
        return chunk not in self.present[moment] and self._chunks[chunk].weights <= self.left_bytes[moment]

    def _take(self, chunk: int, moments: Iterable[int]) -> None:
        for moment in moments:
            self.present[moment].add(chunk)
            self.left_bytes[moment] -= self._chunks[chunk].weights
