"""What is done to tensors, written down as it happens, so that the values of one of them can be had again alone.

As in torchdistx's deferred initialisation, operations are seen below autograd by a dispatch mode. A tensor may be
*away*: it is on the meta device, and what is done to it is only written down. Others are computed as ever, and written
down too, since one that is away may come of them. Memory is what is followed, not tensors: views, detached tensors,
`.data` and parameters of the same storage are the same values.

Each operation that draws at random has a seed of its own, made of the recording's and of its number among them. So a
draw is the same when it is made again, alone or in another order, and torch's global random state is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from albireo.device import seed_of
from albireo.errors import ModelError
from albireo.models.arguments import instances, replaced, schema_of, written_by

__all__ = ["Origin", "Recording", "View", "origin_of"]

_NAME = "_albireo_origin"
_EMPTY = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)
# They look at nothing that was there before.
_FRESH = frozenset(f"aten::{name}" for name in ("copy_", "fill_", "normal_", "uniform_", "zero_"))


class View(NamedTuple):
    """A tensor, by the memory it looks at.

    Attributes:
        storage: the memory's number in the recording.
        dtype: the tensor's.
        shape: the tensor's.
        stride: in elements.
        offset: in elements, from the beginning of the memory.
    """

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Origin(NamedTuple):
    """Where the values of a tensor that is away come from. Pickled with a parameter, it becomes None."""

    recording: Recording
    view: View

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


@dataclass(frozen=True)
class _Operation:
    """One operation.

    Attributes:
        function: what is called.
        args: of the call, with views in place of tensors.
        kwargs: the same.
        made: new memory, by the number of the tensor among what the function returns.
        touched: all memory that is read or written.
        fresh: memory that has nothing of what it held before.
        seed: of the draw; None if nothing is drawn.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: Mapping[int, View]
    touched: frozenset[int]
    fresh: int | None
    seed: int | None


