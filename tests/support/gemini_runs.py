"""Short trainings with Gemini, and all that may come of one, to be compared to the bit."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from gemini_zoo import KINDS, built
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import tensor_names
from albireo.distributed import World
from albireo.memory.placement import least_device_bytes
from albireo.optim import HybridAdam, OptimizerWrapper, host_stepper
from albireo.optim.host_kernel import TorchKernel
from albireo.optim.host_step import HostStep
from albireo.optim.host_worker import HostWorker
from albireo.plugins import GeminiPlugin, ModelWrapper, Plugin

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
# Several chunks a block; a scale that does not overflow at once.
SMALL: Mapping[str, Any] = {"min_chunk_size_m": 0.002, "initial_scale": 2.0**8}

Boosted = tuple[Booster, ModelWrapper, OptimizerWrapper]


class LateKernel(TorchKernel):
    """Steps nothing until somebody waits, and then no more than is waited for: who forgets to wait reads old weights.

    It needs no compiler, which would take a second; no bit depends on that.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.permits = threading.Semaphore(0)
        self.is_free = False

    def submit(self, step: HostStep) -> None:
        if not self.is_free:
            self.permits.acquire()
        super().submit(step)


class _LateWorker(HostWorker):
    """What a host worker does when somebody waits, or when it is to end, with a late kernel."""

    plainly = HostWorker.wait_until, HostWorker.end

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while isinstance(self.kernel, LateKernel) and not condition() and self._error is None:
            one_more = self._reported + 1
            self.kernel.permits.release()
            with self._changed:
                while self._reported < one_more and self._error is None:
                    self._changed.wait()
        _LateWorker.plainly[0](self, condition)

    def end(self) -> None:
        if isinstance(self.kernel, LateKernel):
            self.kernel.is_free = True
            self.kernel.permits.release()
        _LateWorker.plainly[1](self)


@contextmanager
def late_and_alone() -> Iterator[None]:
    """The host steps as late as it may; and all else is computed on one thread, which is enough for so little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_stepper, "choose_kernel", lambda threads, **_: LateKernel(threads))
            patch.setattr(HostWorker, "wait_until", _LateWorker.wait_until)
            patch.setattr(HostWorker, "end", _LateWorker.end)
            yield
    finally:
        torch.set_num_threads(threads)


def gemini(**options: Any) -> GeminiPlugin:
    return GeminiPlugin(**{**SMALL, "precision": "fp32", **options})


def groups(model: nn.Module) -> list[dict[str, Any]]:
    stepped = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in stepped if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in stepped if p.dim() < 2], "weight_decay": 0.0, "lr": 5e-3},
    ]


def boosted(
    plugin: Plugin, kind: str, world: World = ALONE, change: Callable[[nn.Module], object] | None = None
) -> Boosted:
    """Return a small model, boosted.

    Args:
        plugin: which.
        kind: of the zoo.
        world: the ranks.
        change: is called with the model before.
    """
    model = built(kind)
    if change is not None:
        change(model)
    booster = Booster(plugin=plugin, world=World(world.rank, world.world_size, world.local_rank, CPU))
    wrapped, optimizer, *_ = booster.boost(model, HybridAdam(groups(model), lr=1e-2))
    return booster, wrapped, optimizer


def train(
    run: Boosted, kind: str, steps: range = range(3), accumulate: int = 1, clip: float = 0.0
) -> list[tuple[float, float]]:
    """Train some steps, and return the loss and the norm of each."""
    booster, model, optimizer = run
    numbers = []
    for step in steps:
        batches = [KINDS[kind].batch(step, booster.world.rank, micro) for micro in range(accumulate)]
        output = booster.train_step(model, optimizer, batches, [KINDS[kind].terms(b) for b in batches], max_norm=clip)
        numbers.append((float(output.loss_sum), float(output.grad_norm)))
    return numbers


def left(run: Boosted) -> dict[str, str]:
    """Return a digest of each weight, buffer and state that this rank saves."""
    booster, model, optimizer = run
    names, _ = tensor_names(model.unwrap())
    parts = booster.plugin.export_state(model, optimizer, names, booster.world)
    return {f"{part.name}@{part.start}": digest(part.data) for part in parts}


def slices(run: Boosted) -> list[list[Any]]:
    """Return the name, the first element and the bytes, in hex, of each slice that this rank saves."""
    booster, model, optimizer = run
    names, _ = tensor_names(model.unwrap())
    parts = booster.plugin.export_state(model, optimizer, names, booster.world)
    return [[part.name, part.start, part.data.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes().hex()] for part in parts]  # fmt: skip


def joined(ranks: Sequence[list[list[Any]]]) -> dict[str, str]:
    """Return each tensor's bytes, whatever the slices in which ranks have it."""
    found: dict[str, dict[int, str]] = {}
    for name, start, data in (part for rank in ranks for part in rank):
        found.setdefault(name, {})[start] = data
    return {name: "".join(data for _, data in sorted(parts.items())) for name, parts in found.items()}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def everything(
    plugin: Plugin, kind: str, world: World = ALONE, steps: range = range(3), accumulate: int = 1, clip: float = 0.0
) -> dict[str, Any]:
    """Train, and return all that comes of it."""
    run = boosted(plugin, kind, world)
    return {"numbers": train(run, kind, steps, accumulate, clip), "left": left(run)}


@cache
def least_bytes(kind: str, *, world: World = ALONE, accumulate: int = 1, **options: Any) -> int:
    """Return the least that the device has to hold of a model's chunks, as a step that was watched has it."""
    run = boosted(gemini(**options), kind, world)
    train(run, kind, range(1), accumulate)
    inner = run[1].gemini  # type: ignore[attr-defined]
    assert inner._trace is not None
    return least_device_bytes(inner._trace, inner._planner._bytes(accumulates=accumulate > 1))
