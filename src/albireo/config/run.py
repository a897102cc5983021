"""The sections of a run's configuration. A field's name is its flag, and its key in `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, cast

from albireo.config.adapter import AdapterConfig
from albireo.config.option import OptionInfo, option, options_of
from albireo.config.recipes import RECIPE_SECTIONS, DataConfig, LanguageModelConfig, ModelConfig, TextConfig
from albireo.errors import ConfigError

__all__ = [
    "PLUGIN_OPTIONS",
    "OptimizerConfig",
    "PluginConfig",
    "RunConfig",
    "ScheduleConfig",
]

# Options that one plugin alone has.
PLUGIN_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "zero_stage": "low_level_zero",
        "placement": "gemini",
        "offload_optim_frac": "gemini",
        "offload_param_frac": "gemini",
        "shard_param_frac": "gemini",
        "stream_optim_frac": "gemini",
        "prefetch": "gemini",
        "host_cap": "gemini",
        "trace": "gemini",
    }
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what is done to the gradient before it."""

    learning_rate: float | None = option(
        None, "The peak learning rate. Default: 1e-3 for tiny, 3e-4 for adapters, 5e-5 otherwise.", minimum=0.0
    )
    weight_decay: float = option(0.01, "AdamW's weight decay; biases and norms are left out.", minimum=0.0)
    clip: float = option(1.0, "Clip the gradient to this global norm; 0 does not clip.", minimum=0.0)
    batch_size: int | None = option(None, "Samples per rank and micro-batch. Default: 8.", minimum=1, maximum=10**9)
    accumulate: int = option(1, "Micro-batches per step.", minimum=1, maximum=10**6)


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, how often, and how the learning rate goes."""

    epochs: float | None = option(
        None,
        "Passes over the data. Default: 1 for tiny, 3 otherwise.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=10**6,
    )
    steps: int | None = option(None, "Optimizer steps, instead of epochs.", minimum=1, maximum=10**12)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "The learning rate after the warm-up.")
    warmup: float = option(
        0.1, "Warm-up: a share of all steps if below 1, a number of steps otherwise; 0 is none.", minimum=0.0
    )
    eval_every: int | None = option(
        None,
        "Evaluate every so many steps, and at both ends; 0 never evaluates. Default: a fifth of the run.",
        minimum=0,
    )
    save_every: int | None = option(
        None,
        "Save a checkpoint every so many steps, and at the end; 0 saves none. Default: a fifth of the run.",
        minimum=0,
    )
    keep: int = option(2, "How many checkpoints to keep.", minimum=1)
    seed: int = option(42, "Decides the weights, the order of samples and dropout.", minimum=0, maximum=2**63 - 1)


@dataclass(frozen=True)
class PluginConfig:
    """On what, and by which mechanism."""

    plugin: Literal["torch_ddp", "torch_ddp_fp16", "torch_fsdp", "low_level_zero", "gemini"] = option(
        "torch_ddp",
        "The mechanism of training: whole copies on every rank (torch_ddp; torch_ddp_fp16 is the same with --precision "
        "fp16), torch's own sharding (torch_fsdp), ZeRO 1 and 2 (low_level_zero), or chunks of weights and states that move between "
        "device and host under a cap (gemini).",
    )
    zero_stage: int | None = option(
        None, "low_level_zero: 1 shards optimizer states, 2 gradients too. Default: 2.", minimum=1, maximum=2
    )
    cpu_offload: bool = option(
        False, "low_level_zero, torch_fsdp: keep fp32 weights and optimizer states in host memory, and step there."
    )
    placement: Literal["auto", "static"] | None = option(
        None,
        "gemini: move as little as the cap allows, as a first step shows (auto), or keep to the shares that follow (static). "
        "Default: static if a share is given, else auto.",
    )
    offload_optim_frac: float | None = option(
        None, "gemini: share of optimizer states that is in host memory and stepped there.", minimum=0, maximum=1
    )
    offload_param_frac: float | None = option(
        None, "gemini: share of weights that is in host memory and fetched for each use.", minimum=0, maximum=1
    )
    shard_param_frac: float | None = option(
        None, "gemini, several ranks: share of weights of which a rank keeps its part alone.", minimum=0, maximum=1
    )
    stream_optim_frac: float | None = option(
        None,
        "gemini: of the optimizer states in host memory, the share that comes to the GPU to be stepped there, and goes back. "
        "Default: none.",
        minimum=0,
        maximum=1,
    )
    prefetch: int | None = option(
        None, "gemini: how many blocks ahead weights are fetched. Default: 2.", minimum=0, maximum=1000
    )
    host_cap: float = option(
        0.0,
        "gemini: this machine's ranks together never take more host memory for weights and states than so many GB (2**30 "
        "bytes); 0 is what the machine really has.",
        minimum=0.0,
        metavar="GB",
    )
    trace: bool = option(
        False,
        "gemini: write the timeline of one step, the fourth where nothing intervenes, into the run folder: trace.png, trace.json and "
        "trace-chrome.json (for chrome://tracing or Perfetto). `albireo trace RUN` says in words what was waited for.",
    )
    precision: Literal["fp32", "fp16", "bf16"] | None = option(
        None, "The numbers that compute. Default: bf16 where the GPU has it, else fp16; fp32 on a CPU."
    )
    compile: bool = option(
        False, "Compile the blocks with torch.compile: a slower start, then faster steps. Needs a C++ compiler."
    )
    tf32: bool = option(True, "Let a GPU multiply fp32 matrices in TF32, as most training does.")
    mem_cap: float = option(
        0.0,
        "This process never takes more device memory than so many GB (2**30 bytes); 0 is no cap. On a CPU gemini's device is "
        "simulated, and this bounds what chunks take on it.",
        minimum=0.0,
        metavar="GB",
    )
    gpus: int = option(
        1,
        "Ranks to start, each with a GPU of its own; without a GPU, as many CPU processes.",
        minimum=1,
        maximum=64,  # all are started on this machine
    )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes. Made by `RunConfig.of`; by itself it is the recipe opt.

    `recipe` says what is trained, and so which options there are: `model` and `data` are of that recipe's own classes.
    Fields that are None are decided by `resolve` and, where they depend on the data, by the training session; a run's
    `config.json` holds them all.

    Raises:
        ConfigError: there is no such recipe, or a section is another recipe's.
    """

    recipe: str = "opt"
    model: ModelConfig = field(default_factory=LanguageModelConfig)
    data: DataConfig = field(default_factory=TextConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    plugin: PluginConfig = field(default_factory=PluginConfig)

    def __post_init__(self) -> None:
        """Refuse sections of another recipe: their options would be ignored."""
        for name, section in RunConfig.sections(self.recipe).items():
            if type(getattr(self, name)) is not section:
                raise ConfigError(f"{name} of the recipe {self.recipe!r} is a {section.__name__}: use RunConfig.of")

    @property
    def drops_out(self) -> bool:
        """A training step draws masks."""
        return self.model.dropout > 0 or (self.adapter.lora_dropout or 0.0) > 0

    @staticmethod
    def of(recipe: str) -> RunConfig:
        """Return a recipe's defaults.

        Args:
            recipe: its name, as in `albireo train NAME`.

        Raises:
            ConfigError: there is no such recipe.
        """
        return RunConfig(recipe, **{name: section() for name, section in RunConfig.sections(recipe).items()})

    @staticmethod
    def sections(recipe: str = "opt") -> dict[str, type]:
        """Return the names and dataclasses of a recipe's sections, in order.

        Args:
            recipe: its name.

        Raises:
            ConfigError: there is no such recipe.
        """
        if recipe not in RECIPE_SECTIONS:
            raise ConfigError(f"a recipe is one of {', '.join(RECIPE_SECTIONS)}, not {recipe!r}")
        own = RECIPE_SECTIONS[recipe]
        return {
            # Each shared section's factory is its class.
            part.name: own.get(part.name, cast("type", part.default_factory))
            for part in fields(RunConfig)
            if part.name != "recipe"
        }

    @staticmethod
    def options(recipe: str = "opt") -> Iterator[OptionInfo]:
        """Yield every option of every section of a recipe.

        Args:
            recipe: its name.
        """
        for name, section in RunConfig.sections(recipe).items():
            yield from options_of(name, section)
