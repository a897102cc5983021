from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from albireo.models import OPT, count_parameters

PARAMETERS = {
    "125m": 125_239_296,
    "350m": 331_196_416,
    "1.3b": 1_315_758_080,
    "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984,
    "13b": 12_853_473_280,
    "30b": 29_974_540_288,
    "66b": 65_719_701_504,
    "175b": 174_604_468_224,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_each_size_has_the_published_number_of_parameters(size: str) -> None:
    assert count_parameters(OPT.config_for(size)) == PARAMETERS[size]


def test_there_are_the_sizes_that_the_command_line_offers() -> None:
    assert list(OPT.sizes) == ["tiny", "125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"]
    assert [size.hub_id for size in OPT.sizes.values()][1:-1] == [
        f"facebook/opt-{name}" for name in list(OPT.sizes)[1:-1]
    ]


@pytest.mark.parametrize("size", OPT.sizes)
def test_all_sizes_share_what_opt_is(size: str) -> None:
    config = OPT.config_for(size)
    assert config.model_type == "opt"
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)
    assert config.vocab_size == (4096 if size == "tiny" else 50272)
    assert config.max_position_embeddings == 2048
    assert config.hidden_size % config.num_attention_heads == 0
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.0, 0.0, 0.0)
    assert config.tie_word_embeddings


def test_350m_normalises_after_each_half_block_and_embeds_in_512_dimensions() -> None:
    model = OPT.make_model(OPT.config_for("350m"))
    decoder = model.model.decoder
    assert decoder.embed_tokens.embedding_dim == 512
    assert (decoder.project_in.out_features, decoder.project_out.out_features) == (1024, 512)
    assert decoder.final_layer_norm is None
    assert not decoder.layers[0].do_layer_norm_before
    assert OPT.head(model).weight.shape == (50272, 512)


def test_tiny_is_as_the_defaults_say() -> None:
    config = OPT.config_for("tiny")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.ffn_dim) == (
        2,
        128,
        4,
        512,
    )


def test_a_model_of_the_family_computes_what_transformers_computes(trained: PreTrainedModel) -> None:
    ids = torch.randint(96, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = OPT.backbone(trained)(**OPT.forward_arguments(ids)).last_hidden_state
        logits = OPT.head(trained)(hidden)
        torch.testing.assert_close(logits, trained(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
