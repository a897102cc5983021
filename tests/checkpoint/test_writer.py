from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from albireo.checkpoint import (
    Checkpoint,
    OneRank,
    Ranks,
    Snapshot,
    TensorSlice,
    newest_whole,
    open_checkpoint,
    save_checkpoint,
    whole,
)
from albireo.errors import CheckpointError, ConfigError
from albireo.files import FileOperations
from albireo.log import Log


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def found(folder: Path) -> Checkpoint:
    checkpoint, passed_over = newest_whole(folder)
    assert passed_over == []
    assert checkpoint is not None
    return checkpoint


@pytest.fixture
def save_rank(tmp_path: Path, rank_slices: Callable[[int, int, int], Iterator[TensorSlice]]) -> Callable[..., Path]:
    """Save one rank's share of the tiny tensors."""

    def save(ranks: Ranks, step: int, seed: int, files: FileOperations | None = None, **changes: object) -> Path:
        members = {
            "slices": rank_slices(ranks.rank, ranks.world_size, seed),
            "state": {"random": [seed, ranks.rank]},
            "shared_state": {"seed": seed, "from": ranks.rank},
            "aliases": {"model/head": "model/weight"},
        }
        snapshot = Snapshot(step=step, **{**members, **changes})  # type: ignore[arg-type]
        return save_checkpoint(tmp_path, snapshot, ranks=ranks, keep=2, files=files)

    return save


def assert_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name).view(checkpoint.info(name).shape), tensor)


def test_files_are_no_larger_than_a_shard(tmp_path: Path) -> None:
    slices = [whole("a", torch.arange(100.0)), whole("b", torch.arange(10.0)), whole("c", torch.arange(9.0))]
    path = save_checkpoint(tmp_path, Snapshot(step=1, slices=slices), ranks=OneRank(), keep=1, shard_bytes=80)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        data = file.read_bytes()
        assert len(data) - 8 - int.from_bytes(data[:8], "little") <= 80
    assert_tensors(open_checkpoint(path), {slice_.name: slice_.data for slice_ in slices})


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_save_one_checkpoint_together(
    tmp_path: Path, run_ranks: Callable, save_rank: Callable[..., Path], tiny: Callable, world_size: int
) -> None:
    paths = run_ranks(world_size, lambda ranks: save_rank(ranks, 10, 4))
    assert paths == [tmp_path / "step-00000010"] * world_size
    checkpoint = found(tmp_path)
    assert checkpoint.world_size == world_size
    assert checkpoint.shared_state == {"seed": 4, "from": 0}
    assert [checkpoint.rank_state(rank) for rank in range(world_size + 1)] == [
        *({"random": [4, rank]} for rank in range(world_size)),
        None,
    ]
    assert_tensors(checkpoint, tiny(4))
    assert torch.equal(checkpoint.read("model/head"), tiny(4)["model/weight"].view(-1))


def test_a_step_can_be_saved_again(
    tmp_path: Path, save_tiny: Callable[..., Path], assert_holds: Callable[[Checkpoint, int], None]
) -> None:
    save_tiny(tmp_path, 10, seed=1)
    path = save_tiny(tmp_path, 10, seed=2, keep=1)
    assert path == tmp_path / "step-00000010"
    assert names(tmp_path) == ["step-00000010"]
    assert_holds(found(tmp_path), 2)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([TensorSlice("x", (4,), 0, torch.zeros(3))], "elements 3 to 4 of 4 of x are missing"),
        (
            [whole("x", torch.zeros(4)), TensorSlice("x", (4,), 1, torch.zeros(1))],
            "elements 1 to 2 of 4 of x are given",
        ),
        ([whole("x", torch.zeros(4)), whole("x", torch.zeros(4))], "is given twice"),
        ([TensorSlice("x", (4,), 0, torch.zeros(2)), TensorSlice("x", (5,), 2, torch.zeros(2))], "different tensors"),
    ],
)
def test_slices_that_are_no_whole_tensors_are_refused(
    tmp_path: Path, save_tiny: Callable[..., Path], slices: list[TensorSlice], message: str
) -> None:
    save_tiny(tmp_path, 10)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, Snapshot(step=20, slices=slices), ranks=OneRank(), keep=1)
    assert names(tmp_path) == ["step-00000010"]


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    for step, keep, shard_bytes in [(1, 0, 1), (1, 1, 0), (-1, 1, 1)]:
        with pytest.raises(ConfigError, match="a save needs keep and shard_bytes of at least 1"):
            save_checkpoint(
                tmp_path, Snapshot(step=step, slices=[]), ranks=OneRank(), keep=keep, shard_bytes=shard_bytes
            )


def test_a_full_disk_is_one_line_and_leaves_the_older_ones(
    tmp_path: Path,
    save_tiny: Callable[..., Path],
    assert_holds: Callable[[Checkpoint, int], None],
    failing_files: type[FileOperations],
) -> None:
    save_tiny(tmp_path, 10)
    files = failing_files(6, errno.ENOSPC, lasting=True)  # type: ignore[call-arg]
    with pytest.raises(CheckpointError) as caught:
        save_tiny(tmp_path, 20, files=files)
    text = str(caught.value)
    assert "the checkpoint of step 20 was not saved, and the older ones stay: No space left on device: " in text
    assert "rank-00000-00001.safetensors; free some space" in text
    assert "\n" not in text
    assert names(tmp_path) == ["step-00000010"], "what filled the disk in vain must go"
    assert_holds(found(tmp_path), 10)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 20 was not saved, .*: Not a directory: "):
        save_tiny(tmp_path / "file" / "checkpoints", 20)


