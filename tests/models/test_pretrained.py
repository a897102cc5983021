from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from albireo.errors import ModelError
from albireo.models import OPT, load_weights, materialise, resolve_model, weight_files

FC1 = "model.decoder.layers.1.fc1.weight"


def load(folder: Path) -> PreTrainedModel:
    model = OPT.make_model(resolve_model(str(folder)).config())
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights(model, folder, OPT)
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors) or tensors, path, metadata={"format": "pt"})


def assert_same_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    wanted = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_a_folder_is_loaded_as_transformers_loads_it(saved: Path) -> None:
    assert_same_weights(load(saved), AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32))


def test_sharded_safetensors(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(weight_files(tmp_path)) > 2
    assert_same_weights(load(tmp_path), trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_widened_or_narrowed(folder: Path, trained: PreTrainedModel, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    for name, parameter in load(folder).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trained.get_parameter(name).to(dtype).float())


def test_names_as_the_first_opt_files_have_them(folder: Path, trained: PreTrainedModel) -> None:
    def older(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()} | {
            "decoder.version": torch.tensor([3.0])
        }

    rewrite(folder, older)
    assert_same_weights(load(folder), trained)


@pytest.mark.parametrize("keep", ["lm_head.weight", "model.decoder.embed_tokens.weight", "both"])
def test_of_tied_weights_one_is_enough(folder: Path, trained: PreTrainedModel, keep: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        embedding = tensors.pop("model.decoder.embed_tokens.weight")
        for name in ("lm_head.weight", "model.decoder.embed_tokens.weight"):
            if keep in (name, "both"):
                tensors[name] = embedding.clone()

    rewrite(folder, change)
    assert_same_weights(load(folder), trained)


def test_tied_weights_that_differ_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": torch.zeros(96, 128)})
    with pytest.raises(ModelError, match=r"holds other values for .* set tie_word_embeddings to false"):
        load(folder)


def test_untied_weights_are_loaded_apart(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": torch.ones(96, 128)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = load(folder)
    assert (model.lm_head.weight == 1).all()
    assert not (model.model.decoder.embed_tokens.weight == 1).all()


def test_an_untied_head_must_be_there(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"no weights for lm_head\.weight, which"):
        load(folder)


def _remove(tensors: dict[str, Tensor]) -> None:
    del tensors[FC1]


def _remove_two(tensors: dict[str, Tensor]) -> None:
    del tensors[FC1], tensors["model.decoder.layers.1.fc2.weight"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.decoder.layers.2.fc1.weight"] = torch.zeros(1)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[FC1] = tensors[FC1].t().contiguous()


def _quantise(tensors: dict[str, Tensor]) -> None:
    tensors[FC1] = tensors[FC1].to(torch.int8)


def _twice(tensors: dict[str, Tensor]) -> None:
    tensors[FC1.removeprefix("model.")] = tensors[FC1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove, rf"holds no weights for {FC1}, which"),
        (_remove_two, rf"holds no weights for {FC1} and 1 more"),
        (_add, r"holds model\.decoder\.layers\.2\.fc1\.weight, which the model of its config\.json has no place for"),
        (_reshape, rf"holds {FC1} of shape \[128, 512\]; .* needs \[512, 128\]"),
        (_quantise, rf"holds {FC1} as I8: expected weights that are not quantised"),
        (_twice, "which is there already as"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ModelError, match=words):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1, -4096])
def test_a_file_that_was_cut_short_is_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)


@pytest.mark.parametrize("position", [0, 7, 8, 9])
def test_a_damaged_header_is_named(folder: Path, position: int) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut short"):
        load(folder)


def test_a_missing_shard_is_named(trained: PreTrainedModel, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path, max_shard_size="200KB")
    lost = weight_files(tmp_path)[1]
    lost.unlink()
    with pytest.raises(ModelError, match=rf"names '{lost.name}', which is no file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', r"names '\.\./secret\.safetensors', which is no file"),
    ],
)
def test_a_malformed_index_is_named(folder: Path, text: str, words: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=rf"model\.safetensors\.index\.json.*{words}|{words}"):
        load(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo read'\ntR.")
    with pytest.raises(ModelError, match=r"pickled weights only.*convert them to safetensors"):
        weight_files(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights: expected model\.safetensors"):
        weight_files(folder)
