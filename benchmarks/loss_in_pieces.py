"""Does the loss in pieces change what is learnt? The same training with it and with all logits, curve against curve.

    python benchmarks/loss_in_pieces.py --model 125m --tokenizer TOKENIZER --data wiki.test.raw --precision bf16 \
        --steps 100 --batch-size 8 --learning-rate 6e-4 --output curves-bf16

Every run begins from the same random weights and sees the same batches, through Booster and TorchDDPPlugin:

    pieces       albireo's CausalLanguageModel, whose loss never holds all logits
    plain        the transformers model's own loss, over all logits
    reordered    plain again, with the rows of each batch in another order: the same sums, rounded otherwise
    wider        plain again in a wider dtype (fp32 for 16 bits, fp64 for fp32): what the dtype has rounded away

Two runs that differ by rounding alone drift apart, as training is chaotic; how fast, only a run can tell. So the noise
is measured: pieces may differ from plain, at most over all steps, by three times what a reordered or the wider run
does, and by a rounding of the loss itself. It is the most over all steps that is compared, since when the first
rounding is blown up is chance. Reordering alone would say too little of 16 bits: each product's rounding stays the same.
Writes curves.json and curves.png; exits with 1 if the curves differ by more.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from albireo.booster import Booster
from albireo.config import RunConfig
from albireo.data import Batch, BatchLayout, StepLoader
from albireo.device import describe_device
from albireo.distributed import World, join_world
from albireo.errors import AlbireoError
from albireo.log import Log
from albireo.models import enable_activation_checkpointing
from albireo.optim import adamw, decay_groups, scheduler_for, warmup_steps_of
from albireo.plugins import make_plugin
from albireo.training.causal_lm import CausalLanguageModel, inputs_of
from albireo.training.language_data import LanguageData
from albireo.training.language_model import LanguageModelPlan, plan_language_model
from albireo.training.plan import plan_run
from albireo.training.progress import Progress
from albireo.training.recipes.opt.data import load_run_data
from albireo.training.start import resolved_config

_REORDERED_RUNS = 2
_ALLOWED = 3.0
# Relative rounding of a number: half a unit in the last place. Of 16-bit logits, all have it.
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8 / 2}

_Array = NDArray[np.float64]


class _WholeLoss(nn.Module):
    """The plain loss in the dtype of the logits, where transformers' own would compute it in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets != -100).sum()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far two curves lie apart, beside what noise does.

    Attributes:
        passed: whether the difference is noise.
        difference: the largest |pieces - plain| over all steps, in nats per token.
        noise: the largest |other - plain|, of runs that differ from it by rounding alone.
        allowed: what the difference may be.
    """

    passed: bool
    difference: float
    noise: float
    allowed: float


def judge(plain: _Array, pieces: _Array, others: Sequence[_Array], rounding: float) -> Verdict:
    """Say whether a curve differs from another by noise alone.

    Args:
        plain: losses [steps].
        pieces: losses [steps].
        others: of runs that differ from the plain one by rounding alone; each losses [steps].
        rounding: the relative rounding of a loss, which short runs may happen not to show.
    """
    difference = float(np.abs(pieces - plain).max())
    noise = max(float(np.abs(other - plain).max()) for other in others)
    allowed = _ALLOWED * (noise + rounding * float(np.abs(plain).max()))
    # A loss that is not finite is no curve at all: no comparison with it holds.
    return Verdict(passed=difference <= allowed < math.inf, difference=difference, noise=noise, allowed=allowed)


def train(
    config: RunConfig, planned: LanguageModelPlan, data: LanguageData, world: World, *, form: str, order: int = 0
) -> _Array:
    """Train once, and return the loss of every step.

    Args:
        config: a resolved configuration.
        planned: the model.
        data: the text.
        world: one rank.
        form: "pieces", "plain", or "wider" for plain in the next wider dtype.
        order: which order the rows of a batch have; 0 is the usual one.
    """
    pretrained, _ = planned.build(data, config, world.device)
    plugin = config.plugin
    model: nn.Module = pretrained
    if form == "pieces":
        model = CausalLanguageModel(pretrained, planned.family)
    elif form == "wider" and plugin.precision == "fp32":
        model = _WholeLoss(pretrained.double())
    elif form == "wider":
        plugin = dataclasses.replace(plugin, precision="fp32")
    if config.model.checkpointing:
        enable_activation_checkpointing(pretrained, preserve_rng_state=False)
    groups = decay_groups(pretrained.named_parameters(), config.optimizer.weight_decay)
    optimizer = adamw(groups, config.optimizer.learning_rate or 0.0)
    steps = config.schedule.steps or 1
    warmup = warmup_steps_of(config.schedule.warmup, steps)
    scheduler = scheduler_for(optimizer, steps=steps, warmup_steps=warmup, schedule=config.schedule.schedule)
    extra = {"use_cache": False} if model is pretrained else {}
    booster = Booster(plugin=make_plugin(plugin), world=world)
    boosted, wrapped, *_ = booster.boost(model.train(), optimizer)
    losses = []
    for batch in _batches(config, data, order):
        output = booster.train_step(
            boosted,
            wrapped,
            {**inputs_of(batch), **extra},
            batch.tokens,
            lr_scheduler=scheduler,
            max_norm=config.optimizer.clip,
        )
        losses.append(output.loss.double())
    return np.array(torch.stack(losses).tolist(), dtype=np.float64)


def _batches(config: RunConfig, data: LanguageData, order: int) -> Iterator[Batch]:
    """Yield the batch of each step, its rows in the order that is asked for."""
    size = config.optimizer.batch_size or 1
    layout = BatchLayout(batch_size=size, accumulate=1, rank=0, world_size=1)
    seed = config.schedule.seed
    generator = torch.Generator().manual_seed(order)
    for (batch,) in StepLoader(data.train, layout, seed=seed, start_sample=0, steps=config.schedule.steps or 1):
        rows = torch.randperm(size, generator=generator) if order else torch.arange(size)
        yield Batch(batch.input_ids[rows], batch.labels[rows], batch.tokens)


def draw(curves: dict[str, _Array], verdict: Verdict, title: str) -> bytes:
    """Draw the curves, and below them how far each lies from the plain one; a PNG of 1350 x 1050 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # As in a run's loss.png: from the palette of Okabe and Ito.
    colours = {"plain": "#0072B2", "pieces": "#D55E00"}
    figure = Figure(figsize=(9.0, 7.0), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = np.arange(1, len(curves["plain"]) + 1)
    for name, losses in curves.items():
        colour = colours.get(name, "#999999")
        style = {"pieces": "--", "wider": ":"}.get(name, "-")
        above.plot(steps, losses, style, color=colour, linewidth=1.5, label=name, zorder=3 if name in colours else 2)
        if name != "plain":
            apart = np.maximum.accumulate(np.abs(losses - curves["plain"]))
            below.plot(steps, np.where(apart > 0, apart, np.nan), style, color=colour, linewidth=1.5, label=name)
    above.set_title(title, loc="left", fontsize=13, fontweight="bold", color="#333333", parse_math=False)
    above.set_ylabel("loss (nats per token)", fontsize=11, color="#333333")
    above.legend(frameon=False, fontsize=10, labelcolor="#333333")
    below.set_yscale("log")
    below.set_xlabel("step", fontsize=11, color="#333333")
    below.set_ylabel("|difference from plain|,\nlargest so far", fontsize=11, color="#333333")
    below.set_title(_sentence(verdict), loc="left", fontsize=10, color="#333333")
    for axes in (above, below):
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors="#333333", labelsize=10, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _sentence(verdict: Verdict) -> str:
    equal = "equal within the noise" if verdict.passed else "NOT EQUAL"
    return (
        f"pieces and plain differ by {verdict.difference:.1e} at most; noise by {verdict.noise:.1e}, "
        f"allowed {verdict.allowed:.1e}: {equal}"
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--model", default="tiny", help="a size, or a Hugging Face folder")
    parser.add_argument(
        "--init", default="random", choices=["random", "pretrained"], help="where its weights come from"
    )
    parser.add_argument("--data", required=True, help="a text file or a folder of them")
    parser.add_argument(
        "--tokenizer", help="a folder; one is trained on the text, or the model's own taken, without it"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, help="1024; 128 for tiny")
    parser.add_argument("--learning-rate", type=float, help="5e-5; 1e-3 for tiny")
    parser.add_argument("--precision", default="fp32", choices=sorted(_ROUNDING))
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> RunConfig:
    names = [
        "model",
        "tokenizer",
        "data",
        "steps",
        "batch_size",
        "sequence_length",
        "learning_rate",
        "precision",
        "checkpointing",
        "seed",
    ]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.model != "tiny" or options.init == "pretrained":
        given["init"] = options.init
    return resolved_config(plan_run(recipe="opt", options=given))


def compare(options: argparse.Namespace, log: Log) -> Verdict:
    """Train as often as it takes, write what came of it, and judge.

    Args:
        options: as the command line gives them.
        log: told how far it is.
    """
    config = _config(options)
    # fp32 is fp32 here, on a GPU too: the process is this script's own.
    torch.backends.cuda.matmul.allow_tf32 = False
    world = join_world(single=True)
    planned = plan_language_model(config).fetched(config)
    with Progress() as progress:
        data = load_run_data(config, tokenizer=planned.tokenizer, vocab_size=planned.rows, progress=progress)
    curves: dict[str, _Array] = {}
    forms = {"plain": ("plain", 0), "pieces": ("pieces", 0), "wider": ("wider", 0)}
    forms |= {f"reordered {order}": ("plain", order) for order in range(1, _REORDERED_RUNS + 1)}
    for name, (form, order) in forms.items():
        curves[name] = train(config, planned, data, world, form=form, order=order)
        line = f"{name:12s} first loss {curves[name][0]:.6f}, last {curves[name][-1]:.6f}"
        if name != "plain":
            line += f", largest difference from plain {np.abs(curves[name] - curves['plain']).max():.2e}"
        log.line(line)
    # Each of the step's tokens is rounded by itself, and the mean over them evens that out; fp32 sums do not.
    tokens = (config.optimizer.batch_size or 1) * ((config.data.sequence_length or 2) - 1)
    rounding = max(_ROUNDING["fp32"], _ROUNDING[options.precision] / math.sqrt(tokens))
    others = [losses for name, losses in curves.items() if name not in ("plain", "pieces")]
    verdict = judge(curves["plain"], curves["pieces"], others, rounding)
    log.line(_sentence(verdict))
    record = {
        "command": " ".join(sys.argv),
        "machine": describe_device(world.device),
        "torch": torch.__version__,
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        **dataclasses.asdict(verdict),
        "rounding": rounding,
        "losses": {name: losses.tolist() for name, losses in curves.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "curves.json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"OPT {options.model}, {options.precision}: the loss in pieces and over all logits"
    (options.output / "curves.png").write_bytes(draw(curves, verdict, title))
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and return the exit code."""
    options = _options(arguments)
    log = Log(stream=sys.stdout)
    try:
        return 0 if compare(options, log).passed else 1
    except AlbireoError as error:
        Log().line(f"error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
