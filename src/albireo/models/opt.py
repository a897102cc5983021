"""OPT: Open Pre-trained Transformer language models (Zhang et al., 2022), table 1."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from albireo.models.family import Family, Size

__all__ = ["OPT"]


def _shape(width: int, layers: int, heads: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": 4 * width,
            "word_embed_proj_dim": width,
            **more,
        }
    )


# Alone among the sizes, 350m normalises after each half of a block, has no norm at the end, and looks words up in
# 512 dimensions, which two projections widen and narrow.
_350M = _shape(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)

OPT = Family(
    name="opt",
    sizes=MappingProxyType(
        {
            "tiny": Size(None, _shape(128, 2, 4, vocab_size=4096), fits_vocabulary=True),
            "125m": Size("facebook/opt-125m", _shape(768, 12, 12)),
            "350m": Size("facebook/opt-350m", _350M),
            "1.3b": Size("facebook/opt-1.3b", _shape(2048, 24, 32)),
            "2.7b": Size("facebook/opt-2.7b", _shape(2560, 32, 32)),
            "6.7b": Size("facebook/opt-6.7b", _shape(4096, 32, 32)),
            "13b": Size("facebook/opt-13b", _shape(5120, 40, 40)),
            "30b": Size("facebook/opt-30b", _shape(7168, 48, 56)),
            "66b": Size("facebook/opt-66b", _shape(9216, 64, 72)),
            "175b": Size(None, _shape(12288, 96, 96)),  # Meta gives these weights out on request only
        }
    ),
    model_class="OPTForCausalLM",
    config_class="OPTConfig",
    backbone_name="model",
    head_name="lm_head",
    blocks_name="model.decoder.layers",
    shared_config=MappingProxyType(
        {
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "init_std": 0.02,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "tie_word_embeddings": True,
        }
    ),
    dropout_names=("dropout",),
    no_dropout_names=("attention_dropout", "layerdrop"),
    prefixes=MappingProxyType({"decoder.": "model.decoder."}),
    lora_targets=("q_proj", "v_proj"),
    obsolete_names=("model.decoder.version",),
)
