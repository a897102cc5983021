"""Tensors that are away look as if they were in host memory.

Code that begins a model asks where its parameters are: `torch.nn.init.trunc_normal_`, for one, does nothing to a tensor
on the meta device. What would then never be done could not be written down either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from albireo.models.recording import Recording

__all__ = ["Disguise"]


class Disguise(TorchFunctionMode):
    """A context in which whoever looks at a recording's tensors sees them in host memory, and their numbers too.

    Args:
        recording: which tensors are away, and what is in them.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording
        host = torch.device("cpu")
        looks: list[tuple[Any, Any]] = [(Tensor.is_meta, False), (Tensor.is_cpu, True), (Tensor.device, host)]
        self._seen = {attribute.__get__: value for attribute, value in looks}
        # They take what is in memory without a word to the dispatcher.
        self._reads = {Tensor.numpy, Tensor.tolist, Tensor.__array__}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer for a tensor that is away, or pass a call on; torch calls it."""
        given = dict(kwargs or {})
        if not self._recording.is_paused:
            first: Any = args[0] if args else None
            if func in self._seen and self._recording.has_away(first):
                return self._seen[func]
            if func in self._reads and self._recording.has_away(first):
                return func(self._recording.values_of(first), *args[1:], **given)
            if self._recording.has_away(given.get("out")):
                # A default device has been chosen for such a call, and it is not that of the tensor.
                out = given.pop("out")
                return out.copy_(func(*args, **given))
        return func(*args, **given)
