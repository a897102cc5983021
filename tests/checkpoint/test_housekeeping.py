from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from albireo.checkpoint import Checkpoint, newest_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    for step in (10, 20, 30, 40):
        save_tiny(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    save_tiny(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["step-00000050"]


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    save_tiny(tmp_path, 10)
    path = save_tiny(tmp_path, 20)
    (path / "rank-00000-00001.safetensors").write_bytes(b"short")
    save_tiny(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    save_tiny(tmp_path, 40, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_a_later_step_than_the_saved_one_is_no_longer_the_runs_future(
    tmp_path: Path, save_tiny: Callable[..., Path], assert_holds: Callable[[Checkpoint, int], None]
) -> None:
    for step in (10, 20, 90):
        save_tiny(tmp_path, step, keep=9)
    save_tiny(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    checkpoint, _ = newest_whole(tmp_path)
    assert checkpoint is not None
    assert_holds(checkpoint, 30)


def test_leftovers_of_crashed_saves_go_and_other_things_stay(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    path = save_tiny(tmp_path, 10)
    shutil.copytree(path, tmp_path / ".tmp-step-00000020")
    shutil.copytree(path, tmp_path / ".trash-step-00000005")
    shutil.copytree(path, tmp_path / ".trash-step-00000010.again")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".tmp-notes").touch()
    save_tiny(tmp_path, 20)
    assert names(tmp_path) == [".tmp-notes", "notes", "step-00000010", "step-00000020"]


def test_a_replacement_that_was_cut_off_is_finished(
    tmp_path: Path, save_tiny: Callable[..., Path], assert_holds: Callable[[Checkpoint, int], None]
) -> None:
    old, new = save_tiny(tmp_path / "a", 10, seed=1), save_tiny(tmp_path / "b", 10, seed=2)
    for both in (True, False):
        folder = tmp_path / str(both)
        folder.mkdir()
        shutil.copytree(new, folder / "step-00000010.again")
        if both:
            shutil.copytree(old, folder / "step-00000010")
        checkpoint, _ = newest_whole(folder)
        assert checkpoint is not None
        assert_holds(checkpoint, 2)
        save_tiny(folder, 20)
        assert names(folder) == ["step-00000010", "step-00000020"]
        shutil.rmtree(folder / "step-00000020")
        checkpoint, _ = newest_whole(folder)
        assert checkpoint is not None
        assert_holds(checkpoint, 2)
