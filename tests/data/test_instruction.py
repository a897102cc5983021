"""What a record must be to be an instruction."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.data import Instruction, parse_instruction

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(["instruction", "input", "output", "text"]), VALUES)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("a text", "it is a string, not an object"),
        ([1], "it is an array, not an object"),
        (None, "it is null, not an object"),
        ({"instruction": "a", "input": "b"}, 'it has no field "output"'),
        ({"input": "b", "output": "c"}, 'it has no field "instruction"'),
        ({"instruction": "a", "output": 3}, 'its "output" is a number, not a string'),
        ({"instruction": None, "output": "c"}, 'its "instruction" is null, not a string'),
        ({"instruction": " \n", "output": "c"}, 'its "instruction" is empty'),
        ({"instruction": "a", "output": ""}, 'its "output" is empty'),
        ({"instruction": "a", "input": {}, "output": "c"}, 'its "input" is an object, not a string'),
        ({"instruction": "a\ud800", "output": "c"}, 'its "instruction" is not valid Unicode'),
    ],
)
def test_what_is_none_says_why(record: Any, said: str) -> None:
    assert parse_instruction(record) == said


@pytest.mark.parametrize("record", [{}, {"input": None}, {"input": ""}])
def test_an_input_may_be_missing(record: dict[str, Any]) -> None:
    assert parse_instruction({"instruction": "a", "output": "b", **record}) == Instruction("a", "", "b")


@settings(max_examples=40)
@given(record=st.one_of(VALUES, RECORDS))
def test_anything_is_an_instruction_or_a_reason(record: Any) -> None:
    parsed = parse_instruction(record)
    if isinstance(parsed, Instruction):
        assert parsed.instruction.strip()
        assert parsed.output.strip()
        assert parsed.prompt.encode()
    else:
        assert parsed
        assert "\n" not in parsed
