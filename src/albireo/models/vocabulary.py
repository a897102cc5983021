"""Vocabulary and model must agree: how many rows the embedding has, and which ids are special."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from albireo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Init", "Vocabulary", "reconcile_vocabulary"]

Init = Literal["random", "pretrained"]


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer asks of a model.

    Attributes:
        size: rows the embedding needs: the largest id there is, plus 1.
        bos: id that begins a text, or None.
        eos: id that ends one, or None.
        pad: id that fills up what is too short, or None.
    """

    size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def reconcile_vocabulary(
    config: PreTrainedConfig, vocabulary: Vocabulary, *, init: Init, fits_vocabulary: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Decide what must change in a model's configuration for a tokenizer, and what the user should know.

    Random weights take the tokenizer's special ids, and at least as many rows as it needs. Trained weights keep
    their rows; where special ids differ, the tokenizer's are taken, since the text was encoded with them.

    Args:
        config: the model's; not changed.
        vocabulary: the tokenizer's.
        init: where the weights come from.
        fits_vocabulary: the model has exactly the tokenizer's rows. For random weights only.

    Returns:
        The options to change, and lines to print.

    Raises:
        ModelError: trained weights have too few rows for the tokenizer, or the tokenizer contradicts itself.
    """
    for name, token in (("bos", vocabulary.bos), ("eos", vocabulary.eos), ("pad", vocabulary.pad)):
        if token is not None and not 0 <= token < vocabulary.size:
            raise ModelError(
                f"the tokenizer's {name} token has id {token}: expected one of its {vocabulary.size:,} ids"
            )
    # The embedding's row of the padding id is zero and never trained (`padding_idx`). Were it the id of a real token,
    # that token would silently be dead: so a tokenizer without a padding token of its own makes a model without one.
    if vocabulary.pad in (vocabulary.bos, vocabulary.eos):
        vocabulary = replace(vocabulary, pad=None)
    if init == "random":
        return _for_random(config, vocabulary, fits_vocabulary)
    return _for_pretrained(config, vocabulary)


def _for_random(
    config: PreTrainedConfig, vocabulary: Vocabulary, fits_vocabulary: bool
) -> tuple[dict[str, Any], list[str]]:
    rows = vocabulary.size if fits_vocabulary else max(config.vocab_size, vocabulary.size)
    lines = []
    if rows > vocabulary.size:
        lines.append(_unused_rows(rows, vocabulary.size))
    elif rows > config.vocab_size:
        lines.append(f"the embedding has {rows:,} rows instead of {config.vocab_size:,}: the tokenizer needs them")
    return {
        "vocab_size": rows,
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.pad,
    }, lines


def _for_pretrained(config: PreTrainedConfig, vocabulary: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    rows = config.vocab_size
    if vocabulary.size > rows:
        raise ModelError(
            f"the tokenizer has {vocabulary.size:,} ids but the model's weights have {rows:,} rows: "
            "take the model's own tokenizer, or --init random"
        )
    lines = [_unused_rows(rows, vocabulary.size)] if vocabulary.size < rows else []
    changes: dict[str, Any] = {}
    for name, token in (("bos", vocabulary.bos), ("eos", vocabulary.eos), ("pad", vocabulary.pad)):
        option = f"{name}_token_id"
        own = getattr(config, option)
        # A tokenizer that begins or ends no text says nothing against the model's ids; padding is another matter.
        if token == own or (token is None and name != "pad") or (isinstance(own, list) and token in own):
            continue
        changes[option] = token
        lines.append(f"the {name} token is {_named(token)} as in the tokenizer; the model's was {_named(own)}")
    return changes, lines


def _unused_rows(rows: int, size: int) -> str:
    return f"the tokenizer uses {size:,} of the embedding's {rows:,} rows"


def _named(token: int | list[int] | None) -> str:
    return "none" if token is None else f"id {token}"
