"""From instructions to samples: encoded once and kept, cut to a length, with the labels that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from albireo.data.cache import trained_tokenizer
from albireo.data.instruction import Instruction
from albireo.data.instruction_source import InstructionSource
from albireo.data.loader import IGNORED_LABEL
from albireo.data.order import epoch_permutation
from albireo.data.prompt import PROMPT_VERSION
from albireo.data.store import built_once, default_cache_folder, key_of
from albireo.data.text import StageProgress
from albireo.data.text_source import TextSource
from albireo.data.tokenizer import TextTokenizer
from albireo.data.tokenizer_training import GPT2_TOKENS, TokenLayout
from albireo.data.tokens import TokenStream, TokenWriter, token_dtype
from albireo.errors import DataError, ModelError
from albireo.log import Log

__all__ = [
    "EncodedInstructions",
    "InstructionData",
    "InstructionOptions",
    "InstructionSamples",
    "pad_rows",
    "prepare_instructions",
]

_VERSION = 1
_TOKENS_FILE, _PLACES_FILE = "tokens.safetensors", "places.safetensors"
_BATCH = 4096
# Which records are held out is no matter of the run's seed: another seed is judged by the same ones.
_HOLDOUT_SEED = 20230313


@dataclass(frozen=True)
class InstructionOptions:
    """How instructions become samples.

    Attributes:
        sequence_length: the most tokens of a sample; what is longer is cut.
        vocab_size: the most entries of a tokenizer that is trained here.
        holdout_share: share of the records held out, where the source has no validation part.
        all_tokens: the prompt's tokens count too, not the answer's alone.
        cache_folder: where what is encoded is kept; `default_cache_folder()` if None.
        layout: special tokens of a tokenizer that is trained here.
    """

    sequence_length: int
    vocab_size: int = 4096
    holdout_share: float = 0.05
    all_tokens: bool = False
    cache_folder: Path | None = None
    layout: TokenLayout = GPT2_TOKENS


class EncodedInstructions:
    """The ids of records, mapped from a file: prompt, answer and the token that ends a text, one record after another.

    Args:
        folder: where they are.

    Attributes:
        lengths: tokens of each record, int64 [records].
        prompt_lengths: how many of them are the prompt's, int64 [records].
    """

    def __init__(self, folder: Path) -> None:
        self._stream = TokenStream(folder / _TOKENS_FILE)
        places = load_file(folder / _PLACES_FILE)
        self._starts: NDArray[np.int64] = places["starts"]
        self.lengths: NDArray[np.int64] = np.diff(self._starts)
        self.prompt_lengths: NDArray[np.int64] = places["prompts"]

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, record: int, limit: int) -> NDArray[np.int64]:
        """Return the first ids of a record, int64 [at most `limit`]."""
        start = int(self._starts[record])
        return self._stream[start : min(start + limit, int(self._starts[record + 1]))].astype(np.int64)


class InstructionSamples(Dataset[dict[str, Tensor]]):
    """Some records as samples: `input_ids` and `labels`, int64 [length], each of its own length.

    Args:
        encoded: the records.
        records: which of them, int64 [samples].
        limit: the most tokens of a sample.
        all_tokens: the prompt counts too.

    Attributes:
        lengths: of each sample, int64 [samples].
    """

    def __init__(
        self, encoded: EncodedInstructions, records: NDArray[np.int64], limit: int, *, all_tokens: bool
    ) -> None:
        self._encoded = encoded
        self._records = records
        self._limit = limit
        self._all_tokens = all_tokens
        self.lengths: NDArray[np.int64] = np.minimum(encoded.lengths[records], limit)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = int(self._records[index])
        ids = torch.from_numpy(self._encoded.ids(record, self._limit))
        labels = ids.clone()
        if not self._all_tokens:
            labels[: int(self._encoded.prompt_lengths[record])] = IGNORED_LABEL
        return {"input_ids": ids, "labels": labels}


def pad_rows(samples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Return samples of any lengths as columns [batch, longest]: ids filled up at the end, labels with what counts not.

    No mask is needed: in causal attention no token sees what stands behind it, and nothing is computed of what fills up.

    Args:
        samples: each with `input_ids` and `labels`, int64 [length].
        pad_id: the id that fills up; any of the vocabulary's.
    """
    ids = [sample["input_ids"] for sample in samples]
    labels = [sample["labels"] for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_id),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


@dataclass(frozen=True)
class InstructionData:
    """Instructions that are ready to train on.

    Attributes:
        train: samples to train on.
        held_out: samples to evaluate on, from short to long.
        tokenizer: what made the ids.
        lines: what was read and made, for the user.
    """

    train: InstructionSamples
    held_out: InstructionSamples
    tokenizer: TextTokenizer
    lines: tuple[str, ...]


