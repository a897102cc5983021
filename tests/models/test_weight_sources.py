from __future__ import annotations

import itertools
import json
import math
import os
import random
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from albireo.errors import ConfigError, ModelError
from albireo.models import OPT, FolderWeights, RandomWeights, build_model, load_weights, materialise, resolve_model
from albireo.models.build import build_model_lazily, configure_model
from albireo.models.initialise import BLOCK
from albireo.sharding import ParameterValues, WeightSource

EMBEDDING = "model.decoder.embed_tokens.weight"
FC1 = "model.decoder.layers.1.fc1.weight"


def whole(name: str, init: str = "random", seed: int = 0) -> PreTrainedModel:
    choice = resolve_model(name)
    config, _ = configure_model(choice, init=init)  # type: ignore[arg-type]
    return build_model(choice, config, init=init, seed=seed)  # type: ignore[arg-type]


def lazy(name: str, init: str = "random", seed: int = 0) -> tuple[PreTrainedModel, WeightSource]:
    choice = resolve_model(name)
    config, _ = configure_model(choice, init=init)  # type: ignore[arg-type]
    return build_model_lazily(choice, config, init=init, seed=seed)  # type: ignore[arg-type]


def pieces(numel: int, draw: random.Random) -> list[tuple[int, int]]:
    """Return the ranges between random cuts, in random order."""
    cuts = sorted({0, numel, *(draw.randrange(numel + 1) for _ in range(draw.randrange(6)))})
    ranges = list(itertools.pairwise(cuts))
    draw.shuffle(ranges)
    return ranges


def filled(source: WeightSource, parameter: nn.Parameter, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    flat = torch.full((parameter.numel(),), math.nan, dtype=dtype)
    for start, stop in pieces(parameter.numel(), random.Random(seed)):
        source.fill(parameter, start, flat[start:stop])
    return flat.view(parameter.shape)


def assert_fills_as_built(model: PreTrainedModel, source: WeightSource, built: PreTrainedModel) -> None:
    wanted = dict(built.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert list(found) == list(wanted)
    for number, (name, parameter) in enumerate(found.items()):
        assert parameter.is_meta
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad == wanted[name].requires_grad
        assert torch.equal(filled(source, parameter, number), wanted[name]), name
        narrow = filled(source, parameter, number, torch.bfloat16)
        assert torch.equal(narrow, wanted[name].to(torch.bfloat16)), name


@pytest.fixture
def sharded(trained: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder of three files."""
    trained.save_pretrained(tmp_path, max_shard_size="700KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    return tmp_path


@pytest.mark.parametrize("seed", [0, 7])
def test_random_weights_in_pieces_are_those_of_a_whole_model(seed: int) -> None:
    model, source = lazy("tiny", seed=seed)
    with closing(source):
        assert_fills_as_built(model, source, whole("tiny", seed=seed))
        assert model.training
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_of_a_folder_in_pieces_are_those_of_a_whole_model(saved: Path, sharded: Path) -> None:
    for folder in (saved, sharded):
        model, source = lazy(str(folder), "pretrained")
        with closing(source):
            assert_fills_as_built(model, source, whole(str(folder), "pretrained"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_floats(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    tensors = {name: (tensor.double() + 1e-9).to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    model, source = lazy(str(folder), "pretrained")
    with closing(source):
        assert_fills_as_built(model, source, whole(str(folder), "pretrained"))


def test_building_takes_no_memory_for_parameters_and_an_untouched_random_state() -> None:
    before = torch.get_rng_state()
    model, source = lazy("175b")
    with closing(source):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        last = model.model.decoder.layers[95].fc2.weight
        part = torch.empty(1000)
        source.fill(last, last.numel() - 1000, part)
        assert float(part.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, source = lazy("tiny")
    finally:
        torch.set_default_dtype(torch.float32)
    with closing(source):
        assert_fills_as_built(model, source, whole("tiny"))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_many_blocks_are_drawn_at_once_and_are_the_same(data: st.DataObject, dtype: torch.dtype) -> None:
    config = OPT.config_for("tiny")
    config.vocab_size = 5 * BLOCK // 2 // 128
    model = OPT.make_model(config)
    parameter = model.get_input_embeddings().weight
    numel = parameter.numel()
    source = RandomWeights(model, 3)
    with closing(source):
        reference = torch.empty(numel)
        for start in range(0, numel, BLOCK // 4):
            source.fill(parameter, start, reference[start : start + BLOCK // 4])
        start = data.draw(st.integers(0, numel))
        stop = data.draw(st.integers(start, numel))
        part = torch.full((stop - start,), math.nan, dtype=dtype)
        source.fill(parameter, start, part)
        assert torch.equal(part, reference[start:stop].to(dtype))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("first-weights")]


def test_a_parameter_is_itself_after_it_has_got_memory() -> None:
    """As a chunk has it: parameters become views of a buffer, in another dtype, before the weights come."""
    model, source = lazy("tiny")
    parameter = model.get_parameter(FC1)
    with closing(source):
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty(parameter.shape, dtype=torch.float16)))
        wanted = whole("tiny").get_parameter(FC1)
        assert torch.equal(filled(source, parameter), wanted)


@pytest.fixture
def read_ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is read from files by position: name, offset in bytes, bytes."""
    ranges = []
    preadv = os.preadv

    def spying(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        ranges.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset, count))
        return count

    monkeypatch.setattr(os, "preadv", spying)
    return ranges


def test_a_part_reads_its_own_bytes_and_opens_its_own_file(
    sharded: Path, read_ranges: list[tuple[str, int, int]]
) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    model, source = lazy(str(sharded), "pretrained")
    with closing(source):
        assert read_ranges == []
        source.fill(model.get_parameter(FC1), 1000, torch.empty(500))
    length, header, data = read_ranges
    assert {name for name, _, _ in read_ranges} == {weight_map[FC1]}
    assert length[1:] == (0, 8)
    assert header[1] == 8
    assert data[2] == 4 * 500
    raw = (sharded / weight_map[FC1]).read_bytes()[data[1] : data[1] + data[2]]
    wanted = load_file(sharded / weight_map[FC1])[FC1].view(-1)[1000:1500]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_byte_is_read_once(sharded: Path, dtype: torch.dtype, read_ranges: list[tuple[str, int, int]]) -> None:
    model, source = lazy(str(sharded), "pretrained")
    with closing(source):
        for parameter in model.parameters():
            filled(source, parameter, 5, dtype)
    read = sum(count for _, _, count in read_ranges)
    assert read == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))


