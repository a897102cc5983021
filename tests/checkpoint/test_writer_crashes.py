"""A crash at every operation that one save does on the disk, as a kill and as a power cut."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from albireo.checkpoint import Checkpoint, Ranks, Snapshot, TensorSlice, newest_whole, save_checkpoint
from albireo.files import FileOperations, NewFile

CRASHED = 77
KINDS = {
    # What is not synced is kept: the process dies, the system lives on.
    "kill": (False, False),
    # Content that is not synced is lost, while names that are not synced are kept: filesystems may order them so.
    "power cut, names kept": (True, False),
    # All that is not synced is lost.
    "power cut": (True, True),
}


class CrashingFiles(FileOperations):
    """Ends the process just before an operation, after taking from the disk what a crash of a kind may take.

    Args:
        at: the number of the operation, from 1.
        cut_content: files that are not synced are cut to half their length.
        undo_names: new names and renames in folders that are not synced are undone.
        report: told of each operation.
    """

    def __init__(self, at: int, cut_content: bool, undo_names: bool, report: Callable[[str], None]) -> None:
        super().__init__(chunk_bytes=512)
        self._left = at
        self._cut_content = cut_content
        self._undo_names = undo_names
        self._report = report
        self._open_files: list[Path] = []
        # Folder to what undoes the changes of names in it since it was synced, the oldest first.
        self._undo: list[tuple[Path, Callable[[], object]]] = []

    def about_to(self, operation: str, path: Path) -> None:
        self._report(f"{operation}: {path.name}")
        self._left -= 1
        if self._left == 0:
            if self._cut_content:
                for file in self._open_files:
                    os.truncate(file, file.stat().st_size // 2)
            if self._undo_names:
                for _, undo in reversed(self._undo):
                    undo()
            os._exit(CRASHED)

    @contextmanager
    def new_file(self, path: Path) -> Iterator[NewFile]:
        with super().new_file(path) as file:
            self._open_files.append(path)
            self._undo.append((path.parent, path.unlink))
            yield file
        self._open_files.remove(path)

    def make_directory(self, path: Path) -> None:
        if not path.is_dir():
            self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))
        super().make_directory(path)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        assert not self._open_files, "a folder was renamed while a file in it was not synced"
        self._undo.append((target.parent, lambda: target.rename(source)))


def run_child(work: Callable[[], object]) -> int:
    """Run in a forked process, which costs milliseconds where a new one would import torch for seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  nothing of the child may go on in the parent's tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What stands there before, the step that is saved, and how many are kept.
CASES = {
    "first save": ((), 30, 2),
    "next step, one pruned": ((10, 20), 30, 2),
    "same step again, the only one": ((20,), 20, 1),
}


