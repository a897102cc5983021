"""ViT: Vision Transformers (Dosovitskiy et al., 2021), table 1, with patches of 16 x 16."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from albireo.models.family import Family, Size

__all__ = ["VIT"]


def _shape(width: int, layers: int, heads: int, **more: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            **more,
        }
    )


VIT = Family(
    name="vit",
    sizes=MappingProxyType(
        {
            # Small pictures in small patches: what a laptop learns within minutes, from random weights.
            "tiny": Size(None, _shape(128, 4, 4, image_size=64, patch_size=8, intermediate_size=256)),
            "small": Size("WinKawaks/vit-small-patch16-224", _shape(384, 12, 6)),
            "base": Size("google/vit-base-patch16-224-in21k", _shape(768, 12, 12)),
            "large": Size("google/vit-large-patch16-224-in21k", _shape(1024, 24, 16)),
        }
    ),
    model_class="ViTForImageClassification",
    config_class="ViTConfig",
    backbone_name="vit",
    head_name="classifier",
    blocks_name="vit.layers",
    older_blocks_name="vit.encoder.layer",
    shared_config=MappingProxyType(
        {
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "hidden_act": "gelu",
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "qkv_bias": True,
        }
    ),
    dropout_names=("hidden_dropout_prob",),
    no_dropout_names=("attention_probs_dropout_prob",),
    # A backbone that was saved by itself.
    prefixes=MappingProxyType({"embeddings.": "vit.embeddings.", "layernorm.": "vit.layernorm."}),
    # Files keep the names of before.
    renames=MappingProxyType(
        {
            "encoder.layer.": "layers.",
            ".attention.attention.query.": ".attention.q_proj.",
            ".attention.attention.key.": ".attention.k_proj.",
            ".attention.attention.value.": ".attention.v_proj.",
            ".attention.output.dense.": ".attention.o_proj.",
            ".intermediate.dense.": ".mlp.fc1.",
            ".output.dense.": ".mlp.fc2.",
        }
    ),
    lora_targets=("q_proj", "v_proj"),
    older_lora_targets=("query", "value"),
    # It summed up the picture where the model was trained for more than the head here.
    obsolete_names=("pooler.dense.weight", "pooler.dense.bias", "vit.pooler.dense.weight", "vit.pooler.dense.bias"),
    aliases=MappingProxyType(
        {"b": "base", "b/16": "base", "base-patch16-224": "base", "l": "large", "l/16": "large", "s": "small"}
    ),
    std_name="initializer_range",
    drawn_names=("cls_token", "position_embeddings"),
    has_padding_row=True,
)
