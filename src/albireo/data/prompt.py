"""Alpaca's prompt: how an instruction is put to a language model (Taori et al., Stanford Alpaca, 2023). Pure."""

from __future__ import annotations

__all__ = ["PROMPT_VERSION", "prompt_of"]

PROMPT_VERSION = 1
"""Counts up when a word of the prompt changes: what was made with another one is not found again."""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def prompt_of(instruction: str, input_text: str = "") -> str:
    """Return the text before the answer, which follows at once.

    Args:
        instruction: what is asked for.
        input_text: what it is about; one of white space alone counts as none.
    """
    # Not by str.format on both: braces in a user's text are no places to fill.
    template = _WITH_INPUT if input_text.strip() else _WITHOUT_INPUT
    before, _, rest = template.partition("{instruction}")
    if not input_text.strip():
        return f"{before}{instruction}{rest}"
    middle, _, after = rest.partition("{input}")
    return f"{before}{instruction}{middle}{input_text}{after}"