class _Known(NamedTuple):
    """Memory whose values came from outside.

    Attributes:
        whole: all of it, in one dimension.
        lender: the tensor that somebody else has too; None if the values are a copy of our own.
        version: how often that tensor had been written to.
    """

    whole: Tensor
    lender: Tensor | None
    version: int


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its hook for subclasses untyped
    """A context in which what is done to tensors is written down.

    Args:
        seed: decides all that is drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._draws = 0
        self._operations: list[_Operation] = []
        self._writers: list[list[int]] = []
        self._size_bytes: list[int] = []
        self._known: dict[int, _Known] = {}
        self._away: set[int] = set()
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which nothing is written down."""
        before, self._is_paused = self._is_paused, True
        try:
            with _undisguised():
                yield
        finally:
            self._is_paused = before

    @property
    def is_paused(self) -> bool:
        """Whether nothing is written down at the moment."""
        return self._is_paused

    def has_away(self, value: object) -> bool:
        """Whether a value is a tensor of this recording that is away, or whose memory another one is away for."""
        if not isinstance(value, Tensor):
            return False
        with self.paused():
            return _has_memory(value) and self._is_away(value)

    def values_of(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor that is away; see `values`."""
        with self.paused():
            return self.values(self._view_of(tensor))

    def send_away(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the meta device that stands for one with memory, and for the same memory as far as is known.

        Args:
            tensor: strided; it may be let go of, and what is done to it from now on is done to the other too.
        """
        with self.paused():
            view = self._view_of(tensor)
            self._away.add(view.storage)
            base = torch.empty(
                self._size_bytes[view.storage] // tensor.element_size(), dtype=tensor.dtype, device="meta"
            )
            self._bind(base, view.storage)
            return base.as_strided(view.shape, view.stride, view.offset)

    def is_given(self, view: View) -> bool:
        """Whether anything was ever written to the memory of a view."""
        return view.storage in self._known or bool(self._writers[view.storage])

    def values(self, view: View) -> Tensor:
        """Return the values of a tensor in host memory, as what was written down makes them.

        Args:
            view: the tensor.

        Raises:
            ModelError: they come of a tensor from outside that has changed since.
        """
        with self.paused():
            return _tensor(view, self._memory_of({view.storage}, len(self._operations)))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute or only write down an operation; torch calls it."""
        with _undisguised():
            return self._follow(func, args, dict(kwargs or {}))

    def _follow(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if self._is_paused or not all(self._is_followed(tensor) for tensor in instances((args, given), Tensor)):
            return func(*args, **given)
        written = written_by(func, args, given)
        if given.get("generator") is not None:
            given["generator"] = None  # its place in its own stream could not be found again
        seed = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            seed, self._draws = seed_of(self._seed, self._draws), self._draws + 1
        noted_args, noted_kwargs = replaced(args, Tensor, self._view_of), replaced(given, Tensor, self._view_of)
        for tensor in written:
            self._own(self._view_of(tensor).storage)
        result = self._result(func, args, given, written, seed)
        self._write_down(func, noted_args, noted_kwargs, result, written, seed)
        return result

    def _result(self, func: Any, args: Any, kwargs: dict[str, Any], written: Sequence[Tensor], seed: int | None) -> Any:
        """Compute an operation, or only its results' shapes if a tensor is away."""
        if not any(self._is_away(tensor) for tensor in instances((args, kwargs), Tensor)):
            return _called(func, args, kwargs, seed)
        gives_tensors = any("Tensor" in str(returned.type) for returned in schema_of(func).returns)
        if (gives_tensors or written) and all(self._is_away(tensor) for tensor in written):
            device = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
            try:
                return func(
                    *replaced(args, Tensor, self._on_meta), **{**replaced(kwargs, Tensor, self._on_meta), **device}
                )
            except NotImplementedError:
                if written:
                    raise
        # A number is asked for, or shapes that depend on numbers, or a tensor with memory is to take values.
        return _called(
            func, replaced(args, Tensor, self._with_memory), replaced(kwargs, Tensor, self._with_memory), seed
        )

    def _write_down(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, written: Sequence[Tensor], seed: int | None
    ) -> None:
        known = {view.storage for view in instances((args, kwargs), View)}
        made: dict[int, View] = {}
        for number, tensor in enumerate(instances(result, Tensor)):
            if _has_memory(tensor) and self._number_of(tensor) is None:
                self._bind(tensor, self._new_storage(tensor))
                made[number] = self._view_of(tensor)
        schema = schema_of(func)
        name = schema.name
        if name in _EMPTY or not (made or written):
            return
        views = [self._view_of(tensor) for tensor in written]
        for tensor, view in zip(written, views, strict=True):  # resized, it may be larger now
            self._size_bytes[view.storage] = max(self._size_bytes[view.storage], tensor.untyped_storage().nbytes())
        is_whole = len(written) == 1 and written[0].is_contiguous()
        is_whole = is_whole and written[0].nbytes == self._size_bytes[views[0].storage]
        sources = {view.storage for view in instances((args[1:], kwargs), View)}
        fresh = views[0].storage if is_whole and name in _FRESH and views[0].storage not in sources else None
        if made and any(argument.name == "dtype" for argument in schema.arguments):
            kwargs = {**kwargs, "dtype": next(iter(made.values())).dtype}  # torch's default may be another one then
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        touched = frozenset(known | {view.storage for view in (*views, *made.values())})
        operation = _Operation(func, args, kwargs, made, touched, fresh, seed)
        for storage in {view.storage for view in (*views, *made.values())}:
            self._writers[storage].append(len(self._operations))
        self._operations.append(operation)

    def _memory_of(self, storages: Iterable[int], end: int) -> dict[int, Tensor]:
        """Return memory as the operations before number `end` left it; of what is not asked for, nothing is kept."""
        goals = set(storages)
        numbers = self._needed(goals, end)
        last_use = {storage: number for number in numbers for storage in self._operations[number].touched}
        memory: dict[int, Tensor] = {}
        with torch.no_grad():
            for number in numbers:
                operation = self._operations[number]
                for storage in operation.touched - {view.storage for view in operation.made.values()}:
                    self._begin(memory, storage)
                self._do_again(operation, memory)
                for storage in operation.touched - goals:
                    if last_use[storage] == number:
                        del memory[storage]
            for storage in goals:
                self._begin(memory, storage)
        return memory

    def _needed(self, goals: set[int], end: int) -> list[int]:
        """Return the numbers of the operations that decide what is in some memory, in their order."""
        needed: set[int] = set()
        open_ends = [(storage, end) for storage in goals]
        while open_ends:
            storage, before = open_ends.pop()
            for number in reversed(self._writers[storage]):
                if number >= before:
                    continue
                operation = self._operations[number]
                if number not in needed:
                    needed.add(number)
                    open_ends += [(touched, number) for touched in operation.touched if touched != storage]
                if operation.fresh == storage:
                    break
        return sorted(needed)

    def _begin(self, memory: dict[int, Tensor], storage: int) -> None:
        """Give memory what it began with, if it is not there yet."""
        if storage in memory:
            return
        fresh = torch.empty(self._size_bytes[storage], dtype=torch.uint8, device="cpu")
        if storage in self._known:
            whole, lender, version = self._known[storage]
            if lender is not None and _version_of(lender) != version:
                raise ModelError(
                    "a tensor that parameters were made from within LazyInitContext has changed since: leave it as it "
                    "is until the model is boosted"
                )
            fresh[: whole.nbytes].copy_(whole.view(torch.uint8))
        memory[storage] = fresh

    def _do_again(self, operation: _Operation, memory: dict[int, Tensor]) -> None:
        def made_real(value: View) -> Tensor:
            return _tensor(value, memory)

        result = _called(
            operation.function,
            replaced(operation.args, View, made_real),
            replaced(operation.kwargs, View, made_real),
            operation.seed,
        )
        tensors = list(instances(result, Tensor))
        for number, view in operation.made.items():
            size_bytes = self._size_bytes[view.storage]
            memory[view.storage] = torch.empty(0, dtype=torch.uint8, device="cpu")
            if _geometry(tensors[number]) == view[1:] and tensors[number].untyped_storage().nbytes() == size_bytes:
                memory[view.storage].set_(tensors[number].untyped_storage())
            else:
                memory[view.storage] = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
                _tensor(view, memory).copy_(tensors[number])

    def _is_followed(self, tensor: Tensor) -> bool:
        """Whether what is done to a tensor can be written down: not if it is no plain one, or away for somebody else."""
        if not _has_memory(tensor):
            return False
        origin = origin_of(tensor)
        return origin is None or origin.recording is self

    def _with_memory(self, tensor: Tensor) -> Tensor:
        return self.values(self._view_of(tensor)) if self._is_away(tensor) else tensor

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        if self._is_away(tensor):
            return self.send_away(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def _is_away(self, tensor: Tensor) -> bool:
        number = self._number_of(tensor)
        return number is not None and (tensor.is_meta or number in self._away)

    def _view_of(self, tensor: Tensor) -> View:
        number = self._number_of(tensor)
        if number is None:
            number = self._new_storage(tensor)
            self._bind(tensor, number)
            if not tensor.is_meta:
                # Nobody has seen how it came to be. The values stay where they are until somebody writes to them.
                whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
                self._known[number] = _Known(whole, tensor, _version_of(tensor))
        return View(number, *_geometry(tensor))

    def _own(self, storage: int) -> None:
        """Copy values that came from outside, before they are written to."""
        known = self._known.get(storage)
        if known is not None and known.lender is not None:
            self._known[storage] = _Known(known.whole.clone(), None, 0)

    def _number_of(self, tensor: Tensor) -> int | None:
        bound = getattr(tensor.untyped_storage(), _NAME, None)
        return bound[1] if bound is not None and bound[0] is self else None

    def _bind(self, tensor: Tensor, storage: int) -> None:
        # As long as the memory lives, and no longer: torch keeps one Python object for each.
        setattr(tensor.untyped_storage(), _NAME, (self, storage))

    def _new_storage(self, tensor: Tensor) -> int:
        self._writers.append([])
        self._size_bytes.append(tensor.untyped_storage().nbytes())
        return len(self._writers) - 1


def origin_of(tensor: Tensor) -> Origin | None:
    """Return where the values of a tensor that is away come from; None if no recording has seen it."""
    if not tensor.is_meta or not _has_memory(tensor):
        return None
    bound = getattr(tensor.untyped_storage(), _NAME, None)
    return None if bound is None else Origin(bound[0], View(bound[1], *_geometry(tensor)))


def _nothing() -> None:
    return None


def _undisguised() -> AbstractContextManager[None]:
    """Return a context in which tensors are what they are, whatever a mode makes them look like."""
    return torch._C.DisableTorchFunction()  # noqa: SLF001  documented in torch's notes on extending it


def _called(function: Any, args: Any, kwargs: Any, seed: int | None) -> Any:
    """Call an operation, with a stream of random numbers of its own if it draws."""
    if seed is None:
        return function(*args, **kwargs)
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return function(*args, **kwargs)
    finally:
        generator.set_state(state)


def _version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to."""
    return int(tensor._version)  # noqa: SLF001  as torch's own checks before backward do


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one: a view of a piece of memory."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def _geometry(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _tensor(view: View, memory: Mapping[int, Tensor]) -> Tensor:
    base = torch.empty(0, dtype=view.dtype, device="cpu")
    return base.set_(memory[view.storage].untyped_storage(), view.offset, view.shape, view.stride)