def test_files_are_closed(sharded: Path) -> None:
    model, source = lazy(str(sharded), "pretrained")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for parameter in model.parameters():
        filled(source, parameter)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    source.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_names_as_the_first_opt_files_have_them(folder: Path) -> None:
    wanted = whole(str(folder), "pretrained")
    path = folder / "model.safetensors"
    older = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(older | {"decoder.version": torch.tensor([3.0])}, path, metadata={"format": "pt"})
    model, source = lazy(str(folder), "pretrained")
    with closing(source):
        assert_fills_as_built(model, source, wanted)


def test_tied_weights_that_are_there_twice_must_be_equal_where_they_are_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors[EMBEDDING].clone()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    model, source = lazy(str(folder), "pretrained")
    with closing(source):
        assert_fills_as_built(model, source, whole(str(folder), "pretrained"))
    head.view(-1)[5000] += 1
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    model, source = lazy(str(folder), "pretrained")
    with closing(source):
        source.fill(model.lm_head.weight, 0, torch.empty(5000))
        with pytest.raises(ModelError, match=r"holds other values for .* set tie_word_embeddings to false"):
            source.fill(model.lm_head.weight, 4000, torch.empty(2000))


def _cut_short(content: bytearray) -> bytes:
    return bytes(content[:-4096])


def _without_header(content: bytearray) -> bytes:
    return bytes(content[:4])


def _huge_header(content: bytearray) -> bytes:
    content[5] = 1
    return bytes(content)


def _no_json(content: bytearray) -> bytes:
    content[8] = ord("]")
    return bytes(content)


