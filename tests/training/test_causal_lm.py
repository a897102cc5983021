"""The wrapper that the training step calls, against transformers' own model and loss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import small_opt
from transformers import OPTForCausalLM

from albireo.checkpoint import tensor_names
from albireo.data import Batch
from albireo.models import OPT
from albireo.training.causal_lm import CausalLanguageModel, inputs_of


def make(*, tied: bool = True, post_norm: bool = False) -> OPTForCausalLM:
    """A small OPT; with `post_norm` one of the 350m's kind, whose words are narrower than its hidden states."""
    return small_opt(
        seed=1,
        vocab_size=53,
        hidden_size=32,
        word_embed_proj_dim=16 if post_norm else 32,
        do_layer_norm_before=not post_norm,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )


def batch_of(length: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 53, (3, length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, ids)
    return Batch(ids, labels, int((labels[:, 1:] != -100).sum()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("post_norm", [False, True])
def test_loss_and_gradients_are_transformers_own(tied: bool, post_norm: bool) -> None:
    model, plain = make(tied=tied, post_norm=post_norm), make(tied=tied, post_norm=post_norm)
    batch = batch_of()
    loss_sum, count = CausalLanguageModel(model, OPT)(**inputs_of(batch))
    assert (loss_sum.dtype, count.dtype) == (torch.float32, torch.int64)
    assert count.item() == batch.tokens
    (loss_sum / batch.tokens).backward()
    expected = plain(input_ids=batch.input_ids, labels=batch.labels).loss
    expected.backward()
    assert loss_sum.item() / batch.tokens == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


def test_a_row_is_judged_without_looking_at_what_comes_later() -> None:
    model = CausalLanguageModel(make(), OPT)
    batch = batch_of()
    labels = batch.labels.clone()
    labels[:, 5:] = -100
    first = model(batch.input_ids, labels)[0]
    other = batch.input_ids.clone()
    other[:, 5:] = 7
    assert model(other, labels)[0].item() == first.item()
    other[:, 3] = 9
    assert model(other, labels)[0].item() != first.item()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_there_once(tied: bool) -> None:
    model = make(tied=tied)
    wrapper = CausalLanguageModel(model, OPT)
    assert wrapper.pretrained is model
    assert {id(parameter) for parameter in wrapper.parameters()} == {id(parameter) for parameter in model.parameters()}
    assert len(list(wrapper.parameters())) == len(list(model.parameters()))


def test_hooks_fire_on_backbone_and_head() -> None:
    wrapper = CausalLanguageModel(make(), OPT)
    seen: list[str] = []
    for name in ("backbone", "head"):
        wrapper.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    wrapper(**inputs_of(batch_of()))
    assert seen == ["backbone", "head"]


def test_names_in_a_checkpoint_are_the_familys_own() -> None:
    names, aliases = tensor_names(make())
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in names.values()
    assert aliases == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    assert len(names) == len(set(names.values())) == len(list(make().parameters()))
    names, aliases = tensor_names(make(tied=False))
    assert aliases == {}
    assert {"lm_head.weight", "model.decoder.embed_tokens.weight"} <= set(names.values())


def test_names_are_those_of_tensors_that_last() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(2, 2)
    module.second = torch.nn.Linear(2, 2)
    module.second.bias = module.first.bias
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    module.register_buffer("same", module.kept)
    names, aliases = tensor_names(module)
    assert list(names.values()) == ["first.weight", "first.bias", "second.weight", "kept"]
    assert aliases == {"second.bias": "first.bias", "same": "kept"}
    assert names[module.kept] == "kept"
