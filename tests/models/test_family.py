from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from albireo.errors import ModelError
from albireo.models import FAMILIES, OPT, count_parameters, family_of


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("6.7", "6.7b"),
        ("6.7b", "6.7b"),
        ("6.7B", "6.7b"),
        ("13", "13b"),
        ("OPT-1.3B", "1.3b"),
        ("opt-tiny", "tiny"),
        (" 350M ", "350m"),
        ("125", "125m"),
        ("facebook/opt-125m", None),
        ("./tiny", None),
        ("", None),
        ("b", None),
        ("tin", None),
        ("7b", None),
        ("66", "66b"),
    ],
)
def test_sizes_are_known_as_people_type_them(typed: str, size: str | None) -> None:
    assert OPT.parse_size(typed) == size


def test_an_unknown_size_lists_the_known() -> None:
    with pytest.raises(ModelError, match="tiny, 125m"):
        OPT.config_for("7b")


def test_dropout_is_the_users() -> None:
    config = OPT.config_for("tiny", dropout=0.25, vocab_size=77)
    assert (config.dropout, config.attention_dropout, config.layerdrop, config.vocab_size) == (0.25, 0.0, 0.0, 77)


def test_an_unsupported_type_names_the_supported() -> None:
    with pytest.raises(ModelError, match=r"'bert' are not supported: expected one of opt"):
        family_of("bert")
    assert family_of("opt") is FAMILIES["opt"] is OPT


def test_parts_are_found(trained: PreTrainedModel) -> None:
    assert OPT.backbone(trained) is trained.model
    assert OPT.head(trained) is trained.lm_head
    blocks = OPT.blocks(trained)
    assert [name for name, _ in blocks] == ["model.decoder.layers.0", "model.decoder.layers.1"]
    assert all(trained.get_submodule(name) is block for name, block in blocks)


def test_a_head_that_is_no_linear_layer_is_refused(trained: PreTrainedModel) -> None:
    model = OPT.make_model(trained.config)
    model.lm_head = nn.Identity()
    with pytest.raises(ModelError, match=r"is a Identity: expected a torch\.nn\.Linear"):
        OPT.head(model)


def test_a_model_is_made_without_memory_and_without_random_numbers() -> None:
    state = torch.get_rng_state()
    model = OPT.make_model(OPT.config_for("175b"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert torch.equal(torch.get_rng_state(), state)


def test_the_length_of_a_text_is_limited_by_positions() -> None:
    assert OPT.max_sequence_length(OPT.config_for("125m")) == 2048


def test_parameters_are_counted_as_they_are(trained: PreTrainedModel) -> None:
    assert count_parameters(trained.config) == sum(parameter.numel() for parameter in trained.parameters())


@pytest.mark.parametrize(
    ("size", "batch_size", "seconds", "teraflops"), [("2.7b", 16, 0.627, 428), ("6.7b", 8, 0.765, 436)]
)
def test_flops_are_counted_as_in_the_published_measurements(
    size: str, batch_size: int, seconds: float, teraflops: float
) -> None:
    """Sequence 1024 on one H200: 6 x parameters x tokens, plus causal attention."""
    per_token = OPT.flops_per_token(OPT.config_for(size), 1024)
    assert per_token * batch_size * 1024 / seconds / 1e12 == pytest.approx(teraflops, rel=3e-3)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_unpadded_text_attends_causally_without_a_cache(trained: PreTrainedModel) -> None:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        output = OPT.backbone(trained)(**OPT.forward_arguments(ids))
        shorter = OPT.backbone(trained)(**OPT.forward_arguments(ids[:, :6]))
    assert output.past_key_values is None
    torch.testing.assert_close(output.last_hidden_state[:, :6], shorter.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="OPT reads a mask of ones on the host in older versions"
)
def test_unpadded_text_needs_no_mask_and_nothing_read_by_the_host(trained: PreTrainedModel) -> None:
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad(), _Operations() as operations:
        OPT.backbone(trained)(**OPT.forward_arguments(ids))
    assert not operations.names & {"aten._local_scalar_dense.default", "aten.cumsum.default", "aten.all.default"}
