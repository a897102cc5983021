"""The cells of the equality matrix: plugin, precision, clipping, accumulation and model, each verified step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from albireo.adapters import LoraPlan, attach_adapter
from albireo.booster import Booster
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.models import FAMILIES
from albireo.optim import HybridAdam, decay_groups
from albireo.plugins import GeminiPlugin, LowLevelZeroPlugin, Plugin, TorchDDPPlugin, TorchFSDPPlugin
from albireo.training.causal_lm import CausalLanguageModel
from albireo.verify import Verifier

Cell = dict[str, Any]

VOCABULARY, LENGTH, STEPS = 96, 12, 2
# The smallest model has two blocks, of which one may be frozen; there are two steps.
LEAST_COMPARED = 2 * 16

PLUGINS: Mapping[str, Callable[..., Plugin]] = {
    # A branch that a rank leaves out has no gradient there, which DDP must be told to look for.
    "ddp": lambda precision: TorchDDPPlugin(precision=precision, find_unused_parameters=True),
    "fsdp": lambda precision: TorchFSDPPlugin(precision=precision),
    "zero1": lambda precision: LowLevelZeroPlugin(stage=1, precision=precision, **SMALL),
    "zero2": lambda precision: LowLevelZeroPlugin(stage=2, precision=precision, **SMALL),
    "zero2_offload": lambda precision: LowLevelZeroPlugin(stage=2, precision=precision, cpu_offload=True, **SMALL),
    "gemini": lambda precision: GeminiPlugin(precision=precision, **CHUNKS),
    "gemini_capped": lambda precision, cap_bytes=None: GeminiPlugin(
        precision=precision, mem_cap_bytes=cap_bytes or CAP_BYTES[precision], **CHUNKS
    ),
    "gemini_half": lambda precision: GeminiPlugin(
        precision=precision, offload_optim_frac=0.5, offload_param_frac=0.5, shard_param_frac=0.5, **CHUNKS
    ),
    "gemini_away": lambda precision: GeminiPlugin(
        precision=precision, offload_optim_frac=1.0, offload_param_frac=1.0, max_prefetch=0, **CHUNKS
    ),
}
# Several buckets, each over several parameters; a scale that does not overflow at once.
SMALL: dict[str, Any] = {"reduce_bucket_size_in_m": 0.01, "initial_scale": 2.0**10}

CHUNKS: dict[str, Any] = {"min_chunk_size_m": 0.004, "initial_scale": 2.0**10}
# Of what chunks take on the simulated device: not enough for all, whatever the model.
CAP_BYTES = {"fp32": 150_000, "bf16": 100_000, "fp16": 100_000}
# A GPU's driver takes most of this, and its allocator counts in 2 MB: all of these models fits into what is left.
GPU_CAP_BYTES = 2**30

AXES: dict[str, list[Any]] = {
    "plugin": list(PLUGINS),
    "precision": ["fp32", "bf16", "fp16"],
    "clip": [0.0, 0.3],
    "accumulate": [1, 4],
    "model": ["tied", "untied", "frozen", "unused", "padded", "quantised"],
}


def cells() -> list[Cell]:
    """Return all cells of a world size."""
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def pairwise_cells() -> list[Cell]:
    """Return some cells in which each two values of two axes come together at least once; the same in every run."""

    def pairs(cell: Cell) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
        return itertools.combinations(cell.items(), 2)

    left = {pair for cell in cells() for pair in pairs(cell)}
    chosen = []
    while left:
        best = max(cells(), key=lambda cell: sum(pair in left for pair in pairs(cell)))
        chosen.append(best)
        left.difference_update(pairs(best))
    return chosen


def name_of(cell: Cell) -> str:
    """Return a cell's name."""
    clip = "clip" if cell["clip"] else "noclip"
    return f"{cell['plugin']}-{cell['precision']}-{clip}-x{cell['accumulate']}-{cell['model']}"


