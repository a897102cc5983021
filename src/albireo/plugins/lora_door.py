"""Adapters as scripts call for them: a model gets one before it is boosted, and only it is saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from albireo.adapters import quantise_base, require_peft
from albireo.checkpoint import tensor_names
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError
from albireo.ops.quantise import Code
from albireo.plugins.base import ModelWrapper, Plugin
from albireo.plugins.whole_tensors import WholeTensors, with_whole_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["LoraDoor"]


class LoraDoor:
    """The part of the facade that knows adapters.

    Attributes:
        plugin: the mechanism.
        world: the ranks.
    """

    plugin: Plugin
    world: World

    def enable_lora(
        self,
        model: nn.Module,
        pretrained_dir: str | Path | None = None,
        lora_config: PeftConfig | None = None,
        bnb_quantization_config: Any = None,
        quantize: bool = False,
    ) -> PeftModel:
        """Put a LoRA adapter on a model, by peft: its own weights are frozen, and `boost` trains the adapter alone.

        Args:
            model: a model that is not boosted yet.
            pretrained_dir: the folder of an adapter to go on with.
            lora_config: a new adapter, a `peft.LoraConfig`. One of the two.
            bnb_quantization_config: says by its `load_in_8bit`, `load_in_4bit` and `llm_int8_skip_modules` how the frozen
                layers are quantised, such as transformers' BitsAndBytesConfig; the layers are our own. None: not at all.
            quantize: quantise them to 4 bits (nf4) where no configuration says otherwise.

        Returns:
            peft's model, to be given to `boost`, with an optimizer of its parameters.

        Raises:
            ConfigError: an option is not there, the model is boosted already, or the adapter does not go on it.
        """
        peft = require_peft()
        code = _code_of(bnb_quantization_config, quantize=quantize)
        if isinstance(model, ModelWrapper):
            raise ConfigError("this model is boosted already: call enable_lora first, and boost with what it returns")
        if (pretrained_dir is None) == (lora_config is None):
            raise ConfigError(
                "give enable_lora either a lora_config, or the pretrained_dir of an adapter to go on with"
            )
        if code is not None and any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError("what is quantised has to be there: build the model outside LazyInitContext")
        if lora_config is not None and not isinstance(lora_config, peft.LoraConfig):
            raise ConfigError(f"lora_config is a peft.LoraConfig, not a {type(lora_config).__name__}")
        if pretrained_dir is not None and not (Path(pretrained_dir) / "adapter_config.json").is_file():
            raise ConfigError(f"{pretrained_dir} is no adapter's folder: it has no adapter_config.json")
        try:
            with warnings.catch_warnings():
                # Of a transposed layer peft finds out itself, and says so.
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
                # It asks transformers by a switch's older name.
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                if pretrained_dir is None:
                    made: PeftModel = peft.get_peft_model(model, lora_config)
                else:
                    made = peft.PeftModel.from_pretrained(model, str(pretrained_dir), is_trainable=True)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise ConfigError(f"the adapter does not go on this model: {_first_line(error)}") from error
        if code is not None:
            quantise_base(made, code, skip=getattr(bnb_quantization_config, "llm_int8_skip_modules", None) or ())
        return made

    def save_lora_as_pretrained(
        self, model: ModelWrapper, checkpoint: str | Path, use_safetensors: bool = False
    ) -> None:
        """Save a model's adapter alone, as `peft.PeftModel.from_pretrained` loads it; every rank calls this.

        Args:
            model: the boosted model, which `enable_lora` has made.
            checkpoint: the folder; what else lies in it stays.
            use_safetensors: files are safetensors in any case; never pickles.

        Raises:
            ConfigError: the model has no adapter.
            CheckpointError: the folder cannot be written.
        """
        peft = require_peft()
        if not isinstance(model, ModelWrapper):
            raise ConfigError(f"give the model that boost returned, not a {type(model).__name__}")
        module = model.unwrap()
        if not isinstance(module, peft.PeftModel):
            raise ConfigError("this model has no adapter: make one by enable_lora before boost")
        folder = Path(checkpoint)
        names, _ = tensor_names(module)
        # The frozen weights stay where they are.
        wanted = {f"model/{name}" for tensor, name in names.items() if tensor.requires_grad}

        def save(tensors: WholeTensors) -> None:
            weights = {part.name.removeprefix("model/"): tensors.tensor(part) for part in tensors.slices}
            try:
                if folder.is_file():
                    raise NotADirectoryError(20, "it is a file", str(folder))
                module.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error

        exported = self.plugin.export_model(model, names, self.world)
        with_whole_tensors((part for part in exported if part.name in wanted), self.world, save)


def _code_of(config: Any, *, quantize: bool) -> Code | None:
    """Return how a base is to be quantised; None: not at all."""
    if config is None:
        return "nf4" if quantize else None
    if getattr(config, "load_in_8bit", False):
        return "int8"
    if not getattr(config, "load_in_4bit", False):
        raise ConfigError("bnb_quantization_config says neither load_in_8bit nor load_in_4bit: set one of them")
    if getattr(config, "bnb_4bit_quant_type", "nf4") not in ("nf4", None):
        raise ConfigError(f"bnb_4bit_quant_type is 'nf4' here, not {config.bnb_4bit_quant_type!r}")
    return "nf4"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
