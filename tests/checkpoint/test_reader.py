from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.checkpoint import Checkpoint, OneRank, Snapshot, TensorSlice, open_checkpoint, save_checkpoint, whole
from albireo.checkpoint.slices import DTYPE_CODES
from albireo.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path, save_tiny: Callable[..., Path]) -> Path:
    return save_tiny(tmp_path, 7)


def altered_bytes(path: Path) -> Iterator[None]:
    """Flip one bit after another of a file, a bit in each byte, and put it back."""
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for index, byte in enumerate(data):
            os.pwrite(file.fileno(), bytes([byte ^ (1 << index % 8)]), index)
            yield
            os.pwrite(file.fileno(), bytes([byte]), index)


def test_everything_comes_back(checkpoint: Path, assert_holds: Callable[[Checkpoint, int], None]) -> None:
    opened = open_checkpoint(checkpoint)
    assert_holds(opened, 7)
    assert (opened.step, opened.world_size, opened.aliases) == (7, 1, {"model/head": "model/weight"})
    assert opened.rank_state(1) is None
    assert opened.rank_state(-1) is None
    assert opened.names("optimizer/") == ["optimizer/step"]
    assert torch.equal(opened.read("model/head"), opened.read("model/weight"))
    assert opened.info("model/head") == ((3, 4), torch.float32)
    assert opened.info("optimizer/step") == ((), torch.int64)
    assert opened.read("model/nothing").shape == (0,)


def test_every_flipped_byte_is_found_and_its_file_named(checkpoint: Path) -> None:
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == ["manifest.json", "rank-00000-00001.safetensors", "rank-00000.json"]
    for name in names:
        for _ in altered_bytes(checkpoint / name):
            with pytest.raises(CheckpointError, match=rf"is damaged: {name} was (cut short or )?altered"):
                open_checkpoint(checkpoint)
    open_checkpoint(checkpoint)


def test_every_short_long_or_missing_file_is_found_and_named(checkpoint: Path) -> None:
    for path in sorted(checkpoint.iterdir()):
        data = path.read_bytes()
        for length in {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *range(0, len(data), 29)}:
            path.write_bytes(data[:length])
            for check_contents in (True, False):
                with pytest.raises(CheckpointError, match=rf"is damaged: {path.name} (has \d+ bytes|was cut short)"):
                    open_checkpoint(checkpoint, check_contents=check_contents)
        path.write_bytes(data + b"\0")
        with pytest.raises(CheckpointError, match=rf"is damaged: {path.name} "):
            open_checkpoint(checkpoint)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"is damaged: {path.name} is missing"):
            open_checkpoint(checkpoint)
        path.write_bytes(data)
    open_checkpoint(checkpoint)


def test_without_contents_all_but_the_elements_is_checked(checkpoint: Path) -> None:
    path = checkpoint / "rank-00000-00001.safetensors"
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    refused = []
    for index, _ in enumerate(altered_bytes(path)):
        try:
            open_checkpoint(checkpoint, check_contents=False)
        except CheckpointError as error:
            assert path.name in str(error)  # noqa: PT017  that none comes for elements is the point
            refused.append(index)
    assert refused == list(range(header_bytes))
    assert header_bytes < len(data)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.json", "rank-00000-00001.safetensors"])
def test_links_pipes_and_folders_are_no_files(checkpoint: Path, name: str) -> None:
    moved = shutil.move(checkpoint / name, checkpoint / "moved")
    (checkpoint / name).symlink_to(moved)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link"):
        open_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        open_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        open_checkpoint(checkpoint)


