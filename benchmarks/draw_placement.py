"""Draw what a placement does with a device's memory, use by use, from the memory that a real warm-up step saw.

    python benchmarks/draw_placement.py benchmarks/results/2026-11-25-h100-gemini/opt-2.7b-warm-up.json \
        --caps 40,17,8 --output docs/images/gemini-memory.png

The model's chunks are laid out as training lays them out, and placed by the same functions, for each cap; what is beside
model data (activations, logits in pieces, gradients in passing) is what was measured. Below each picture: which chunks'
weights are on the device, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from albireo.memory.budget import Trace, Use, chunks_present
from albireo.memory.layout import ParameterFacts, UnitFacts, plan_chunks
from albireo.memory.planner import MemoryLimits, PlacementPolicy, Planner
from albireo.memory.sizes import ChunkSizes
from albireo.memory.units import find_units
from albireo.models import configure_model, resolve_model
from albireo.sharding import FlatLayout
from albireo.training.causal_lm import CausalLanguageModel

mpl.use("Agg")

_GB = 2**30
_CHUNK_ELEMENTS = 32 * 2**20
# What the driver takes for a process, and what a plan leaves: see device/cap.py and plugins/gemini.py.
_OUTSIDE_GB, _LEFT_GB = 0.9, 0.7


def main() -> None:
    """Read, place, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("warm_up", type=Path)
    parser.add_argument("--caps", default="40,17,8")
    parser.add_argument("--output", type=Path, default=Path("gemini-memory.png"))
    arguments = parser.parse_args()
    seen = json.loads(arguments.warm_up.read_text())
    sizes, orders = _layout(seen["model"])
    trace = _trace(orders, seen["other_gb"])
    caps = [float(cap) for cap in arguments.caps.split(",")]
    _draw(seen, sizes, orders, trace, caps, arguments.output)


def _layout(model_name: str) -> tuple[list[ChunkSizes], list[list[int]]]:
    choice = resolve_model(model_name)
    config, _ = configure_model(choice, init="random")
    units = find_units(CausalLanguageModel(choice.family.make_model(config), choice.family))
    parameters = [parameter for unit in units for parameter in unit.parameters]
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    plans = plan_chunks(
        [ParameterFacts(parameter.numel(), "trained") for parameter in parameters],
        [UnitFacts(unit.name, tuple(numbers[p] for p in unit.parameters)) for unit in units],
        root=len(units) - 1,
        chunk_elements=_CHUNK_ELEMENTS,
    )
    sizes = [
        ChunkSizes(
            FlatLayout.of([parameters[place].shape for place in plan.parameters], 1).numel,
            1,
            torch.bfloat16,
            trained=True,
            is_root=plan.is_root,
        )
        for plan in plans
    ]
    return sizes, [[n for n, plan in enumerate(plans) if unit in plan.units] for unit in range(len(units))]


def _trace(orders: list[list[int]], others: list[tuple[str, float]]) -> Trace:
    root, blocks = frozenset(orders[-1]), orders[:-1]
    needs = [root, *(root | set(block) for block in blocks), root, *(root | set(block) for block in reversed(blocks))]
    needs.append(frozenset())
    if len(needs) != len(others):
        raise SystemExit(f"the file has {len(others)} uses, and the model {len(needs)}")
    return tuple(
        Use(frozenset(chunks), int(gb * _GB), phase)  # type: ignore[arg-type]
        for chunks, (phase, gb) in zip(needs, others, strict=True)
    )


def _draw(
    seen: dict[str, object],
    sizes: list[ChunkSizes],
    orders: list[list[int]],
    trace: Trace,
    caps: list[float],
    output: Path,
) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(caps), figsize=(5.2 * len(caps), 7), height_ratios=(2, 1.3), sharex=True, layout="constrained"
    )
    for column, cap in enumerate(caps):
        room = int((cap - _OUTSIDE_GB - _LEFT_GB) * _GB)
        planner = Planner(sizes, orders, PlacementPolicy(), MemoryLimits(room, None))
        placement = planner.place(trace, accumulates=False)
        chunks = [size.bytes(accumulates=False) for size in sizes]
        travelling = chunks_present(trace, placement.resident, placement.keeps, placement.fetches)
        present = [here | placement.resident for here in travelling]
        x = np.arange(len(trace))
        weights = np.array([sum(chunks[n].weights for n in here) for here in present]) / _GB
        states = np.full(len(trace), sum(chunks[n].states for n in placement.states_on_device) / _GB)
        other = np.array([use.other_bytes for use in trace]) / _GB
        done: set[int] = set()
        gradients = []
        for use in trace:
            if use.phase == "backward":
                done |= use.chunks
            gradients.append(sum(chunks[n].gradients for n in done & placement.states_on_device) / _GB)
        top = axes[0, column]
        top.stackplot(
            x, weights, states, gradients, other, step="mid",
            labels=("weights", "fp32 weights and states", "gradients kept", "activations and the rest, measured"),
            colors=("#2f6db3", "#1b9e77", "#d95f02", "#c7c7c7"),
        )  # fmt: skip
        top.axhline(cap, color="black", linewidth=1, linestyle="--")
        top.set_title(f"--mem-cap {cap:g}: {placement.traffic_bytes / _GB:.1f} GB moved a step")
        top.set_ylim(0, cap * 1.08)
        table = np.zeros((len(sizes), len(trace)))
        for number, here in enumerate(present):
            for chunk in here:
                table[chunk, number] = 1 + (chunk in placement.resident)
        below = axes[1, column]
        below.imshow(table, aspect="auto", interpolation="nearest", cmap=mpl.colors.ListedColormap(["white", "#8fbbe6", "#2f6db3"]), vmin=0, vmax=2)  # fmt: skip
        below.set_xlabel("use: forward, backward, step")
    axes[0, 0].set_ylabel("GB on the device")
    axes[1, 0].set_ylabel("chunk: dark stays, light comes and goes")
    axes[0, 0].legend(loc="upper left", fontsize=8)
    figure.suptitle(
        f"OPT-{str(seen['model']).upper()}, batch {seen['batch_size']}, {seen['precision']}, {seen['device']}: one step"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    main()
