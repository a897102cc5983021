"""What several tests of checkpoints need: tiny contents, and disks and ranks that fail on demand."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from albireo.checkpoint import Checkpoint, OneRank, Snapshot, TensorSlice, save_checkpoint, whole
from albireo.files import FileOperations


@pytest.fixture
def instant_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fsync cost nothing, for tests that save hundreds of times and do not cut the power for real."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def tiny_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(3, 4, generator=generator),
        "model/half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "model/mask": torch.rand(3, generator=generator) > 0.5,
        "model/nothing": torch.empty(0, 4),
        "optimizer/step": torch.tensor(seed),
    }


@pytest.fixture
def tiny() -> Callable[[int], dict[str, torch.Tensor]]:
    """Give a few small tensors of several dtypes, other numbers for each seed."""
    return tiny_tensors


@pytest.fixture
def save_tiny() -> Callable[..., Path]:
    """Save a tiny checkpoint of one rank, whose numbers follow from a seed."""

    def save(
        folder: Path,
        step: int,
        seed: int | None = None,
        keep: int = 2,
        files: FileOperations | None = None,
    ) -> Path:
        number = step if seed is None else seed
        snapshot = Snapshot(
            step=step,
            slices=[whole(name, tensor) for name, tensor in tiny_tensors(number).items()],
            state={"random": [number]},
            shared_state={"seed": number},
            aliases={"model/head": "model/weight"},
        )
        return save_checkpoint(folder, snapshot, ranks=OneRank(), keep=keep, files=files)

    return save


@pytest.fixture
def assert_holds() -> Callable[[Checkpoint, int], None]:
    """Check that a checkpoint holds the numbers of a seed, to the bit, and nothing else."""

    def check(checkpoint: Checkpoint, seed: int) -> None:
        tensors = tiny_tensors(seed)
        assert checkpoint.names() == sorted([*tensors, "model/head"])
        for name, tensor in tensors.items():
            read = torch.empty_like(tensor)
            checkpoint.read_into(name, read)
            assert torch.equal(read, tensor)
        assert checkpoint.shared_state == {"seed": seed}
        assert checkpoint.rank_state(0) == {"random": [seed]}

    return check


class FailingFiles(FileOperations):
    """Raises an error at one operation, and if `lasting` at each later one that needs room on the disk."""

    def __init__(self, at: int, code: int, *, lasting: bool) -> None:
        super().__init__(chunk_bytes=512)
        self.left = at
        self.code = code
        self.lasting = lasting
        self.hit: str | None = None

    def about_to(self, operation: str, path: Path) -> None:
        self.left -= 1
        needs_room = operation in {"create", "write", "make directory"}
        if self.left == 0 or (self.left < 0 and self.lasting and needs_room):
            self.hit = self.hit or f"{operation}: {path.name}"
            raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.fixture
def failing_files() -> type[FailingFiles]:
    """Give `FileOperations` that fail at the operation of a number."""
    return FailingFiles


class ThreadRank:
    """A rank that is a thread."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = world_size
        self.passed = 0
        self._barrier = barrier

    def barrier(self) -> None:
        self.passed += 1
        self._barrier.wait()


@pytest.fixture
def run_ranks() -> Callable[[int, Callable[[ThreadRank], object]], list[object]]:
    """Run a function once a rank, in threads; its results, or the exceptions it raised, come in the ranks' order."""

    def run(world_size: int, function: Callable[[ThreadRank], object]) -> list[object]:
        # A rank that waits for one which gave up breaks the barrier after this time, and the test fails.
        barrier = threading.Barrier(world_size, timeout=20)
        ranks = [ThreadRank(rank, world_size, barrier) for rank in range(world_size)]
        results: list[object] = [None] * world_size

        def work(rank: ThreadRank) -> None:
            try:
                results[rank.rank] = function(rank)
            except Exception as error:  # noqa: BLE001  it is handed to the test
                results[rank.rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({rank.passed for rank in ranks}) == 1, "the ranks did not pass the same number of barriers"
        return results

    return run


def slices_of_rank(rank: int, world_size: int, seed: int) -> Iterator[TensorSlice]:
    """Cut every tiny tensor into one run of elements a rank."""
    for name, tensor in tiny_tensors(seed).items():
        flat = tensor.reshape(-1)
        bounds = [flat.numel() * part // world_size for part in range(world_size + 1)]
        yield TensorSlice(name, tuple(tensor.shape), bounds[rank], flat[bounds[rank] : bounds[rank + 1]])


@pytest.fixture
def rank_slices() -> Callable[[int, int, int], Iterator[TensorSlice]]:
    """Give a rank's share of the tiny tensors."""
    return slices_of_rank
