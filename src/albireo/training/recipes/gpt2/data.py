"""The instructions of a run: read, encoded and cut, and dealt in batches of like lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from albireo.config import InstructionConfig, RunConfig
from albireo.data import (
    AnyBatch,
    Batching,
    BatchLayout,
    Buckets,
    InstructionOptions,
    StepLoader,
    TextTokenizer,
    check_instructions,
    evaluation_batches,
    open_instructions,
    pad_rows,
    prepare_instructions,
)
from albireo.distributed import World
from albireo.training.language_data import LanguageData, ProgressLog, Stages, random_data
from albireo.training.progress import Progress

__all__ = ["InstructionRunData", "check_run_data", "instruction_options", "load_run_data"]


@dataclass(frozen=True)
class InstructionRunData(LanguageData):
    """Samples of different lengths.

    Attributes:
        batching: puts samples of like length near one another, and fills a batch up to its longest.
    """

    batching: Batching

    @property
    def is_ragged(self) -> bool:
        """See the base class: a batch is as long as its longest sample."""
        return True

    def steps(self, layout: BatchLayout, *, seed: int, start_sample: int = 0, steps: int, pin: bool) -> StepLoader:
        """See the base class."""
        return StepLoader(
            self.train,
            layout,
            seed=seed,
            start_sample=start_sample,
            steps=steps,
            pin_memory=pin,
            batching=self.batching,
        )

    def evaluation(self, batch_size: int, world: World, *, pin: bool) -> Iterator[AnyBatch]:
        """See the base class."""
        return evaluation_batches(
            self.held_out, batch_size, world.rank, world.world_size, pin_memory=pin, batching=self.batching
        )


def instruction_options(config: RunConfig) -> InstructionConfig:
    """Return the data's section of the recipe gpt2.

    Raises:
        TypeError: it is another recipe's configuration.
    """
    if not isinstance(config.data, InstructionConfig):
        raise TypeError(f"expected the configuration of the recipe gpt2, not of {config.recipe}")
    return config.data


def check_run_data(config: RunConfig) -> None:
    """Say at once what is wrong with a path, or with the form of a name on the hub; nothing is read or fetched.

    Args:
        config: a resolved configuration.

    Raises:
        DataError: there is nothing of that name.
    """
    name = instruction_options(config).data
    if name != "random":
        check_instructions(name)


def load_run_data(
    config: RunConfig, *, tokenizer: TextTokenizer | None, vocab_size: int, progress: Progress
) -> LanguageData:
    """Prepare what the configuration names.

    Args:
        config: a resolved configuration.
        tokenizer: what records are encoded with, or None to train one on them.
        vocab_size: entries of a tokenizer that is trained, and of random ids.
        progress: shows how far it is.

    Raises:
        DataError: the records cannot be read, or are too few, or too many are malformed.
        ModelError: the tokenizer cannot be trained, or does not do for answers.
    """
    data = instruction_options(config)
    length = data.sequence_length or 2
    if data.data == "random":
        return random_data(vocab_size, length, config.schedule.seed)
    source = open_instructions(data.data, max_malformed=data.max_malformed)
    options = InstructionOptions(
        sequence_length=length,
        vocab_size=vocab_size,
        holdout_share=data.holdout,
        all_tokens=data.loss_on == "all",
        cache_folder=Path(data.cache) if data.cache else None,
    )
    with Stages(progress) as stages:
        made = prepare_instructions(source, tokenizer, options, log=ProgressLog(progress), progress=stages.told)
    bucket = data.bucket or 1
    # In words: where a run cannot go on, the user sees which part is another. Nothing in it says where the data lies.
    fingerprint = (
        f"instructions {source.fingerprint()[:12]}, tokenizer {made.tokenizer.fingerprint()[:12]} of "
        f"{made.tokenizer.vocab_size} tokens, at most {length} a sample, loss on {data.loss_on}, buckets of {bucket}, "
        f"{len(made.train)} to train on and {len(made.held_out)} held out"
    )
    pad_id = made.tokenizer.pad_id if made.tokenizer.pad_id is not None else made.tokenizer.eos_id
    return InstructionRunData(
        train=made.train,
        held_out=made.held_out,
        fingerprint=fingerprint,
        lines=made.lines,
        tokenizer=made.tokenizer,
        batching=Batching(Buckets(made.train.lengths, bucket), partial(pad_rows, pad_id=pad_id or 0)),
    )
