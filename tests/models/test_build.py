from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from albireo.errors import ModelError
from albireo.models import OPT, Vocabulary, build_model, configure_model, materialise, resolve_model


def build(name: str, init: str = "random", seed: int = 0, **options: object) -> PreTrainedModel:
    choice = resolve_model(name)
    config, _ = configure_model(choice, init=init, **options)  # type: ignore[arg-type]
    return build_model(choice, config, init=init, seed=seed)  # type: ignore[arg-type]


def test_random_weights_of_a_size() -> None:
    before = torch.get_rng_state()
    model = build("tiny", vocabulary=Vocabulary(300, bos=0, eos=1), sequence_length=2048)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() and parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.shape == (300, 128)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, None)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, None)
    assert model.get_input_embeddings().padding_idx is None
    ids = torch.arange(20).view(2, 10)
    loss = model(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)


def test_a_padding_token_has_a_row_of_zeros() -> None:
    model = build("tiny", vocabulary=Vocabulary(300, bos=0, eos=1, pad=7))
    assert not model.get_input_embeddings().weight[7].any()
    assert model.get_input_embeddings().padding_idx == 7


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build("tiny")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, build("tiny").lm_head.weight)


def test_a_random_folder_has_its_shape_but_not_its_weights(saved: Path, trained: PreTrainedModel) -> None:
    model = build(str(saved))
    assert model.lm_head.weight.shape == trained.lm_head.weight.shape
    assert float(model.lm_head.weight.std().detach()) == pytest.approx(0.02, rel=0.05)


def test_trained_weights_of_a_folder_compute_the_same(saved: Path, trained: PreTrainedModel) -> None:
    model = build(str(saved), init="pretrained", seed=9).eval()
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_what_is_built_can_be_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    model = build("tiny", vocabulary=Vocabulary(300, bos=0, eos=1)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.dtype == torch.float32
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    again = build(str(tmp_path), init="pretrained")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_text_longer_than_there_are_positions(saved: Path) -> None:
    with pytest.raises(ModelError, match="--sequence-length 2049 is more than the 2048 positions of the model tiny"):
        configure_model(resolve_model("tiny"), init="random", sequence_length=2049)
    with pytest.raises(ModelError, match="more than the 32 positions"):
        configure_model(resolve_model(str(saved)), init="pretrained", sequence_length=33)


def test_dropout_reaches_the_model() -> None:
    config, _ = configure_model(resolve_model("tiny"), init="random", dropout=0.5)
    assert config.dropout == 0.5
    assert OPT.make_model(config).model.decoder.layers[0].dropout == 0.5


@pytest.mark.parametrize("name", ["tiny", "175b"])
def test_weights_that_nobody_publishes_are_refused_before_anything_is_built(name: str) -> None:
    with pytest.raises(ModelError, match="has no published weights: use --init random"):
        configure_model(resolve_model(name), init="pretrained")


def test_a_folder_without_weights_is_refused_before_anything_is_built(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    configure_model(resolve_model(str(folder)), init="random")
    with pytest.raises(ModelError, match="holds no weights"):
        configure_model(resolve_model(str(folder)), init="pretrained")


def test_the_user_is_told_where_tokenizer_and_model_differ(saved: Path) -> None:
    config, lines = configure_model(
        resolve_model(str(saved)), init="pretrained", vocabulary=Vocabulary(90, bos=2, eos=2, pad=3)
    )
    assert config.pad_token_id == 3
    assert len(lines) == 2
    with pytest.raises(ModelError, match="97 ids but the model's weights have 96 rows"):
        configure_model(resolve_model(str(saved)), init="pretrained", vocabulary=Vocabulary(97))


def test_parameters_that_are_one_stay_one() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        model[1].weight.requires_grad_(False)
    materialise(model, torch.device("cpu"))
    assert model[2].weight is model[0].weight
    assert not model[1].weight.requires_grad
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "wrong", [{"num_attention_heads": 5}, {"activation_function": "none such"}, {"pad_token_id": 96}, {"ffn_dim": -1}]
)
def test_a_configuration_that_describes_no_model(folder: Path, wrong: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ModelError, match=r"describes no opt model: ."):
        build(str(folder))


def test_a_buffer_that_nobody_would_fill_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match=r"the buffer 0\.running_mean of a BatchNorm1d would stay uninitialised"):
        materialise(model, torch.device("cpu"))
