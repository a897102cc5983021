"""The text of a run: read, tokenized and packed, or random tokens where only speed is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from albireo.config import RunConfig
from albireo.data import (
    RandomTokens,
    TextOptions,
    TextTokenizer,
    TokenBlocks,
    check_source,
    open_source,
    prepare_text,
)
from albireo.log import Log
from albireo.training.progress import Progress, ProgressTask

__all__ = ["RANDOM_BLOCKS", "RunData", "check_run_data", "load_run_data"]

RANDOM_BLOCKS = 4096


@dataclass(frozen=True)
class RunData:
    """What a run trains on.

    Attributes:
        train: blocks to train on.
        held_out: blocks to evaluate on.
        tokenizer: what made the ids; None for random ones.
        fingerprint: says, for people too, what decides a sample; changes when any of it does.
        lines: what was read and made, for the user.
    """

    train: TokenBlocks | RandomTokens
    held_out: TokenBlocks | RandomTokens
    tokenizer: TextTokenizer | None
    fingerprint: str
    lines: tuple[str, ...]


def check_run_data(config: RunConfig) -> None:
    """Say at once what is wrong with a path, or with the form of a name on the hub; nothing is read or fetched.

    Args:
        config: a resolved configuration.

    Raises:
        DataError: there is nothing of that name.
    """
    if config.data.data != "random":
        check_source(config.data.data, text_field=config.data.text_field)


def load_run_data(
    config: RunConfig, *, tokenizer: TextTokenizer | None, vocab_size: int, progress: Progress
) -> RunData:
    """Prepare what the configuration names.

    Args:
        config: a resolved configuration.
        tokenizer: what the text is encoded with, or None to train one on it.
        vocab_size: entries of a tokenizer that is trained, and of random ids.
        progress: shows how far it is.

    Raises:
        DataError: the text cannot be read, or is too short.
        ModelError: the tokenizer cannot be trained.
    """
    length = config.data.sequence_length or 2
    seed = config.schedule.seed
    if config.data.data == "random":
        lines = (f"data       uniform random tokens of {vocab_size:,} kinds, in blocks of {length:,}",)
        held_out = RandomTokens(8, length, vocab_size, seed + 1)
        train = RandomTokens(RANDOM_BLOCKS, length, vocab_size, seed)
        return RunData(train, held_out, None, f"random {vocab_size} {length} {seed}", lines)
    source = open_source(config.data.data, text_field=config.data.text_field)
    options = TextOptions(
        sequence_length=length,
        vocab_size=vocab_size,
        holdout_share=config.data.holdout,
        cache_folder=Path(config.data.cache) if config.data.cache else None,
    )
    with _Stages(progress) as stages:
        text = prepare_text(source, tokenizer, options, log=_ProgressLog(progress), progress=stages.told)
    # In words: where a run cannot go on, the user sees which part is another. Nothing in it says where the text lies.
    fingerprint = (
        f"text {source.fingerprint()[:12]}, tokenizer {text.tokenizer.fingerprint()[:12]} of "
        f"{text.tokenizer.vocab_size} tokens, blocks of {length}, {len(text.train)} to train on and "
        f"{len(text.held_out)} held out"
    )
    return RunData(text.train, text.held_out, text.tokenizer, fingerprint, text.lines)


class _ProgressLog(Log):
    """Lines of the data room, shown where the run's own are."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def line(self, text: str = "") -> None:
        """Show one line."""
        self._progress.message(text)


class _Stages(ExitStack):
    """Shows one stage of the preparation after another, each as a task of its own."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._stage: str | None = None
        self._task: ProgressTask | None = None
        self._done = 0

    def told(self, stage: str, done: int, total: int | None) -> None:
        """Take in how far a stage is.

        Args:
            stage: its name.
            done: bytes of text that are done.
            total: all bytes, or None where that is not known.
        """
        if stage != self._stage or self._task is None:
            self.close()
            self._task = self.enter_context(self._progress.task(stage, total))
            self._stage, self._done = stage, 0
        self._task.advance(done - self._done)
        self._done = done
