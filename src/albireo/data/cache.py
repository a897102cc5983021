"""Tokenized text and trained tokenizers, made once and kept on disk by what they were made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from albireo.data.store import built_once, key_of
from albireo.data.text_source import TextSource
from albireo.data.tokenizer import TextTokenizer
from albireo.data.tokenizer_loading import load_tokenizer
from albireo.data.tokenizer_training import OPT_TOKENS, TokenLayout, train_tokenizer
from albireo.data.tokens import TokenStream, TokenWriter, token_dtype
from albireo.errors import DataError
from albireo.log import Log

__all__ = ["Progress", "tokenize", "trained_tokenizer"]

Progress = Callable[[int, int | None], None]
"""Told the bytes of text that are done, and how many there are, or None where only the end will tell."""

_TOKENS_VERSION = 1
_TOKENIZER_VERSION = 2
_BATCH_BYTES = 2**21
_BATCH_DOCUMENTS = 8192
_TOKENS_FILE = "tokens.safetensors"


def tokenize(
    source: TextSource,
    tokenizer: TextTokenizer,
    split: str,
    *,
    cache_folder: Path,
    progress: Progress | None = None,
    log: Log | None = None,
) -> TokenStream:
    """Return all documents of a split as one stream of ids, as the tokenizer gives them, one after another.

    The stream is kept in the cache folder under a key made of the content, the tokenizer and the split. Documents are
    encoded in parallel, some megabytes at a time, so that memory stays bounded.

    Args:
        source: the text.
        tokenizer: what encodes it.
        split: "train" or "validation".
        cache_folder: where streams are kept.
        progress: told how far it is, by the process that does it.
        log: told when a damaged stream is made again.

    Raises:
        DataError: the text cannot be read, has no tokens, or the cache folder cannot be written.
    """

    def build(folder: Path) -> None:
        with TokenWriter(folder / _TOKENS_FILE, token_dtype(tokenizer.vocab_size)) as writer:
            total_bytes, done_bytes = source.size_bytes(split), 0
            for batch, batch_bytes in _batches(source.documents(split)):
                encoded = tokenizer.encode_batch(batch)
                writer.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=sum(map(len, encoded))))
                done_bytes += batch_bytes
                if progress is not None:
                    progress(done_bytes, None if total_bytes is None else max(total_bytes, done_bytes))
            if not writer.count:
                raise DataError(f"the {split} data of {source.name} has no tokens")
        if progress is not None:
            progress(done_bytes, done_bytes)

    key = key_of("tokens", _TOKENS_VERSION, source.fingerprint(), tokenizer.fingerprint(), split)
    return TokenStream(built_once(cache_folder, "tokens", key, build, log=log) / _TOKENS_FILE)


def trained_tokenizer(
    source: TextSource,
    vocab_size: int,
    *,
    cache_folder: Path,
    layout: TokenLayout = OPT_TOKENS,
    progress: Progress | None = None,
    log: Log | None = None,
) -> TextTokenizer:
    """Return a tokenizer trained on the training split; trained once, then kept in the cache folder.

    Args:
        source: the text.
        vocab_size: the most entries, special tokens included.
        cache_folder: where tokenizers are kept.
        layout: its special tokens.
        progress: told how far the reading is.
        log: told when a damaged tokenizer is made again.

    Raises:
        DataError: the text cannot be read, or the cache folder cannot be written.
        ModelError: `vocab_size` is too small.
    """

    def build(folder: Path) -> None:
        train_tokenizer(source.documents("train"), vocab_size, progress, layout).save(folder)

    key = key_of("tokenizer", _TOKENIZER_VERSION, source.fingerprint(), vocab_size, layout.name)
    loaded = load_tokenizer(built_once(cache_folder, "tokenizers", key, build, log=log))
    return loaded.renamed(f"trained on {source.name}")


def _batches(documents: Iterable[str]) -> Iterator[tuple[list[str], int]]:
    """Yield documents some megabytes at a time, and the bytes of each batch."""
    batch: list[str] = []
    batch_bytes = 0
    for document in documents:
        batch.append(document)
        batch_bytes += len(document.encode())
        if batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch, batch_bytes
            batch, batch_bytes = [], 0
    if batch:
        yield batch, batch_bytes