def _no_mapping(content: bytearray) -> bytes:
    return (2).to_bytes(8, "little") + b"[]" + bytes(content[10:])


def _other_offsets(content: bytearray) -> bytes:
    return bytes(content.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'))


DAMAGES = [_cut_short, _without_header, _huge_header, _no_json, _no_mapping, _other_offsets]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("before", [True, False])
def test_a_damaged_file_is_named(folder: Path, damage: Callable[[bytearray], bytes], before: bool) -> None:
    """Whether it was damaged before it was looked at, or since."""
    path = folder / "model.safetensors"
    damaged = damage(bytearray(path.read_bytes()))
    if before:
        path.write_bytes(damaged)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short"):  # noqa: PT012
        model, source = lazy(str(folder), "pretrained")
        path.write_bytes(damaged)
        with closing(source):
            for parameter in model.parameters():
                filled(source, parameter)


def test_a_file_that_has_gone_since_is_named(folder: Path) -> None:
    model, source = lazy(str(folder), "pretrained")
    (folder / "model.safetensors").unlink()
    with closing(source), pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short: No such file"):
        filled(source, model.get_parameter(FC1))


def test_a_file_that_has_other_tensors_since_is_named(folder: Path) -> None:
    model, source = lazy(str(folder), "pretrained")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {FC1: tensors[FC1][:3].clone()}, path)
    with closing(source), pytest.raises(ModelError, match=rf"damaged or cut short: the elements .* of {FC1} are not"):
        filled(source, model.get_parameter(FC1), 3)


def test_a_tensor_that_does_not_fit_is_refused_when_the_model_is_built(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {FC1: tensors[FC1].t().contiguous()}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"holds {FC1} of shape \[128, 512\]; .* needs \[512, 128\]"):
        lazy(str(folder), "pretrained")


def test_a_buffer_that_a_folder_holds_is_filled_at_once(folder: Path, trained: PreTrainedModel) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.decoder.scale": torch.tensor([2.0, 3.0])}, path, metadata={"format": "pt"})
    model = OPT.make_model(trained.config)
    model.model.decoder.register_buffer("scale", torch.zeros(2))
    with closing(FolderWeights(model, folder, OPT)):
        assert model.model.decoder.scale.tolist() == [2.0, 3.0]
    whole_model = OPT.make_model(trained.config)
    whole_model.model.decoder.register_buffer("scale", torch.zeros(2))
    materialise(whole_model, torch.device("cpu"))
    load_weights(whole_model, folder, OPT)
    assert whole_model.model.decoder.scale.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("make", ["random", "folder", "values"])
def test_what_a_parameter_does_not_have_is_refused(make: str, saved: Path, trained: PreTrainedModel) -> None:
    model, source = lazy(str(saved), "pretrained" if make == "folder" else "random")
    if make == "values":
        source, model = ParameterValues(), trained
    parameter = model.get_parameter(FC1)
    with closing(source):
        source.fill(parameter, parameter.numel(), torch.empty(0))
        for start, out in [
            (-1, torch.empty(3)),
            (parameter.numel() - 2, torch.empty(3)),
            (0, torch.empty(2, 2)),
            (0, torch.empty(8)[::2]),
        ]:
            with pytest.raises(ConfigError, match="a parameter of 65536 elements cannot fill a tensor of shape"):
                source.fill(parameter, start, out)
        if make != "values":
            with pytest.raises(ConfigError, match=r"a parameter of shape \(4,\) is none of the model's"):
                source.fill(nn.Parameter(torch.empty(4)), 0, torch.empty(4))


def test_a_model_that_has_its_weights_is_a_source_itself(trained: PreTrainedModel) -> None:
    source = ParameterValues()
    turned = nn.Parameter(torch.randn(7, 5).t())
    for parameter in [*trained.parameters(), turned]:
        assert torch.equal(filled(source, parameter, 1), parameter)
    with pytest.raises(ConfigError, match=r"nothing says how it begins: build .* within albireo\.LazyInitContext"):
        source.fill(nn.Parameter(torch.empty(3, device="meta")), 0, torch.empty(3))
