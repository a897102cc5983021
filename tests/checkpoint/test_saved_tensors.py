import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from albireo.checkpoint import open_saved_tensors, refuse_pickle
from albireo.errors import CheckpointError


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "some.name", metadata={"format": "pt", "note": "x"})
    with open_saved_tensors(tmp_path / "some.name", "model") as saved:
        assert saved.names() == ["a", "b", "empty"]
        assert saved.metadata["note"] == "x"
        assert "a" in saved
        assert "c" not in saved
        assert saved.info("a") == ((2, 3), torch.float32)
        half = torch.zeros(2, 3, dtype=torch.bfloat16)
        saved.read_into("a", half)
        assert torch.equal(half.float(), tensors["a"])
        other = saved.renamed({"model/x": "a"})
        assert other.names("model/") == ["model/x"]
        assert torch.equal(other.read("model/x"), tensors["a"])
        with pytest.raises(CheckpointError, match="holds no tensor a"):
            other.info("a")
        with pytest.raises(CheckpointError, match=r"a of shape \(2, 3\), but \(3,\)"):
            saved.read_into("a", torch.zeros(3))
        with pytest.raises(CheckpointError, match=r"b as torch.int64, but torch.float32"):
            saved.read_into("b", torch.tensor(0.0))


@pytest.mark.parametrize("staging_bytes", [1, 40, 2**20])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 6), ()])
def test_any_run_of_elements_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], staging_bytes: int
) -> None:
    monkeypatch.setattr("albireo.checkpoint.saved_tensors._STAGING_BYTES", staging_bytes)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file({"a": tensor}, tmp_path / "file")
    flat = tensor.reshape(-1)
    with open_saved_tensors(tmp_path / "file", "model") as saved:
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 1):
                part = torch.zeros(stop - start)
                saved.read_slice_into("a", start, part)
                assert torch.equal(part, flat[start:stop])
        narrow = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        saved.read_slice_into("a", flat.numel() - 1, narrow)
        assert torch.equal(narrow, flat[-1:].bfloat16())


def test_a_run_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "empty": torch.zeros(0, 3)}, tmp_path / "file")
    with open_saved_tensors(tmp_path / "file", "model") as saved:
        saved.read_slice_into("empty", 0, torch.zeros(0))
        for start, tensor in ((-1, torch.zeros(2)), (5, torch.zeros(2)), (0, torch.zeros(2, 3))):
            with pytest.raises(CheckpointError, match=r"a in .* has 6 elements, so"):
                saved.read_slice_into("a", start, tensor)
        with pytest.raises(CheckpointError, match=r"holds a as torch\.float32, but torch\.int64"):
            saved.read_slice_into("a", 0, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(CheckpointError, match="holds no tensor b"):
            saved.read_slice_into("b", 0, torch.zeros(2))


def index(folder: Path, stem: str, files: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    places = {key: name for name, tensors in files.items() for key in tensors}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_folder_and_its_index_are_read(tmp_path: Path) -> None:
    index(tmp_path, "model", {"x.safetensors": {"a": torch.ones(1)}, "y.safetensors": {"b": torch.ones(2)}})
    index(tmp_path, "optimizer", {"z.safetensors": {"c": torch.ones(3)}})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with open_saved_tensors(path, "model") as saved:
            assert saved.names() == ["a", "b"]
    with open_saved_tensors(tmp_path, "optimizer") as saved:
        assert saved.names() == ["c"]


def test_files_of_different_saves_are_refused(tmp_path: Path) -> None:
    index(tmp_path, "model", {"x.safetensors": {"a": torch.ones(1)}, "y.safetensors": {"b": torch.ones(2)}})
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="a twice"), open_saved_tensors(tmp_path, "model"):
        pass


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda _: None, "there is no file and no folder"),
        (lambda path: path.mkdir(), "holds neither model.safetensors nor model.safetensors.index.json$"),
        (lambda path: (path.mkdir(), (path / "pytorch_model.bin").touch()), "pytorch_model.bin is pickled"),
        (lambda path: path.write_bytes(b"nonsense" * 10), "is no safetensors file"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is no safetensors file"),
        (lambda path: path.touch(), "is no safetensors file"),
        (
            lambda path: (path.mkdir(), (path / "model.safetensors.index.json").write_text("{")),
            "cannot be read as JSON",
        ),
        (lambda path: (path.mkdir(), (path / "model.safetensors.index.json").write_text("[]")), "has no weight_map"),
        (
            lambda path: (
                path.mkdir(),
                (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
            ),
            "names '../b.safetensors', which is no file beside it",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, write: object, said: str) -> None:
    write(tmp_path / "it")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=said), open_saved_tensors(tmp_path / "it", "model"):
        pass


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_names_of_pickles_are_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name it weights\.safetensors"):
        refuse_pickle(tmp_path / f"weights{suffix}")
    with pytest.raises(CheckpointError, match=r"name it weights\.json"):
        refuse_pickle(tmp_path / f"weights{suffix}", ".json")
    refuse_pickle(tmp_path / "weights")
