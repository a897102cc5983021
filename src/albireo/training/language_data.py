"""What recipes for language models make of their data: samples of token ids, and the tokenizer that made them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from albireo.data import RandomTokens, TextTokenizer
from albireo.log import Log
from albireo.training.progress import Progress, ProgressTask
from albireo.training.recipe import RunData

__all__ = ["RANDOM_BLOCKS", "LanguageData", "ProgressLog", "Stages", "random_data"]

RANDOM_BLOCKS = 4096


@dataclass(frozen=True)
class LanguageData(RunData):
    """Token ids.

    Attributes:
        tokenizer: what made the ids; None for random ones.
    """

    tokenizer: TextTokenizer | None

    def save(self, folder: Path) -> None:
        """Write the tokenizer, as transformers loads it."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


def random_data(vocab_size: int, sequence_length: int, seed: int) -> LanguageData:
    """Return uniform random tokens, where only speed is asked for.

    Args:
        vocab_size: how many kinds.
        sequence_length: tokens in a sample.
        seed: which.
    """
    return LanguageData(
        train=RandomTokens(RANDOM_BLOCKS, sequence_length, vocab_size, seed),
        held_out=RandomTokens(8, sequence_length, vocab_size, seed + 1),
        fingerprint=f"random {vocab_size} {sequence_length} {seed}",
        lines=(f"data       uniform random tokens of {vocab_size:,} kinds, in blocks of {sequence_length:,}",),
        tokenizer=None,
    )


class ProgressLog(Log):
    """Lines of the data room, shown where the run's own are."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def line(self, text: str = "") -> None:
        """Show one line."""
        self._progress.message(text)


class Stages(ExitStack):
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
