"""Data sets of blocks of token ids, all of one length: packed text, and random ids for measuring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from albireo.data.mixing import random_bits, random_key
from albireo.data.tokens import TokenStream
from albireo.errors import ConfigError, DataError

__all__ = ["RandomTokens", "TokenBlocks", "pack", "split_blocks"]

Sample = dict[str, Tensor]
"""`input_ids`: int64, [sequence_length]."""


class _Blocks(Dataset[Sample]):
    """What both kinds share: many blocks are made in one operation, and handed out as rows of it."""

    sequence_length: int

    def __len__(self) -> int:
        raise NotImplementedError

    def _ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids of blocks, [blocks, sequence_length]."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        wanted = np.asarray(indices, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise IndexError(f"block {int(outside[0])} of {len(self)}")
        rows = torch.from_numpy(self._ids(wanted))
        return [{"input_ids": row} for row in rows.unbind(0)]


class TokenBlocks(_Blocks):
    """A run of a token stream, cut into blocks of equal length.

    Args:
        stream: the tokens.
        sequence_length: tokens in a block.
        first_block: where the run begins, in blocks.
        blocks: how many blocks it has; as many whole ones as follow if None.

    Raises:
        DataError: the stream has fewer blocks.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, first_block: int = 0, blocks: int | None = None
    ) -> None:
        there_are = _whole_blocks(len(stream), sequence_length)
        blocks = there_are - first_block if blocks is None else blocks
        if first_block < 0 or blocks < 1 or first_block + blocks > there_are:
            raise DataError(
                f"blocks {first_block}..{first_block + blocks - 1} of {sequence_length} tokens were asked for; "
                f"{len(stream)} tokens make {there_are}"
            )
        self.stream = stream
        self.sequence_length = sequence_length
        self._first_block = first_block
        self._blocks = blocks

    def __len__(self) -> int:
        return self._blocks

    def _ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        first_token = self._first_block * self.sequence_length
        run = self.stream.ids[first_token : first_token + self._blocks * self.sequence_length]
        return run.reshape(self._blocks, self.sequence_length)[indices].astype(np.int64)


class RandomTokens(_Blocks):
    """Uniform random ids, for measuring: a function of the seed and the index, with no memory behind it.

    Args:
        blocks: how many blocks.
        sequence_length: tokens in a block.
        vocab_size: ids are drawn from 0..vocab_size-1.
        seed: which ids.

    Raises:
        ConfigError: a number is below 1, or there are more than 2**32 ids to draw from.
    """

    def __init__(self, blocks: int, sequence_length: int, vocab_size: int, seed: int) -> None:
        if blocks < 1 or sequence_length < 1 or not 1 <= vocab_size <= 2**32:
            raise ConfigError(
                f"blocks, tokens in a block and ids must be at least 1: {blocks}, {sequence_length} and {vocab_size}"
            )
        self.sequence_length = sequence_length
        self._blocks = blocks
        self._vocab_size = vocab_size
        self._key = random_key(seed)

    def __len__(self) -> int:
        return self._blocks

    def _ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        places = indices[:, None] * self.sequence_length + np.arange(self.sequence_length, dtype=np.int64)
        bits = random_bits(self._key, places.astype(np.uint64))
        # The upper 32 bits, scaled: as even as a remainder, and much quicker than a division.
        return (((bits >> np.uint64(32)) * np.uint64(self._vocab_size)) >> np.uint64(32)).astype(np.int64)


def pack(stream: TokenStream, sequence_length: int, what: str = "the data") -> TokenBlocks:
    """Cut a stream into blocks, as Hugging Face's language-modelling example does; the rest at the end is dropped.

    Args:
        stream: the tokens.
        sequence_length: tokens in a block.
        what: the data's name, for messages.

    Raises:
        DataError: there is not one whole block.
    """
    if _whole_blocks(len(stream), sequence_length) < 1:
        raise _too_short(stream, sequence_length, 1, what)
    return TokenBlocks(stream, sequence_length)


def split_blocks(
    stream: TokenStream, sequence_length: int, holdout_share: float, what: str = "the data"
) -> tuple[TokenBlocks, TokenBlocks]:
    """Cut a stream into blocks, and hold out the last ones for evaluation: at least one, and at least one is left.

    Args:
        stream: the tokens.
        sequence_length: tokens in a block.
        holdout_share: share of the blocks that is held out, above 0 and below 1.
        what: the data's name, for messages.

    Returns:
        The blocks to train on, and those held out.

    Raises:
        ConfigError: the share is not between 0 and 1.
        DataError: there are fewer than two whole blocks.
    """
    if not 0 < holdout_share < 1:
        raise ConfigError(f"the share of the data that is held out must lie between 0 and 1, not {holdout_share}")
    blocks = _whole_blocks(len(stream), sequence_length)
    if blocks < 2:
        raise _too_short(stream, sequence_length, 2, what)
    held_out = min(max(1, round(blocks * holdout_share)), blocks - 1)
    return (
        TokenBlocks(stream, sequence_length, 0, blocks - held_out),
        TokenBlocks(stream, sequence_length, blocks - held_out, held_out),
    )


def _whole_blocks(tokens: int, sequence_length: int) -> int:
    if sequence_length < 2:  # a block of one token has nothing to predict
        raise ConfigError(f"--sequence-length must be at least 2, not {sequence_length}")
    return tokens // sequence_length


def _too_short(stream: TokenStream, sequence_length: int, needed: int, what: str) -> DataError:
    tokens = len(stream)
    uses = "one block" if needed == 1 else "two blocks, one to train on and one to evaluate on,"
    longest = tokens // needed
    remedy = f"a --sequence-length of at most {longest}, or more text" if longest >= 2 else "more text"
    return DataError(
        f"{what} has {tokens:,} tokens, and {uses} of {sequence_length:,} need {needed * sequence_length:,}: give {remedy}"
    )
