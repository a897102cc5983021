"""One instruction with its answer, and what a record must be to be one. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from albireo.data.prompt import prompt_of
from albireo.data.readers import kind_of

__all__ = ["FIELDS", "Instruction", "parse_instruction"]

FIELDS = ("instruction", "input", "output")
"""The fields of a record, as in Alpaca's data; `input` may be missing, null or empty."""


@dataclass(frozen=True)
class Instruction:
    """A record.

    Attributes:
        instruction: what is asked for.
        input: what it is about; "" if there is nothing.
        output: the answer.
    """

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """The text before the answer."""
        return prompt_of(self.instruction, self.input)


def parse_instruction(record: object) -> Instruction | str:
    """Return a record as an instruction, or in a few words why it is none.

    Args:
        record: what one line of JSON, or one row of a data set, held.
    """
    if not isinstance(record, Mapping):
        return f"it is {kind_of(record)}, not an object"
    texts = {}
    for field in FIELDS:
        value = record.get(field)
        if value is None and field == "input":
            value = ""
        if field not in record and field != "input":
            return f'it has no field "{field}"'
        if not isinstance(value, str):
            return f'its "{field}" is {kind_of(value)}, not a string'
        if field != "input" and not value.strip():
            return f'its "{field}" is empty'
        try:
            value.encode()
        except UnicodeEncodeError:
            return f'its "{field}" is not valid Unicode'
        texts[field] = value
    return Instruction(**texts)
