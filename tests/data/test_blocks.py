from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.data import RandomTokens, TokenBlocks, TokenStream, pack, split_blocks
from albireo.data.tokens import TokenWriter, token_dtype
from albireo.errors import ConfigError, DataError


def stream(folder: Path, tokens: int, vocab_size: int = 4096) -> TokenStream:
    path = folder / f"{tokens}.safetensors"
    with TokenWriter(path, token_dtype(vocab_size)) as writer:
        writer.append(np.arange(tokens, dtype=np.int64) % vocab_size)
    return TokenStream(path)


def test_blocks_are_the_stream_cut_up_and_the_rest_is_dropped(tmp_path: Path) -> None:
    blocks = pack(stream(tmp_path, 35), 8)
    assert len(blocks) == 4
    assert torch.cat([blocks[index]["input_ids"] for index in range(4)]).tolist() == list(range(32))
    assert blocks[0]["input_ids"].dtype == torch.int64
    assert blocks[2]["input_ids"].shape == (8,)


def test_many_blocks_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    for blocks in (pack(stream(tmp_path, 800), 8), RandomTokens(100, 8, 50, seed=3)):
        indices = [5, 99, 0, 5]
        together = blocks.__getitems__(indices)
        assert [item["input_ids"].tolist() for item in together] == [blocks[i]["input_ids"].tolist() for i in indices]


@given(st.integers(16, 400), st.integers(2, 8), st.floats(0.001, 0.999))
def test_a_share_is_held_out(tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, share: float) -> None:
    source = stream(tmp_path_factory.getbasetemp(), tokens)
    train, held_out = split_blocks(source, length, share)
    blocks = tokens // length
    assert len(train) + len(held_out) == blocks
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - blocks * share) <= 1
    ids = [item["input_ids"] for part in (train, held_out) for item in part.__getitems__(range(len(part)))]
    assert torch.cat(ids).tolist() == list(range(blocks * length))


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (1500, 1024, r"x has 1,500 tokens, and two blocks, one to train on and one to evaluate on, of 1,024 need 2,048: give a --sequence-length of at most 750, or more text"),
        (3, 8, r"x has 3 tokens, .* need 16: give more text"),
    ],
)  # fmt: skip
def test_text_that_is_too_short_says_what_would_do(tmp_path: Path, tokens: int, length: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_blocks(stream(tmp_path, tokens), length, 0.1, "x")


def test_one_whole_block_is_enough_without_holding_out(tmp_path: Path) -> None:
    assert len(pack(stream(tmp_path, 8), 8)) == 1
    with pytest.raises(
        DataError, match="the data has 7 tokens, and one block of 8 need 8: give a --sequence-length of at most 7"
    ):
        pack(stream(tmp_path, 7), 8)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_lies_between_0_and_1(tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        split_blocks(stream(tmp_path, 100), 8, share)


def test_a_block_has_something_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sequence-length must be at least 2, not 1"):
        pack(stream(tmp_path, 100), 1)


def test_indices_and_runs_outside_are_refused(tmp_path: Path) -> None:
    source = stream(tmp_path, 80)
    blocks = TokenBlocks(source, 8, 2, 3)
    assert blocks[0]["input_ids"][0] == 16
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"block {index} of 3"):
            blocks[index]
    with pytest.raises(DataError, match="80 tokens make 10"):
        TokenBlocks(source, 8, 2, 9)


def test_ids_above_uint16(tmp_path: Path) -> None:
    blocks = pack(stream(tmp_path, 70_000, 100_000), 7000)
    assert blocks[9]["input_ids"][-1] == 69_999


def test_a_copy_for_another_process_reads_the_same(tmp_path: Path) -> None:
    blocks = pack(stream(tmp_path, 80), 8)
    assert copy.deepcopy(blocks)[3]["input_ids"].tolist() == blocks[3]["input_ids"].tolist()


def test_random_tokens_are_even_and_follow_the_seed() -> None:
    blocks = RandomTokens(1000, 64, 50, seed=1)
    ids = torch.stack([item["input_ids"] for item in blocks.__getitems__(range(1000))])
    assert ids.dtype == torch.int64
    assert (int(ids.min()), int(ids.max())) == (0, 49)
    counts = torch.bincount(ids.flatten(), minlength=50) / ids.numel()
    assert float((counts - 1 / 50).abs().max()) < 0.003
    assert len({tuple(row.tolist()) for row in ids}) == 1000
    assert RandomTokens(10, 64, 50, seed=1)[7]["input_ids"].tolist() == ids[7].tolist()
    assert RandomTokens(10, 64, 50, seed=2)[7]["input_ids"].tolist() != ids[7].tolist()


def test_random_tokens_need_no_memory() -> None:
    blocks = RandomTokens(10**9, 2048, 50272, seed=0)
    assert len(blocks) == 10**9
    assert int(blocks[10**9 - 1]["input_ids"].max()) < 50272


@pytest.mark.parametrize("arguments", [(0, 8, 5), (1, 0, 5), (1, 8, 0), (1, 8, 2**32 + 1)])
def test_random_tokens_refuse_what_cannot_be(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        RandomTokens(*arguments, seed=0)
