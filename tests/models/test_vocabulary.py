from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import ModelError
from albireo.models import Vocabulary, reconcile_vocabulary


def config(rows: int = 50272, bos: int | None = 2, eos: Any = 2, pad: int | None = 1) -> Any:
    return SimpleNamespace(vocab_size=rows, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)


def changes(rows: int, bos: int | None = None, eos: int | None = None, pad: int | None = None) -> dict[str, Any]:
    return {"vocab_size": rows, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


def test_random_weights_keep_the_familys_rows_for_a_smaller_tokenizer() -> None:
    got, lines = reconcile_vocabulary(config(), Vocabulary(50257, eos=50256), init="random")
    assert got == changes(50272, eos=50256)
    assert lines == ["the tokenizer uses 50,257 of the embedding's 50,272 rows"]


def test_random_weights_grow_for_a_larger_tokenizer() -> None:
    got, lines = reconcile_vocabulary(config(), Vocabulary(60000, 0, 1, 2), init="random")
    assert got == changes(60000, 0, 1, 2)
    assert lines == ["the embedding has 60,000 rows instead of 50,272: the tokenizer needs them"]


@pytest.mark.parametrize("size", [300, 4096, 50257])
def test_tiny_fits_its_tokenizer(size: int) -> None:
    got, lines = reconcile_vocabulary(config(4096), Vocabulary(size), init="random", fits_vocabulary=True)
    assert got["vocab_size"] == size
    assert len(lines) == (size > 4096)


def test_without_a_padding_token_no_row_is_frozen() -> None:
    """OPT's padding id, 1, is a quotation mark to GPT-2's tokenizer."""
    got, _ = reconcile_vocabulary(config(), Vocabulary(50257, bos=50256, eos=50256), init="random")
    assert got["pad_token_id"] is None
    got, lines = reconcile_vocabulary(config(), Vocabulary(50257, bos=50256, eos=50256), init="pretrained")
    assert got["pad_token_id"] is None
    assert "the pad token is none as in the tokenizer; the model's was id 1" in lines


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_padding_token_that_ends_texts_too_is_a_real_one(init: Any) -> None:
    got, _ = reconcile_vocabulary(config(), Vocabulary(50257, bos=0, eos=7, pad=7), init=init)
    assert got["pad_token_id"] is None
    assert got["eos_token_id"] == 7


def test_trained_weights_and_their_own_tokenizer_agree() -> None:
    assert reconcile_vocabulary(config(), Vocabulary(50272, 2, 2, 1), init="pretrained") == ({}, [])


def test_trained_weights_say_what_differs() -> None:
    got, lines = reconcile_vocabulary(config(), Vocabulary(50265, 0, 2, 1), init="pretrained")
    assert got == {"bos_token_id": 0}
    assert lines == [
        "the tokenizer uses 50,265 of the embedding's 50,272 rows",
        "the bos token is id 0 as in the tokenizer; the model's was id 2",
    ]


def test_one_of_several_ends_is_no_difference() -> None:
    assert reconcile_vocabulary(config(eos=[2, 5]), Vocabulary(50272, 2, 5, 1), init="pretrained") == ({}, [])


def test_trained_weights_with_too_few_rows_are_refused() -> None:
    with pytest.raises(ModelError, match=r"50,273 ids but the model's weights have 50,272 rows.*--init random"):
        reconcile_vocabulary(config(), Vocabulary(50273), init="pretrained")


def test_a_special_token_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ModelError, match="eos token has id 300: expected one of its 300 ids"):
        reconcile_vocabulary(config(), Vocabulary(300, eos=300), init="random")


_IDS = st.one_of(st.none(), st.integers(0, 299))


@given(
    rows=st.integers(300, 1000), size=st.integers(300, 1200), bos=_IDS, eos=_IDS, pad=_IDS, own=_IDS, fits=st.booleans()
)
def test_whatever_the_tokenizer_every_id_has_a_row_and_no_real_token_is_frozen(
    rows: int, size: int, bos: int | None, eos: int | None, pad: int | None, own: int | None, fits: bool
) -> None:
    model = config(rows, own, own, own)
    inits = ["random", "pretrained"] if size <= rows else ["random"]
    for init in inits:
        got, _ = reconcile_vocabulary(
            model,
            Vocabulary(size, bos, eos, pad),
            init=init,
            fits_vocabulary=fits and init == "random",  # type: ignore[arg-type]
        )
        after = {**vars(model), **got}
        assert after["vocab_size"] >= size
        padding = after["pad_token_id"]
        assert padding is None or (padding == pad and padding not in (bos, eos))
        assert after["bos_token_id"] == bos or (init == "pretrained" and bos is None)
    assert vars(model) == vars(config(rows, own, own, own)), "the configuration itself is not touched"
