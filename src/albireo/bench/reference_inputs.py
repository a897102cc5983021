"""What references are given: the model with the weights that ours begins with, and the very batches, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from albireo.adapters import LoraPlan, attach_lora
from albireo.bench.case import Case
from albireo.bench.ours import options_of
from albireo.data import BatchLayout, PictureBatch, RandomTokens, samples_at
from albireo.distributed import World
from albireo.models import FAMILIES, build_model, configure_model, enable_activation_checkpointing, resolve_model
from albireo.training.language_data import RANDOM_BLOCKS
from albireo.training.plan import plan_run
from albireo.training.progress import Progress
from albireo.training.recipes import recipe_of
from albireo.training.recipes.vit.data import PictureRunData
from albireo.training.start import resolved_config

__all__ = ["Inputs", "ReferenceInputs", "reference_inputs"]

Inputs = Callable[[int], dict[str, torch.Tensor]]


class ReferenceInputs(NamedTuple):
    """What a loop by hand needs.

    Attributes:
        model: a transformers model on the device, whose output has the mean loss.
        inputs: returns the arguments of the forward of a step, given its number from 0.
    """

    model: PreTrainedModel
    inputs: Inputs


def reference_inputs(case: Case, world: World) -> ReferenceInputs:
    """Build the model of a case, and make this rank's batches.

    Args:
        case: what is measured.
        world: the ranks that share the batches.
    """
    layout = BatchLayout(case.batch_size, rank=world.rank, world_size=world.world_size)
    made = (_of_pictures if case.recipe == "vit" else _of_tokens)(case, layout, world.device)
    if case.checkpointing:
        enable_activation_checkpointing(made.model, preserve_rng_state=False)
    return made


def _of_tokens(case: Case, layout: BatchLayout, device: torch.device) -> ReferenceInputs:
    choice = resolve_model(case.model, FAMILIES[case.recipe])
    config, _ = configure_model(choice, init="random", sequence_length=case.sequence_length)
    model = build_model(choice, config, init="random", seed=case.seed, device=device)
    if case.adapter == "lora":
        # peft's own layers, as its users have them.
        attach_lora(
            model, LoraPlan(rank=8, alpha=16.0, dropout=0.0, targets=choice.family.lora_targets), seed=case.seed
        )
    model.config.use_cache = False
    data = RandomTokens(RANDOM_BLOCKS, case.sequence_length, model.config.vocab_size, case.seed)

    def inputs(number: int) -> dict[str, torch.Tensor]:
        first = number * layout.samples_per_step + layout.offset(0)
        rows = samples_at(first, case.batch_size, RANDOM_BLOCKS, case.seed)
        ids = torch.stack([data[int(row)]["input_ids"] for row in rows]).to(device, non_blocking=True)
        return {"input_ids": ids, "labels": ids}

    return ReferenceInputs(model, inputs)


def _of_pictures(case: Case, layout: BatchLayout, device: torch.device) -> ReferenceInputs:
    # Nothing is written: the folder is only planned.
    config = resolved_config(
        plan_run(
            recipe="vit", options={**options_of(case), "plugin": "torch_ddp", "compile": False}, output=Path("run")
        )
    )
    recipe = recipe_of("vit")
    planned = recipe.plan(config)
    data = recipe.load_data(config, planned, Progress(enabled=False))
    if not isinstance(data, PictureRunData):
        raise TypeError(f"expected pictures, not a {type(data).__name__}")
    model, _ = planned.build(data, config, device)
    # Made before the first step, as workers of a loader would have.
    steps = data.steps(layout, seed=case.seed, steps=case.warmup + case.steps, pin=False)
    batches = [batch for (batch,) in steps]
    form = data.form

    def inputs(number: int) -> dict[str, torch.Tensor]:
        batch = batches[number]
        if not isinstance(batch, PictureBatch):
            raise TypeError(f"expected a batch of pictures, not a {type(batch).__name__}")
        there = batch.to(device, non_blocking=True)
        return {"pixel_values": form.normalised(there.pixel_values), "labels": there.labels}

    return ReferenceInputs(model, inputs)