def prepare_instructions(
    source: InstructionSource,
    tokenizer: TextTokenizer | None,
    options: InstructionOptions,
    *,
    log: Log | None = None,
    progress: StageProgress | None = None,
) -> InstructionData:
    """Encode a source, and hold a share out unless it has a validation part.

    Every rank may call it at the same time: one does the work, the others wait for the files.

    Args:
        source: the records.
        tokenizer: what encodes them; None: one is trained on them.
        options: lengths, shares and places.
        log: told when something is waited for or made again.
        progress: told how far each stage is, in the process that does the work.

    Raises:
        DataError: there are too few records, or none has an answer within the length.
        ModelError: the tokenizer cannot be trained, or has no token that ends a text.
    """
    folder = options.cache_folder or default_cache_folder()
    fingerprint = source.fingerprint()
    if tokenizer is None:
        tokenizer = trained_tokenizer(
            _Texts(source, fingerprint),
            options.vocab_size,
            cache_folder=folder,
            layout=options.layout,
            progress=None if progress is None else lambda done, total: progress("training the tokenizer", done, total),
            log=log,
        )
    if tokenizer.eos_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name} has no token that ends a text, which an answer needs: take another, or "
            "name one as eos_token in its tokenizer_config.json"
        )
    encoded = {}
    for split, records in source.splits.items():
        key = key_of("instructions", _VERSION, PROMPT_VERSION, fingerprint, tokenizer.fingerprint(), split)
        build = _builder(records, tokenizer, f"encoding {split}", progress)
        encoded[split] = EncodedInstructions(built_once(folder, "instructions", key, build, log=log))
    return _selected(source, encoded, tokenizer, options)


def _builder(
    records: Sequence[Instruction], tokenizer: TextTokenizer, stage: str, progress: StageProgress | None
) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        total = sum(len(record.prompt) + len(record.output) for record in records)
        # What every text begins with stands before the prompt, and not again before the answer.
        prefix, end = len(tokenizer.special_prefix), [tokenizer.eos_id]
        lengths, done = [0], 0
        prompts: list[int] = []
        with TokenWriter(folder / _TOKENS_FILE, token_dtype(tokenizer.vocab_size)) as writer:
            for first in range(0, len(records), _BATCH):
                batch = records[first : first + _BATCH]
                before = tokenizer.encode_batch([record.prompt for record in batch])
                after = tokenizer.encode_batch([record.output for record in batch])
                whole = [[*ask, *answer[prefix:], *end] for ask, answer in zip(before, after, strict=True)]
                writer.append(np.fromiter(chain.from_iterable(whole), dtype=np.int64, count=sum(map(len, whole))))
                lengths += map(len, whole)
                prompts += map(len, before)
                done += sum(len(record.prompt) + len(record.output) for record in batch)
                if progress is not None:
                    progress(stage, done, total)
        places = {"starts": np.cumsum(lengths, dtype=np.int64), "prompts": np.array(prompts, dtype=np.int64)}
        save_file(places, folder / _PLACES_FILE)

    return build


def _selected(
    source: InstructionSource,
    encoded: Mapping[str, EncodedInstructions],
    tokenizer: TextTokenizer,
    options: InstructionOptions,
) -> InstructionData:
    """Choose the records that have something to count, and hold some out."""
    limit = options.sequence_length
    usable, left_out, cut = {}, 0, 0
    for split, part in encoded.items():
        # The first token of all is never predicted.
        uncounted = 1 if options.all_tokens else np.maximum(part.prompt_lengths, 1)
        counts = np.minimum(part.lengths, limit) - uncounted > 0
        usable[split] = np.flatnonzero(counts).astype(np.int64)
        left_out += int((~counts).sum())
        cut += int((part.lengths[counts] > limit).sum())
    train, held_out, held_from = usable["train"], usable.get("validation"), encoded.get("validation")
    if held_out is None or held_from is None:
        train, held_out = _held_out(train, options.holdout_share)
        held_from = encoded["train"]
    if not len(train) or not len(held_out):
        raise DataError(
            f"{source.name} has {len(train) + len(held_out):,} records with an answer within --sequence-length {limit}"
            f" ({left_out:,} have none), and at least one to train on and one to evaluate on are needed: give more "
            "records, or a longer --sequence-length"
        )
    held_out = held_out[np.argsort(held_from.lengths[held_out], kind="stable")]
    tokens = int(encoded["train"].lengths[train].clip(max=limit).sum())
    lines = [
        f"data       {source.description}",
        f"tokenizer  {tokenizer.describe()}",
        f"samples    {len(train):,} to train on ({tokens:,} tokens), {len(held_out):,} held out",
    ]
    if source.malformed:
        lines.append(f"malformed  {len(source.malformed):,} left out: {'; '.join(source.malformed[:3])}")
    if cut:
        lines.append(f"cut        {cut:,} longer than {limit:,} tokens, at their end")
    if left_out:
        lines.append(f"left out   {left_out:,} whose prompt alone fills {limit:,} tokens: nothing in them would count")
    return InstructionData(
        InstructionSamples(encoded["train"], train, limit, all_tokens=options.all_tokens),
        InstructionSamples(held_from, held_out, limit, all_tokens=options.all_tokens),
        tokenizer,
        tuple(lines),
    )


def _held_out(records: NDArray[np.int64], share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the records to train on and those held out: at least one, and at least one is left."""
    if len(records) < 2:
        return records, records[:0]
    count = min(max(1, round(len(records) * share)), len(records) - 1)
    order = epoch_permutation(len(records), _HOLDOUT_SEED, 0)
    return records[np.sort(order[count:])], records[np.sort(order[:count])]


class _Texts(TextSource):
    """Instructions as the text that a tokenizer is trained on: each record a document, as the model sees it."""

    def __init__(self, source: InstructionSource, fingerprint: str) -> None:
        self.name = source.name
        self._records = source.splits["train"]
        self._fingerprint = key_of("instructions as text", PROMPT_VERSION, fingerprint)

    def fingerprint(self) -> str:
        return self._fingerprint

    def describe(self) -> str:
        return self.name

    def _read(self, split: str) -> Any:  # noqa: ARG002  there is one
        return (record.prompt + record.output for record in self._records)