@pytest.mark.usefixtures("instant_sync")
@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
@pytest.mark.parametrize("step", [20, 30])
def test_an_error_at_each_operation_leaves_an_old_or_the_new_one_whole(
    tmp_path: Path,
    save_tiny: Callable[..., Path],
    assert_holds: Callable[[Checkpoint, int], None],
    failing_files: Callable,
    code: int,
    lasting: bool,
    step: int,
) -> None:
    hits = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        save_tiny(folder, 10)
        save_tiny(folder, 20)
        files = failing_files(at, code, lasting=lasting)
        try:
            save_tiny(folder, step, seed=99, files=files)
        except CheckpointError as error:
            assert "was not saved" in str(error)  # noqa: PT017  some operations may fail without failing the save
            assert_holds(found(folder), 20)
        else:
            assert_holds(found(folder), 99)
        save_tiny(folder, 40, keep=1)
        assert names(folder) == ["step-00000040"]
        if files.hit is None:
            break
        hits.append(files.hit)
    assert len(hits) > 25
    assert {hit.split(":")[0] for hit in hits} == {
        *("make directory", "create", "write", "rename"),
        *("sync", "sync directory", "remove file", "remove directory"),
    }


@pytest.mark.usefixtures("instant_sync")
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_error_on_one_rank_fails_all_and_none_waits_for_ever(
    tmp_path: Path,
    run_ranks: Callable,
    save_rank: Callable[..., Path],
    tiny: Callable,
    failing_files: Callable,
    failing_rank: int,
) -> None:
    def save_chosen(chosen: Callable[[int], FileOperations | None], ranks: Ranks) -> Path:
        return save_rank(ranks, 20, 2, chosen(ranks.rank))

    run_ranks(2, lambda ranks: save_rank(ranks, 10, 1))
    failures = 0
    for at in range(1, 200):
        files = failing_files(at, errno.ENOSPC, lasting=False)
        chosen = {failing_rank: files}.get
        results = run_ranks(2, partial(save_chosen, chosen))
        saved = [isinstance(result, Path) for result in results]
        assert saved in ([True, True], [False, False]), results
        if not saved[0]:
            failures += 1
            assert all(isinstance(result, CheckpointError) for result in results), results
            assert "No space left on device" in str(results[failing_rank])
            assert_tensors(found(tmp_path), tiny(1))
            assert names(tmp_path) == ["step-00000010"]
        else:
            assert_tensors(found(tmp_path), tiny(2))
            run_ranks(2, lambda ranks: save_rank(ranks, 10, 1))
        if files.hit is None:
            break
    assert failures >= 6


def test_the_others_say_which_rank_failed_and_why(run_ranks: Callable, save_rank: Callable[..., Path]) -> None:
    def broken() -> Iterator[TensorSlice]:
        yield whole("x", torch.zeros(1))
        raise ValueError("the slices ran out")

    changes = {1: {"slices": broken()}}
    results = run_ranks(3, lambda ranks: save_rank(ranks, 10, 1, **changes.get(ranks.rank, {})))
    assert isinstance(results[1], ValueError)
    for rank in (0, 2):
        assert isinstance(results[rank], CheckpointError)
        assert str(results[rank]) == (
            "the checkpoint of step 10 was not saved, and the older ones stay: rank 1 failed: the slices ran out"
        )


def test_ranks_that_save_the_same_tensor_are_refused_together(
    tmp_path: Path, run_ranks: Callable, save_rank: Callable[..., Path]
) -> None:
    results = run_ranks(2, lambda ranks: save_rank(ranks, 10, 1, slices=[whole("model/weight", torch.zeros(2))]))
    reason = "elements 0 to 2 of 2 of model/weight are given twice"
    assert str(results[0]).endswith(f": {reason}")
    assert str(results[1]).endswith(f": rank 0 failed: {reason}")
    assert names(tmp_path) == []


def test_a_barrier_that_breaks_is_not_waited_in_again(tmp_path: Path) -> None:
    class Broken(OneRank):
        def barrier(self) -> None:
            calls.append(1)
            raise threading.BrokenBarrierError

    calls: list[int] = []
    with pytest.raises(threading.BrokenBarrierError):
        save_checkpoint(tmp_path, Snapshot(step=1, slices=[]), ranks=Broken(), keep=1)
    assert len(calls) == 1


def test_an_older_one_that_cannot_be_deleted_is_a_warning(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    class Stubborn(FileOperations):
        def remove_tree(self, path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save_tiny(tmp_path, 10)
    stream = io.StringIO()
    snapshot = Snapshot(step=20, slices=[whole("x", torch.zeros(1))])
    save_checkpoint(tmp_path, snapshot, ranks=OneRank(), keep=1, files=Stubborn(), log=Log(stream=stream))
    assert stream.getvalue() == (f"warning: older checkpoints in {tmp_path} could not be deleted: Permission denied\n")
    assert found(tmp_path).step == 20


def test_random_states_are_left_alone(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    before = torch.get_rng_state()
    save_tiny(tmp_path, 10)
    assert torch.equal(torch.get_rng_state(), before)
