"""From a source of text to blocks to train and evaluate on: the one call that ties the room together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from albireo.data.blocks import TokenBlocks, pack, split_blocks
from albireo.data.cache import Progress, tokenize, trained_tokenizer
from albireo.data.store import default_cache_folder
from albireo.data.text_source import TextSource
from albireo.data.tokenizer import TextTokenizer
from albireo.data.tokenizer_loading import load_tokenizer
from albireo.log import Log

__all__ = ["StageProgress", "TextData", "TextOptions", "prepare_text", "prepare_tokenizer"]

StageProgress = Callable[[str, int, int | None], None]
"""Told the name of a stage, the bytes of text done, and how many there are, or None where that is not known."""


@dataclass(frozen=True)
class TextOptions:
    """How text becomes blocks.

    Attributes:
        sequence_length: tokens in a block.
        vocab_size: the most entries of a tokenizer that is trained here.
        holdout_share: share of the blocks held out for evaluation, where the source has no validation split.
        cache_folder: where tokenizers and tokens are kept; `default_cache_folder()` if None.
    """

    sequence_length: int
    vocab_size: int = 4096
    holdout_share: float = 0.05
    cache_folder: Path | None = None


@dataclass(frozen=True)
class TextData:
    """Text that is ready to train on.

    Attributes:
        train: blocks to train on.
        held_out: blocks to evaluate on.
        tokenizer: what made the ids.
        vocab_size: rows that a model's embedding needs at least.
        lines: what was read and made, for the user.
    """

    train: TokenBlocks
    held_out: TokenBlocks
    tokenizer: TextTokenizer
    vocab_size: int
    lines: tuple[str, ...]


def prepare_tokenizer(
    source: TextSource,
    tokenizer: str | Path | TextTokenizer | None,
    options: TextOptions,
    *,
    log: Log | None = None,
    progress: StageProgress | None = None,
) -> TextTokenizer:
    """Return the tokenizer that was chosen.

    Args:
        source: the text.
        tokenizer: a tokenizer, a folder or hub name to load one from, or None to train one on the source.
        options: the vocabulary to train, and where it is kept.
        log: told when something is waited for or made again.
        progress: told how far the training is.

    Raises:
        DataError: the text cannot be read.
        ModelError: the tokenizer cannot be loaded or trained.
    """
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    return trained_tokenizer(
        source,
        options.vocab_size,
        cache_folder=options.cache_folder or default_cache_folder(),
        progress=_stage(progress, "training the tokenizer"),
        log=log,
    )


def prepare_text(
    source: TextSource,
    tokenizer: str | Path | TextTokenizer | None,
    options: TextOptions,
    *,
    log: Log | None = None,
    progress: StageProgress | None = None,
) -> TextData:
    """Tokenize a source, pack it into blocks, and hold a share out unless the source has a validation split.

    Every rank may call it at the same time: one does the work, the others wait for the files.

    Args:
        source: the text.
        tokenizer: a tokenizer, a folder or hub name to load one from, or None to train one on the source.
        options: lengths, shares and places.
        log: told when something is waited for or made again.
        progress: told how far each stage is, in the process that does the work.

    Raises:
        ConfigError: an option is out of its range.
        DataError: the text cannot be read, or is too short.
        ModelError: the tokenizer cannot be loaded or trained.
    """
    chosen = prepare_tokenizer(source, tokenizer, options, log=log, progress=progress)
    folder = options.cache_folder or default_cache_folder()
    streams = {
        split: tokenize(
            source, chosen, split, cache_folder=folder, progress=_stage(progress, f"tokenizing {split}"), log=log
        )
        for split in source.splits
    }
    length = options.sequence_length
    if "validation" in streams:
        train = pack(streams["train"], length, f"the train split of {source.name}")
        held_out = pack(streams["validation"], length, f"the validation split of {source.name}")
    else:
        train, held_out = split_blocks(streams["train"], length, options.holdout_share, source.name)
    tokens = sum(map(len, streams.values()))
    blocks = f"blocks of {length:,}: {len(train):,} to train on, {len(held_out):,} held out"
    lines = (
        f"data       {source.describe()}",
        f"tokenizer  {chosen.describe()}",
        f"tokens     {tokens:,}; {blocks}",
    )
    return TextData(train, held_out, chosen, chosen.vocab_size, lines)


def _stage(progress: StageProgress | None, stage: str) -> Progress | None:
    return None if progress is None else partial(progress, stage)
