"""Gemini on the simulated device: wherever weights and states are, and whatever moves, no bit of a training changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, Boosted, boosted, everything, gemini, groups, least_bytes, left, quick_kernel, train
from gemini_zoo import KINDS, built
from tiny_models import small_opt
from torch import nn

from albireo import LazyInitContext
from albireo.booster import Booster
from albireo.errors import ConfigError
from albireo.optim import HybridAdam
from albireo.plugins import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin

# Adam has the same bits on both sides here, so that shares of states can be compared with one another too.
STATIC = {
    f"states {states:g} weights {weights:g}": {"offload_optim_frac": states, "offload_param_frac": weights}
    for states in (0.0, 0.5, 1.0)
    for weights in (0.0, 0.5, 1.0)
}
AWAY = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
ALL_WAYS: dict[str, dict[str, Any]] = {
    **STATIC,
    "auto": {},
    "no room beyond the least": {"cap": 1.0},
    "no room, no prefetch": {"cap": 1.0, "max_prefetch": 0},
    "little": {"cap": 1.5},
    "little, no prefetch": {"cap": 1.5, "max_prefetch": 0},
    "room for all": {"cap": 100.0},
    "no prefetch": {**AWAY, "max_prefetch": 0},
    "far prefetch": {**AWAY, "max_prefetch": 9},
    "a chunk for each parameter": {**AWAY, "min_chunk_size_m": 1e-9},
    "one chunk a unit": {"offload_param_frac": 1.0, "min_chunk_size_m": 1.0},
    "away under a cap": {**AWAY, "cap": 1.5},
}
SOME_WAYS = [
    "states 0 weights 1", "states 0.5 weights 0.5", "states 1 weights 1", "auto", "no room beyond the least", "little",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_kernel():
        yield


def plugin_of(way: str, kind: str, accumulate: int, **options: Any) -> GeminiPlugin:
    how = dict(ALL_WAYS[way])
    if "cap" in how:
        share = how.pop("cap")
        how["mem_cap_bytes"] = int(least_bytes(kind, accumulate=accumulate, **options) * share)
    return gemini(**{**how, **options, **{key: how[key] for key in ("min_chunk_size_m",) if key in how}})


def reference(kind: str, precision: str, accumulate: int, clip: float) -> dict[str, Any]:
    """What another plugin makes of it, to the bit; in bf16 ZeRO keeps weights in halves, so Gemini's own."""
    plugin = {
        "fp32": TorchDDPPlugin(),
        "fp16": LowLevelZeroPlugin(precision="fp16", initial_scale=2.0**8),
        "bf16": gemini(precision="bf16", placement_policy="static"),
    }[precision]
    return everything(plugin, kind, accumulate=accumulate, clip=clip)


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (1, 0.5), (3, 0.5)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_where_chunks_are_changes_no_bit(precision: str, accumulate: int, clip: float) -> None:
    wanted = reference("opt", precision, accumulate, clip)
    assert len(set(wanted["numbers"])) == len(wanted["numbers"])
    for way in ALL_WAYS:
        plugin = plugin_of(way, "opt", accumulate, precision=precision)
        assert everything(plugin, "opt", accumulate=accumulate, clip=clip) == wanted, way


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opt"])
def test_every_kind_of_model_keeps_its_bits(kind: str, precision: str) -> None:
    wanted = reference(kind, precision, 2, 0.5)
    for key in [key for key in wanted["left"] if key.startswith("optimizer/") and key.endswith("/empty@0")]:
        del wanted["left"][key]  # what has no elements has no states
    for way in SOME_WAYS:
        plugin = plugin_of(way, kind, 2, precision=precision)
        assert everything(plugin, kind, accumulate=2, clip=0.5) == wanted, way