def test_what_is_no_checkpoint_is_said(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere: No such file"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: it is not a folder"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "link").symlink_to(checkpoint)
    with pytest.raises(CheckpointError, match="link: it is a symbolic link"):
        open_checkpoint(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        open_checkpoint(tmp_path / "empty")


def test_a_checkpoint_under_another_steps_name_is_refused(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("step-00000008"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is of step 7"):
        open_checkpoint(renamed)
    assert open_checkpoint(renamed.rename(renamed.with_name("best"))).step == 7


def test_states_of_two_checkpoints_cannot_be_mixed(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    one, two = save_tiny(tmp_path / "one", 7), save_tiny(tmp_path / "two", 7, seed=8)
    shutil.copy(two / "rank-00000.json", one / "rank-00000.json")
    with pytest.raises(CheckpointError, match=r"rank-00000\.json (was altered|has \d+ bytes)"):
        open_checkpoint(one)


def test_a_file_that_changes_after_the_check_is_not_read(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    path = checkpoint / "rank-00000-00001.safetensors"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000-00001\.safetensors is missing"):
        opened.read("model/weight")
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"rank-00000-00001\.safetensors has changed since it was checked"):
        opened.read("model/weight")
    (checkpoint / "rank-00000.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"rank-00000\.json has 2 bytes"):
        opened.rank_state(0)


def test_reading_into_says_what_does_not_fit(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"model/weight has shape \(3, 4\) in the checkpoint .* but \(4, 3\)"):
        opened.read_into("model/weight", torch.zeros(4, 3))
    with pytest.raises(CheckpointError, match=r"model/weight is torch\.float32 .* but a tensor of torch\.float16"):
        opened.read_into("model/weight", torch.zeros(3, 4, dtype=torch.float16))
    with pytest.raises(CheckpointError, match=r"torch\.float64 is to be filled"):
        opened.read_into("model/weight", torch.zeros(4, 3, dtype=torch.float64).t())
    with pytest.raises(CheckpointError, match="meta device"):
        opened.read_into("model/weight", torch.zeros(3, 4, device="meta"))
    with pytest.raises(CheckpointError, match="holds no tensor model/other"):
        opened.read_into("model/other", torch.zeros(3, 4))
    with pytest.raises(CheckpointError, match="read into a 1-D tensor"):
        opened.read_range_into("model/weight", 0, torch.zeros(3, 4))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 13), (13, None), (12, 13)])
def test_ranges_that_are_none_are_refused(checkpoint: Path, start: int, stop: int | None) -> None:
    with pytest.raises(CheckpointError, match="model/weight has 12 elements, so"):
        open_checkpoint(checkpoint).read("model/weight", start, stop)


def test_reading_into_parameters_strides_and_other_dtypes(
    checkpoint: Path, tiny: Callable[[int], dict[str, torch.Tensor]]
) -> None:
    opened, weight = open_checkpoint(checkpoint), tiny(7)["model/weight"]
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    opened.read_into("model/weight", parameter)
    assert torch.equal(parameter, weight)
    strided = torch.zeros(4, 3).t()
    opened.read_into("model/weight", strided)
    assert torch.equal(strided, weight)
    narrow = torch.zeros(3, 4, dtype=torch.bfloat16)
    opened.read_into("model/weight", narrow, allow_cast=True)
    assert torch.equal(narrow, weight.to(torch.bfloat16))
    buffer = torch.zeros(9)
    opened.read_range_into("model/weight", 5, buffer[2:5])
    assert torch.equal(buffer[2:5], weight.view(-1)[5:8])
    assert buffer[:2].tolist() == [0, 0]
    assert buffer[5:].tolist() == [0, 0, 0, 0]
    every_other = torch.zeros(6)
    opened.read_range_into("model/weight", 1, every_other[::2])
    assert torch.equal(every_other[::2], weight.view(-1)[1:4])


def test_a_slice_casts_numbers_of_floating_point_alone(
    checkpoint: Path, tiny: Callable[[int], dict[str, torch.Tensor]]
) -> None:
    opened, weight = open_checkpoint(checkpoint), tiny(7)["model/weight"].view(-1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        part = torch.zeros(4, dtype=dtype)
        opened.read_slice_into("model/weight", 5, part)
        assert torch.equal(part, weight[5:9].to(dtype))
    with pytest.raises(CheckpointError, match=r"but a tensor of torch\.int64 is to be filled"):
        opened.read_slice_into("model/weight", 0, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="12 elements, so 10 to 14 is no range"):
        opened.read_slice_into("model/weight", 10, torch.zeros(4))


@pytest.mark.usefixtures("instant_sync")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range_over_any_partition_is_exact(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPE_CODES)), "dtype")
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3), "shape"))
    numbers = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1))
    tensor = (numbers > 50) if dtype is torch.bool else numbers.to(dtype)
    flat, count = tensor.reshape(-1), tensor.numel()
    cuts = data.draw(st.sets(st.integers(1, max(1, count - 1)), max_size=5), "cuts")
    bounds = [0, *sorted(cut for cut in cuts if cut < count), count]
    slices = [TensorSlice("x", shape, start, flat[start:stop]) for start, stop in pairwise(bounds)]
    slices = [*data.draw(st.permutations(slices), "order"), whole("beside", torch.arange(7.0))]
    shard_bytes = data.draw(st.integers(1, 300), "shard_bytes")
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Snapshot(step=1, slices=slices)
        path = save_checkpoint(Path(folder), snapshot, ranks=OneRank(), keep=1, shard_bytes=shard_bytes)
        opened = open_checkpoint(path)
        assert opened.info("x") == (shape, dtype)
        for _ in range(5):
            start = data.draw(st.integers(0, count), "start")
            stop = data.draw(st.integers(start, count), "stop")
            read = opened.read("x", start, stop)
            assert read.dtype is dtype
            assert torch.equal(read, flat[start:stop])
        target = torch.zeros(shape, dtype=dtype)
        opened.read_into("x", target)
        assert torch.equal(target, tensor)


def test_only_the_bytes_of_the_range_are_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(checkpoint)
    read_bytes = []
    real = Checkpoint._read_bytes

    def count(self: Checkpoint, file_name: str, offset_bytes: int, view: memoryview) -> None:
        read_bytes.append(view.nbytes)
        real(self, file_name, offset_bytes, view)

    monkeypatch.setattr(Checkpoint, "_read_bytes", count)
    opened.read("model/weight", 3, 5)
    assert read_bytes == [8]
