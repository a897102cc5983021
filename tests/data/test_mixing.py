from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from albireo.data.mixing import random_bits, random_key


@given(st.integers(), st.integers())
def test_a_key_is_64_bits_and_depends_on_every_part_and_on_their_order(seed: int, epoch: int) -> None:
    key = random_key(seed, epoch)
    assert 0 <= key < 2**64
    assert key != random_key(seed, epoch + 1)
    assert key != random_key(seed + 1, epoch)
    if seed != epoch:
        assert key != random_key(epoch, seed)


def test_known_numbers_stay_what_they_are() -> None:
    # SplitMix64 from state 0 begins with these, in its authors' own code.
    bits = random_bits(0, np.arange(3, dtype=np.uint64))
    assert [hex(int(word)) for word in bits] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_all_words_differ_and_every_bit_is_even() -> None:
    bits = random_bits(random_key(7), np.arange(20_000, dtype=np.uint64))
    assert len(np.unique(bits)) == len(bits)
    for shift in range(64):
        share = float(((bits >> np.uint64(shift)) & np.uint64(1)).mean())
        assert abs(share - 0.5) < 0.02
