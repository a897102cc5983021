"""JSON that is sealed with its own checksum, and read back with no trust in it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from albireo.errors import CheckpointError

__all__ = ["JSON", "Fields", "NewerFormatError", "decode_document", "encode_document", "to_plain"]

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"

FORMAT = "albireo-checkpoint"
VERSION = 1
MAX_DOCUMENT_BYTES = 256 * 2**20
_MAX_INTEGER_BITS = 1024

_SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"\}\n')
_SEAL_BYTES = len(', "sha256": ""}\n') + 64


class NewerFormatError(CheckpointError):
    """The checkpoint is whole, but of a format that this version cannot read."""


def to_plain(value: object, where: str) -> JSON:
    """Return a value as what JSON gives back: mappings become dicts, and tuples lists.

    Raises:
        CheckpointError: a part is NaN or infinite, a key is no text, or a type has no form in JSON; `where` says which.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}; JSON needs text as keys, so save str({key!r})")
        return {key: to_plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(part, f"{where}[{index}]") for index, part in enumerate(value)]
    what = _short(value) if isinstance(value, float | int) else f"a {type(value).__name__}"
    raise CheckpointError(f"{where} is {what}, which JSON cannot hold; save None, text or a tensor instead")


def encode_document(content: Mapping[str, JSON]) -> bytes:
    """Return a JSON object, on one line, whose last member is the SHA-256 of all bytes before it.

    Args:
        content: the members but the format, its version and the checksum, which are added.

    Raises:
        CheckpointError: a value has no exact form in JSON, or the document is too large to be read back.
    """
    plain = {key: to_plain(value, key) for key, value in content.items()}
    members = {"format": FORMAT, "version": VERSION, **plain}
    body = json.dumps(members, allow_nan=False)[:-1].encode()
    if len(body) > MAX_DOCUMENT_BYTES - _SEAL_BYTES:
        raise CheckpointError(
            f"the JSON of a checkpoint would be {len(body)} bytes long, and {MAX_DOCUMENT_BYTES} is the most: "
            "save large states as tensors"
        )
    return body + f', "sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def decode_document(data: bytes, where: str) -> Fields:
    """Check and parse what `encode_document` wrote.

    The seal is the same in every version of the format, so a document that was altered is never taken for a newer one.

    Args:
        data: all bytes of the file.
        where: the file's name, for errors.

    Raises:
        NewerFormatError: the document is whole, and of a later version of the format.
        CheckpointError: it was cut short or altered, or is no document of a checkpoint.
    """
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if seal is None:
        raise CheckpointError(f"{where} was cut short or altered: it does not end with its checksum")
    if hashlib.sha256(data[:-_SEAL_BYTES]).hexdigest().encode() != seal.group(1):
        raise CheckpointError(f"{where} was altered: its content does not have the checksum at its end")
    fields = Fields(_parse(data, where), where)
    fields.text("sha256")
    if fields.text("format") != FORMAT:
        raise CheckpointError(f"{where} is not of a checkpoint: its format is not {FORMAT!r}")
    version = fields.integer("version", minimum=1)
    if version > VERSION:
        raise NewerFormatError(
            f"{where} was written by a newer Albireo: its format has version {version}, and this one reads up to "
            f"{VERSION}; update Albireo"
        )
    return fields


def _parse(data: bytes, where: str) -> object:
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return members


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:50]} is too large a number")
    return number


class Fields:
    """The members of a parsed JSON object; each is checked as it is taken.

    Args:
        value: what was parsed.
        where: what it was parsed from, for errors.

    Raises:
        CheckpointError: it is no object; from the methods: the member is missing or of another type.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} must be a JSON object, but is a {type(value).__name__}")
        self._members: dict[str, Any] = value
        self.where = where

    def integer(self, key: str, *, minimum: int = 0, maximum: int = 2**63 - 1) -> int:
        """Take a whole number within bounds."""
        value = self._take(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise CheckpointError(
                f"{self.where}: {key} must be a whole number of {minimum} to {maximum}, but is {_short(value)}"
            )
        return value

    def text(self, key: str) -> str:
        """Take a text."""
        value = self._take(key)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}: {key} must be text, but is {_short(value)}")
        return value

    def array(self, key: str) -> list[Any]:
        """Take a list."""
        value = self._take(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.where}: {key} must be a list, but is {_short(value)}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Take an object."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {key} must be an object, but is {_short(value)}")
        return value

    def _take(self, key: str) -> Any:  # JSON is of any type until it is checked
        if key not in self._members:
            raise CheckpointError(f"{self.where}: {key} is missing")
        return self._members[key]


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
