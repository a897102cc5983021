from __future__ import annotations

import pytest

from albireo.data import SpecialTokens, TextTokenizer, train_tokenizer
from albireo.data.synthetic import SyntheticSource
from albireo.errors import ModelError


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(SyntheticSource(size_bytes=60_000).documents())


@pytest.fixture(scope="module")
def trained(stories: list[str]) -> TextTokenizer:
    return train_tokenizer(stories, 600)


def test_the_layout_is_opts(trained: TextTokenizer) -> None:
    assert trained.vocab_size == 600
    assert (trained.bos_id, trained.pad_id, trained.eos_id) == (2, 1, 2)
    assert trained.special_prefix == (2,)
    ids = trained.encode_batch(["", "x", "</s><s><pad><unk>"])
    assert ids[0] == [2]
    assert ids[1][0] == 2
    assert ids[2] == [2, 2, 0, 1, 3]


def test_training_is_deterministic(stories: list[str], trained: TextTokenizer) -> None:
    assert train_tokenizer(stories, 600).fingerprint() == trained.fingerprint()
    assert train_tokenizer(stories, 601).fingerprint() != trained.fingerprint()
    assert train_tokenizer(stories[1:], 600).fingerprint() != trained.fingerprint()


def test_any_text_comes_back(trained: TextTokenizer, stories: list[str]) -> None:
    texts = [*stories[:20], "wörld \t\n  𝛌 \x00 日本", " two  spaces ", "\r\n"]
    ids = trained.encode_batch(texts)
    assert [trained.decode(one) for one in ids] == texts
    assert sum(map(len, ids[:20])) < 0.45 * sum(map(len, texts[:20]))


def test_a_small_text_makes_a_small_vocabulary() -> None:
    assert train_tokenizer(["ab ab"], 4096).vocab_size < 270


def test_progress_is_told_in_bytes(stories: list[str]) -> None:
    seen: list[tuple[int, int | None]] = []
    train_tokenizer(stories, 300, lambda done, total: seen.append((done, total)))
    size_bytes = len("".join(stories).encode())
    assert seen[-1] == (size_bytes, size_bytes)
    assert seen[0] == (len(stories[0].encode()), None)


def test_a_vocabulary_has_room_for_every_byte() -> None:
    assert train_tokenizer(["a"], 260).vocab_size == 260
    with pytest.raises(ModelError, match=r"a vocabulary of 259 is too small: .* need at least 260"):
        train_tokenizer(["a"], 259)


def test_an_error_of_the_source_comes_through() -> None:
    def broken() -> object:
        yield "text"
        raise ModelError("the reason")

    with pytest.raises(ModelError, match="the reason"):
        train_tokenizer(broken(), 300)  # type: ignore[arg-type]


def test_special_tokens_have_to_be_there(trained: TextTokenizer) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer of x names '<eot>' as its eos token, but does not hold it"):
        TextTokenizer(trained._tokenizer, SpecialTokens(eos="<eot>"), "x")
