"""Collectives on tensors in host memory that leave nothing behind in another thread.

gloo works in threads of its own, and a thread may still hold a tensor when the call has returned. To let go of one that
Python knows, it needs the interpreter's lock; a thread that asks for it while the interpreter ends is killed, and takes
the process with it ("terminate called without an active exception"). So each call here waits, some microseconds, until
its tensors have been let go of.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

__all__ = ["run_settled", "wait_for_all"]

# Only a debugger that keeps the tensors would make it last.
_PATIENCE_SECONDS = 1.0


def run_settled(collective: Callable[..., object], *tensors: torch.Tensor) -> None:
    """Run a collective, and return when no thread holds its tensors any more.

    Args:
        collective: called with one tensor for each, of the same elements; it must return when it is done.
        tensors: on the host; others are passed on as they are.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors):
        collective(*tensors)
        return
    # The caller's own tensors stay with the caller; these are other objects over the same elements.
    passed = [tensor.detach() for tensor in tensors]
    held = [weakref.ref(tensor) for tensor in passed]
    collective(*passed)
    passed.clear()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while any(reference() is not None for reference in held) and time.monotonic() < deadline:
        time.sleep(0)  # gives the interpreter's lock away


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank has come here.

    Args:
        group: the ranks; all if None.
    """
    # A tensor on the host goes through gloo, which a barrier of NCCL would not: no kernel is launched.
    run_settled(lambda tensor: dist.all_reduce(tensor, group=group), torch.zeros(1))