@pytest.mark.usefixtures("instant_sync")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_crash_at_every_operation_leaves_the_old_or_the_new_checkpoint_whole(
    tmp_path: Path,
    save_tiny: Callable[..., Path],
    assert_holds: Callable[[Checkpoint, int], None],
    case: str,
    kind: str,
) -> None:
    before, step, keep = CASES[case]
    template = tmp_path / "template"
    template.mkdir()
    for older in before:
        save_tiny(template, older)
    if before:
        # A crash before this save left these, so that their removal is among the operations.
        shutil.copytree(template / "step-00000020", template / ".tmp-step-00000015")
    operations: list[str] = []
    outcomes = []
    for at in range(1, 300):
        folder = tmp_path / str(at)
        shutil.copytree(template, folder)
        reported = tmp_path / f"operations-{at}"
        with reported.open("w", buffering=1) as report:

            def work(at: int = at, folder: Path = folder, report=report) -> None:  # type: ignore[no-untyped-def]
                files = CrashingFiles(at, *KINDS[kind], lambda line: print(line, file=report))
                save_tiny(folder, step, seed=99, keep=keep, files=files)

            status = run_child(work)
        assert status in {0, CRASHED}
        operations = reported.read_text().splitlines()
        checkpoint, passed_over = newest_whole(folder)
        assert passed_over == [], f"{operations[-1]}: something half-written has the name of a checkpoint"
        if checkpoint is None:
            assert not before
            outcomes.append("none")
        else:
            is_new = checkpoint.shared_state["seed"] == 99
            assert_holds(checkpoint, 99 if is_new else max(before))
            outcomes.append("new" if is_new else "old")
        save_tiny(folder, 40, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000040"], f"{operations[-1]}: leftovers stay"
        shutil.rmtree(folder)
        if status == 0:
            break
    assert status == 0
    assert len(operations) == at - 1
    # The outcome turns from old to new once, and never back.
    first = "old" if before else "none"
    turn = outcomes.index("new")
    assert outcomes == [first] * turn + ["new"] * (len(outcomes) - turn)
    assert turn > 10
    print(f"{case}, {kind}: the new checkpoint counts from operation {turn + 1} on of these:", *operations, sep="\n  ")


@pytest.mark.usefixtures("instant_sync")
@pytest.mark.parametrize("crashing_rank", [0, 1])
def test_a_crash_of_one_rank_at_each_of_its_operations_leaves_the_old_or_the_new(
    tmp_path: Path,
    run_ranks: Callable[..., list[object]],
    rank_slices: Callable[[int, int, int], Iterator[TensorSlice]],
    tiny: Callable[[int], dict[str, torch.Tensor]],
    crashing_rank: int,
) -> None:
    def save(ranks: Ranks, folder: Path, step: int, files: FileOperations | None = None) -> Path:
        snapshot = Snapshot(step=step, slices=rank_slices(ranks.rank, ranks.world_size, step))
        return save_checkpoint(folder, snapshot, ranks=ranks, keep=2, files=files)

    run_ranks(2, lambda ranks: save(ranks, tmp_path / "template", 10))
    steps = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "template", folder)

        def work(at: int = at, folder: Path = folder) -> None:
            files = [FileOperations(), FileOperations()]
            files[crashing_rank] = CrashingFiles(at, cut_content=True, undo_names=False, report=lambda _line: None)
            results = run_ranks(2, lambda ranks: save(ranks, folder, 20, files[ranks.rank]))
            assert results == [folder / "step-00000020"] * 2

        status = run_child(work)
        assert status in {0, CRASHED}
        checkpoint, passed_over = newest_whole(folder)
        assert passed_over == []
        assert checkpoint is not None
        for name, tensor in tiny(checkpoint.step).items():
            assert torch.equal(checkpoint.read(name), tensor.reshape(-1))
        steps.append(checkpoint.step)
        run_ranks(2, lambda ranks, folder=folder: save(ranks, folder, 30))
        assert newest_whole(folder)[0].step == 30  # type: ignore[union-attr]
        if status == 0:
            break
    assert steps == sorted(steps)
    assert steps.count(10) > 5
    assert steps[-1] == 20


def test_a_save_does_these_operations_in_this_order(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    class Recorder(FileOperations):
        def about_to(self, operation: str, path: Path) -> None:
            if operation != "write":
                seen.append(f"{operation}: {path.name}")

    save_tiny(tmp_path, 10)
    save_tiny(tmp_path, 20)
    seen: list[str] = []
    save_tiny(tmp_path, 20, seed=5, keep=1, files=Recorder())
    folder = tmp_path.name
    assert seen == [
        "make directory: .tmp-step-00000020",
        f"sync directory: {folder}",
        "create: rank-00000-00001.safetensors",
        "sync: rank-00000-00001.safetensors",
        "create: rank-00000.json",
        "sync: rank-00000.json",
        "sync directory: .tmp-step-00000020",
        "create: manifest.json",
        "sync: manifest.json",
        "sync directory: .tmp-step-00000020",
        "rename: step-00000020.again",
        f"sync directory: {folder}",
        "rename: .trash-step-00000020",
        f"sync directory: {folder}",
        "rename: step-00000020",
        f"sync directory: {folder}",
        "remove file: manifest.json",
        "remove file: rank-00000-00001.safetensors",
        "remove file: rank-00000.json",
        "remove directory: .trash-step-00000020",
        "rename: .trash-step-00000010",
        f"sync directory: {folder}",
        "remove file: manifest.json",
        "remove file: rank-00000-00001.safetensors",
        "remove file: rank-00000.json",
        "remove directory: .trash-step-00000010",
    ]
