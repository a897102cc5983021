"""Gemini on a GPU: the numbers do not depend on where chunks are, and a cap holds by the driver's own count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from albireo.booster import Booster
from albireo.data import RandomTokens
from albireo.distributed import join_world
from albireo.models import build_model, configure_model, enable_activation_checkpointing, resolve_model
from albireo.optim import adamw, decay_groups
from albireo.plugins import GeminiPlugin
from albireo.training.causal_lm import CausalLanguageModel

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # The other kernels of attention add in no fixed order in backward.
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(mode=False)


def trained(steps: int = 5, accumulate: int = 1, max_norm: float = 1.0, **options: Any) -> dict[str, Any]:
    world = join_world(single=True)
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    config.num_hidden_layers = 4
    model = build_model(choice, config, init="random", seed=0, device="cpu")
    enable_activation_checkpointing(model, preserve_rng_state=False)
    optimizer = adamw(decay_groups(model.named_parameters(), 0.01), 1e-3)
    booster = Booster(plugin=GeminiPlugin(min_chunk_size_m=0.05, initial_scale=2.0**10, **options), world=world)
    boosted, stepped, *_ = booster.boost(CausalLanguageModel(model, choice.family), optimizer)
    losses = []
    for number in range(steps):
        batches = []
        for micro in range(accumulate):
            first = 4 * (number * accumulate + micro)
            rows = RandomTokens(4096, 64, 4096, 0).__getitems__(range(first, first + 4))
            ids = torch.stack([row["input_ids"] for row in rows]).pin_memory()
            batches.append({"input_ids": ids, "labels": ids})
        output = booster.train_step(boosted, stepped, batches, [252] * accumulate, max_norm=max_norm)
        losses.append([float(output.loss), float(output.grad_norm)])
    boosted.flush()
    weights = {id(fragment.parameter): fragment.master.detach().cpu().clone() for fragment in boosted.fragments}
    order = [id(parameter) for parameter in boosted.unwrap().parameters()]
    return {"losses": losses, "weights": [weights[key] for key in order], "gemini": boosted.gemini}


# Where Adam runs on one side, nothing else may matter.
ON_THE_HOST = {
    "weights stay": {"offload_optim_frac": 1.0},
    "half of them": {"offload_optim_frac": 1.0, "offload_param_frac": 0.5},
    "all travel": {"offload_optim_frac": 1.0, "offload_param_frac": 1.0},
    "no prefetch": {"offload_optim_frac": 1.0, "offload_param_frac": 1.0, "max_prefetch": 0},
}
ON_THE_DEVICE = {
    "static": {"placement_policy": "static"},
    "weights travel": {"offload_param_frac": 1.0},
    "automatic": {},
}


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ways", [ON_THE_HOST, ON_THE_DEVICE], ids=["host", "device"])
def test_where_chunks_are_changes_no_bit(
    ways: dict[str, dict[str, Any]], precision: str, accumulate: int, max_norm: float
) -> None:
    results = {
        name: trained(precision=precision, accumulate=accumulate, max_norm=max_norm, **how)
        for name, how in ways.items()
    }
    first, *others = results.values()
    assert len({loss for loss, _ in first["losses"]}) == len(first["losses"])
    for name, other in zip(list(results)[1:], others, strict=True):
        assert other["losses"] == first["losses"], name
        assert all(map(torch.equal, other["weights"], first["weights"])), name


def test_where_everything_fits_nothing_moves() -> None:
    gemini = trained(precision="bf16")["gemini"]
    assert gemini.placement.traffic_bytes == 0
    assert {chunk.states_place for chunk in gemini.chunks} == {"device"}
    assert {chunk.home_place for chunk in gemini.chunks} == {"storage"}


def test_what_is_away_takes_no_memory() -> None:
    taken = {}
    for name in ("weights stay", "all travel"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        kept = trained(precision="bf16", **ON_THE_HOST[name])
        torch.cuda.synchronize()
        taken[name] = torch.cuda.memory_allocated() - before
        del kept
    assert taken["all travel"] < taken["weights stay"] / 4
