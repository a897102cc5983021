from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.checkpoint import Checkpoint, newest_whole
from albireo.checkpoint.documents import NewerFormatError
from albireo.errors import CheckpointError


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, [])
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_the_newest_whole_one_is_found_and_the_damaged_are_named(
    tmp_path: Path, save_tiny: Callable[..., Path], assert_holds: Callable[[Checkpoint, int], None]
) -> None:
    paths = [save_tiny(tmp_path, step, keep=9) for step in (10, 20, 30, 40)]
    (paths[3] / "manifest.json").write_bytes(b"")
    with (paths[2] / "rank-00000-00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint is not None
    assert_holds(checkpoint, 20)
    assert len(passed_over) == 2
    assert f"{paths[3]} is damaged: manifest.json was cut short" in passed_over[0]
    assert f"{paths[2]} is damaged: rank-00000-00001.safetensors was altered" in passed_over[1]
    assert not any("\n" in line for line in passed_over)


def test_files_and_links_with_a_checkpoints_name_are_passed_over(
    tmp_path: Path, save_tiny: Callable[..., Path]
) -> None:
    path = save_tiny(tmp_path, 10)
    (tmp_path / "step-00000030").touch()
    (tmp_path / "step-00000020").symlink_to(path)
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert ["not a folder" in passed_over[0], "a symbolic link" in passed_over[1]] == [True, True]


def test_all_damaged_gives_none(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    (save_tiny(tmp_path, 10) / "rank-00000.json").unlink()
    checkpoint, passed_over = newest_whole(tmp_path)
    assert checkpoint is None
    assert len(passed_over) == 1


def test_a_newer_format_is_not_passed_over(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    save_tiny(tmp_path, 10)
    manifest = save_tiny(tmp_path, 20) / "manifest.json"
    body = manifest.read_bytes().replace(b'"version": 1', b'"version": 2').rpartition(b', "sha256"')[0]
    manifest.write_bytes(body + f', "sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode())
    with pytest.raises(NewerFormatError, match=r"step-00000020 cannot be read: .* written by a newer Albireo"):
        newest_whole(tmp_path)


def test_a_file_in_the_folders_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="cannot be listed: Not a directory"):
        newest_whole(tmp_path / "checkpoints")