class _SometimesUsed(nn.Module):
    """A language model with a branch that some batches take, and one that none does."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.branch = nn.Linear(width, VOCABULARY)
        self.never = nn.Linear(3, 5)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, *, branch: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.model.model.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden)
        if branch:
            logits = logits + self.branch(hidden)
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return loss, (labels[:, 1:] >= 0).sum()


def _build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = _model(kind)
    model.train()
    return model, HybridAdam(decay_groups(model.named_parameters(), 0.1), lr=1e-2)


def _model(kind: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    if kind == "padded":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2,
        max_position_embeddings=LENGTH, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        layerdrop=0.0, tie_word_embeddings=kind != "untied", use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    if kind == "unused":
        return _SometimesUsed(model, 32)
    if kind == "quantised":
        every = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
        attach_adapter(model, LoraPlan(rank=4, alpha=8.0, dropout=0.0, targets=every, base="int8"), seed=5)
    if kind == "frozen":
        model.model.decoder.layers[0].requires_grad_(requires_grad=False)
        model.model.decoder.embed_positions.requires_grad_(requires_grad=False)
    return CausalLanguageModel(model, FAMILIES["opt"])


def _batches(kind: str, step: int, rank: int, accumulate: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank)
    batches = []
    for number in range(accumulate):
        ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=generator)
        labels = ids.clone()
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
        # Ragged counts in every model: a mean of means shows.
        short = (step + 2 * rank + number) % 5
        labels[0, LENGTH - short :] = -100
        if kind == "padded":
            ids[0, LENGTH - short :] = 0
            mask = torch.ones_like(ids)
            mask[0, LENGTH - short :] = 0
            batch["attention_mask"] = mask
        if kind == "unused":
            # In the first step nobody takes the branch, in the second the main rank alone.
            batch["branch"] = step == 1 and rank == 0
        batches.append(batch)
    return batches


def run_cell(world: World, cell: Cell, *, on_gpu: bool = False) -> dict[str, Any]:
    """Verify a cell, on every rank; a cell that is refused says why."""
    torch.set_num_threads(1)
    device = world.device if on_gpu else torch.device("cpu")
    world = World(world.rank, world.world_size, world.local_rank, device)
    kind = cell["model"]
    try:
        capped = {"cap_bytes": GPU_CAP_BYTES} if on_gpu and cell["plugin"] == "gemini_capped" else {}
        booster = Booster(plugin=PLUGINS[cell["plugin"]](cell["precision"], **capped), world=world)
        model, optimizer = _build(kind)
        boosted, wrapped, *_ = booster.boost(model, optimizer)
    except ConfigError as error:
        return {"refused": str(error)}
    verifier = Verifier(booster, boosted, wrapped, lambda: _build(kind))
    worst, compared, failures = 0.0, 0, []
    for step in range(STEPS):
        batches = [_batches(kind, step, rank, cell["accumulate"]) for rank in range(world.world_size)]
        report = verifier.step(batches, max_norm=cell["clip"])
        worst = max(worst, report.max_relative_error)
        compared += len(report.parameters)
        failures += [f"step {step}: {failure}" for failure in report.failures]
    return {"worst": worst, "compared": compared, "failures": failures}


def run_cells(world: World, cells: list[Cell], *, on_gpu: bool = False) -> list[dict[str, Any]]:
    """Verify many cells."""
    return [run_cell(world, cell, on_gpu=on_gpu) for cell in cells]


def complaints(chosen: list[Cell], results: list[list[dict[str, Any]]]) -> list[str]:
    """Return a line for each cell that did not pass.

    Args:
        chosen: the cells that ran.
        results: what `run_cells` gave, by rank.
    """
    lines = []
    for number, cell in enumerate(chosen):
        lines += [f"{name_of(cell)}, rank {rank}: {found}" for rank, found in _bad([r[number] for r in results])]
    return lines


def _bad(results: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    for rank, result in enumerate(results):
        if "refused" in result:
            yield rank, f"refused: {result['refused']}"
        elif result["failures"]:
            yield rank, f"{len(result['failures'])} failures, the first: {result['failures'][0]}"
        elif result["compared"] < LEAST_COMPARED:
            yield rank, f"only {result['compared']} gradients were compared"
