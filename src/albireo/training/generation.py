"""Text that a trained language model goes on with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albireo.data import prompt_of
from albireo.errors import ConfigError
from albireo.training.trained import TrainedLanguageModel

__all__ = ["GenerationOptions", "generate", "prompt_for"]

_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationOptions:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: the most tokens of the answer; None: 256, or what the model has positions for.
        temperature: 0 takes the likeliest token; above it, logits are divided by it and a token is drawn.
        top_k: draw among so many likeliest tokens only.
        top_p: draw among the likeliest tokens only that together have this probability.
        seed: which draws.

    Raises:
        ConfigError: an option of drawing is given, and nothing is drawn.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.temperature > 0:
            return
        for name in ("top_k", "top_p", "seed"):
            if getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} says how tokens are drawn, and without --temperature the likeliest is taken: give "
                    f"--temperature, or leave {flag} out"
                )


def prompt_for(recipe: str, *, prompt: str | None, instruction: str | None, input_text: str | None) -> str:
    """Return the text that a model goes on with. Pure.

    Args:
        recipe: what the model was trained by.
        prompt: a text as it is.
        instruction: what is asked for, to be put as in training.
        input_text: what the instruction is about.

    Raises:
        ConfigError: there is not just one of the two, or one that is empty, or the recipe knows no instructions.
    """
    if (prompt is None) == (instruction is None):
        raise ConfigError("give either --instruction, with --input if there is one, or --prompt for a text as it is")
    if instruction is None:
        if input_text is not None:
            raise ConfigError("--input goes with --instruction: put all into --prompt, or give --instruction")
        if not (prompt or "").strip():
            raise ConfigError("--prompt is empty: give a text to go on with")
        return prompt or ""
    if recipe != "gpt2":
        raise ConfigError(f"a run of the recipe {recipe} was trained on text, not on instructions: give --prompt")
    if not instruction.strip():
        raise ConfigError("--instruction is empty: say what is asked for")
    return prompt_of(instruction, input_text or "")


def generate(trained: TrainedLanguageModel, prompt: str, options: GenerationOptions) -> str:
    """Return what a model goes on with, up to the token that ends a text.

    Args:
        trained: the model and its tokenizer.
        prompt: the text before.
        options: how tokens are chosen.

    Raises:
        ConfigError: the prompt, or it and the answer, have more tokens than the model has positions.
    """
    from transformers import GenerationConfig

    model, tokenizer = trained.model, trained.tokenizer
    (ids,) = tokenizer.encode_batch([prompt])
    room = int(model.config.max_position_embeddings) - len(ids)
    wanted = options.max_new_tokens
    if not ids:
        raise ConfigError("the prompt has no tokens: give a text to go on with")
    if room < 1 or (wanted is not None and wanted > room):
        raise ConfigError(
            f"the prompt has {len(ids):,} tokens, and the model {len(ids) + room:,} positions, which leaves {max(room, 0):,} "
            f"for the answer: give a shorter text{'' if room < 1 else ', or fewer --max-new-tokens'}"
        )
    drawn = options.temperature > 0
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=min(room, _DEFAULT_NEW_TOKENS) if wanted is None else wanted,
        do_sample=drawn,
        temperature=options.temperature if drawn else None,
        top_k=options.top_k if drawn and options.top_k is not None else (0 if drawn else None),
        top_p=options.top_p if drawn and options.top_p is not None else (1.0 if drawn else None),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
        use_cache=True,
    )
    inputs = torch.tensor([ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(options.seed if options.seed is not None else 0)
        out = model.generate(  # type: ignore[operator]  # the mixin's method is not in the base class
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config
        )
    return tokenizer.decode(out[0, len(ids) :].tolist())
