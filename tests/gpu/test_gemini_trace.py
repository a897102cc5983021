"""A step's timeline on a GPU: times are the device's own, and nothing of the training changes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from albireo.booster import Booster
from albireo.data import RandomTokens
from albireo.distributed import join_world
from albireo.memory.tracing import Timeline, describe_trace, read_trace
from albireo.models import build_model, configure_model, resolve_model
from albireo.optim import adamw, decay_groups
from albireo.plugins import GeminiPlugin
from albireo.training.causal_lm import CausalLanguageModel

pytestmark = pytest.mark.gpu


def trained(trace: Path | None, max_norm: float) -> list[torch.Tensor]:
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    config.num_hidden_layers = 4
    model = build_model(choice, config, init="random", seed=0, device="cpu")
    optimizer = adamw(decay_groups(model.named_parameters(), 0.01), 1e-3)
    plugin = GeminiPlugin(
        min_chunk_size_m=0.05, precision="bf16", offload_optim_frac=1.0, offload_param_frac=1.0, trace=trace
    )
    booster = Booster(plugin=plugin, world=join_world(single=True))
    boosted, stepped, *_ = booster.boost(CausalLanguageModel(model, choice.family), optimizer)
    for number in range(6):
        rows = RandomTokens(4096, 64, 4096, 0).__getitems__(range(4 * number, 4 * number + 4))
        ids = torch.stack([row["input_ids"] for row in rows]).pin_memory()
        booster.train_step(boosted, stepped, [{"input_ids": ids, "labels": ids}], [252], max_norm=max_norm)
    return [parameter.detach().cpu().clone() for parameter in plugin.readable_weights(boosted)]


def check_times(timeline: Timeline) -> None:
    assert 0 < timeline.seconds < 60
    for before, after in zip(timeline.spans, timeline.spans[1:], strict=False):
        assert before.begin_seconds <= before.end_seconds == after.begin_seconds
    for work in timeline.works:
        assert work.end_seconds is None or work.begin_seconds <= work.end_seconds <= timeline.seconds
    # A lane's works run one after another.
    for lane in ("to device", "to host"):
        ended = [work for work in timeline.works if work.lane == lane and work.end_seconds is not None]
        for one, other in itertools.pairwise(ended):
            assert one.end_seconds is not None
            assert one.end_seconds <= other.begin_seconds + 1e-4
    # The host's clock and the device's agree, to what the host takes to see an event: a step of a chunk begins when its
    # gradient is there, or else is the step before's, which has ended when the chunk is on its way.
    tolerance = 2e-3
    stepped = [work for work in timeline.works if work.kind == "host step"]
    assert stepped
    for step in stepped:
        of_chunk = [work for work in timeline.works if work.chunk == step.chunk]
        gone = [w.end_seconds for w in of_chunk if w.kind == "gradient out"]
        came = [w.begin_seconds for w in of_chunk if w.kind == "weights in"]
        latest = max((timeline.seconds if end is None else end for end in gone), default=0.0)
        is_this_steps = step.begin_seconds >= latest - tolerance
        is_the_one_befores = step.end_seconds is not None and step.end_seconds <= min(came) + tolerance
        assert is_this_steps or is_the_one_befores, (step, gone, came)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_traced_step_has_the_devices_own_times_and_the_same_numbers(max_norm: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = trained(None, max_norm)
    weights = trained(tmp_path, max_norm)
    assert all(torch.equal(one, other) for one, other in zip(plain, weights, strict=True))
    timeline = read_trace(tmp_path)
    assert not timeline.is_simulated
    assert {work.kind for work in timeline.works} >= {"weights in", "gradient out", "host step"}
    assert max(reading.device_peak_bytes for reading in timeline.memory) >= max(
        reading.device_bytes for reading in timeline.memory
    )
    check_times(timeline)
    assert describe_trace(timeline)
