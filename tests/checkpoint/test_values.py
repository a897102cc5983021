import json
import math
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.checkpoint import decode_value, encode_value
from albireo.errors import CheckpointError

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text()) | st.just("!")
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, st.integers()).map(Counter)
    ),
    max_leaves=20,
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@given(values)
def test_what_is_read_back_is_the_same(value: Any) -> None:
    text = json.dumps(encode_value(value, "value"), allow_nan=False)
    assert same(decode_value(json.loads(text)), value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(1), "state is a Tensor"),
        ({"a": [1, object()]}, r"state\.a\[1\] is a object"),
        ({"f": print}, r"state\.f is a builtin_function_or_method"),
        ({(1, print): 2}, "state's key"),
        (OrderedDict(a=1), "state is a OrderedDict"),
        ({"s": {1, 2}}, r"state\.s is a set"),
    ],
)
def test_what_has_no_form_is_named(value: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        encode_value(value, "state")


@pytest.mark.parametrize(
    "value",
    [
        {"!": "tuple"},
        {"!": "float", "value": "1e5"},
        {"!": "object", "items": []},
        {"!": "dict", "items": [[1]]},
        {"!": "dict", "items": [[[], 1]]},
        {"!": "counter", "items": 7},
    ],
)
def test_what_was_not_written_so_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        decode_value(value)
