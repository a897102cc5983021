"""Whether processes of this machine can speak to each other: an all-reduce that is really done."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from albireo.distributed.launch import launch_ranks
from albireo.distributed.world import World
from albireo.errors import AlbireoError, LaunchError

__all__ = ["AllReduceCheck", "all_reduce_on_rank", "check_all_reduce"]

_ELEMENTS = 2**20
_REPEATS = 5


@dataclass(frozen=True)
class AllReduceCheck:
    """How an all-reduce went.

    Attributes:
        backend: "gloo" (on the host) or "nccl" (on GPUs).
        ranks: how many processes.
        ok: every rank got the right sum.
        why: what went wrong; empty if nothing.
        start_seconds: from nothing to the first sum: starting the ranks included.
        bytes_per_second: bytes of the tensor summed per second; None if it failed.
    """

    backend: str
    ranks: int
    ok: bool
    why: str
    start_seconds: float
    bytes_per_second: float | None


def check_all_reduce(backend: str, ranks: int, *, timeout_seconds: float = 60.0) -> AllReduceCheck:
    """Start ranks on this machine, have them sum a tensor, and look at what each got.

    Args:
        backend: "gloo" or "nccl".
        ranks: how many; for NCCL at most as many as there are GPUs.
        timeout_seconds: when to give up.
    """
    # gloo needs no GPU: more ranks than GPUs must do too.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    start = time.monotonic()
    why, reports = "", []
    with tempfile.TemporaryDirectory(prefix="albireo-check-") as name:
        payload = {"backend": backend, "folder": name, "start": time.time()}
        try:
            launch_ranks(
                "albireo.distributed.probe:all_reduce_on_rank",
                payload,
                ranks,
                extra_environment=hidden,
                timeout_seconds=timeout_seconds,
            )
            reports = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(ranks)]
        except AlbireoError as error:
            why = str(error)
    wrong = [rank for rank, report in enumerate(reports) if not report["right"]]
    if wrong:
        why = f"the sum is wrong on rank {wrong[0]}"
    if why:
        return AllReduceCheck(
            backend, ranks, ok=False, why=why, start_seconds=time.monotonic() - start, bytes_per_second=None
        )
    return AllReduceCheck(
        backend,
        ranks,
        ok=True,
        why="",
        start_seconds=max(report["first_seconds"] for report in reports),
        bytes_per_second=min(report["bytes_per_second"] for report in reports),
    )


def all_reduce_on_rank(world: World, payload: Mapping[str, Any]) -> None:
    """Sum a tensor over all ranks, check it, and leave a report: the entry of `launch_ranks`.

    Args:
        world: all ranks.
        payload: `backend`, the `folder` for reports, and `start`, the launcher's clock at the beginning.

    Raises:
        LaunchError: the ranks cannot speak to each other.
    """
    device = torch.device("cpu") if payload["backend"] == "gloo" else world.device
    try:
        if not dist.is_initialized():
            # Alone on a machine with one GPU, NCCL is still to be seen working.
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(payload["backend"], store=store, rank=0, world_size=1)
        tensor = torch.full((_ELEMENTS,), world.rank + 1.0, device=device)
        dist.all_reduce(tensor)
        expected = world.world_size * (world.world_size + 1) / 2
        right = bool((tensor == expected).all())
        first_seconds = time.time() - payload["start"]
        start = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rate = _REPEATS * tensor.nbytes / (time.perf_counter() - start)
    except RuntimeError as error:
        raise LaunchError(f"{payload['backend']}: {str(error).strip().splitlines()[0]}") from error
    report = {"right": right, "first_seconds": first_seconds, "bytes_per_second": rate}
    (Path(payload["folder"]) / f"{world.rank}.json").write_text(json.dumps(report))
