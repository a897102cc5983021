"""GPT-2: language models of OpenAI (Radford et al., 2019), table 2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from albireo.models.family import Family, Size

__all__ = ["GPT2"]


def _shape(width: int, layers: int, heads: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType({"n_embd": width, "n_layer": layers, "n_head": heads, **more})


GPT2 = Family(
    name="gpt2",
    sizes=MappingProxyType(
        {
            "tiny": Size(
                None, _shape(128, 2, 4, vocab_size=4096, bos_token_id=0, eos_token_id=0), fits_vocabulary=True
            ),
            "124m": Size("openai-community/gpt2", _shape(768, 12, 12)),
            "medium": Size("openai-community/gpt2-medium", _shape(1024, 24, 16)),
            "large": Size("openai-community/gpt2-large", _shape(1280, 36, 20)),
            "xl": Size("openai-community/gpt2-xl", _shape(1600, 48, 25)),
        }
    ),
    model_class="GPT2LMHeadModel",
    config_class="GPT2Config",
    backbone_name="transformer",
    head_name="lm_head",
    blocks_name="transformer.h",
    shared_config=MappingProxyType(
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "tie_word_embeddings": True,
        }
    ),
    dropout_names=("resid_pdrop", "embd_pdrop"),
    no_dropout_names=("attn_pdrop",),
    # The hub's own files name the backbone's parts alone.
    prefixes=MappingProxyType(
        {"wte.": "transformer.wte.", "wpe.": "transformer.wpe.", "h.": "transformer.h.", "ln_f.": "transformer.ln_f."}
    ),
    lora_targets=("c_attn",),
    obsolete_names=(),
    # The masks of causal attention, which older versions kept as buffers.
    obsolete_endings=(".attn.bias", ".attn.masked_bias"),
    aliases=MappingProxyType(
        {"gpt2": "124m", "small": "124m", "117m": "124m", "355m": "medium", "774m": "large", "1.5b": "xl"}
    ),
    std_name="initializer_range",
    residual_endings=(".c_proj.weight",),
    has_padding_row=False,
)
