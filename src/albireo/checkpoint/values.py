"""Python values in JSON, and back to what they were: tuples, infinities, mappings with keys of any kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from albireo.checkpoint.documents import JSON
from albireo.errors import CheckpointError

__all__ = ["decode_value", "encode_value"]

# An object with this key stands for a value that JSON has no form for.
_KIND = "!"


def encode_value(value: object, where: str) -> JSON:
    """Return a value in JSON such that `decode_value` gives an equal one of the same type.

    Args:
        value: None, numbers, texts, and lists, tuples, dicts and counters of such.
        where: what it is, for errors.

    Raises:
        CheckpointError: a part is of another type; `where` and the way to it say which.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_KIND: "float", "value": str(value)}
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [encode_value(part, f"{where}[{i}]") for i, part in enumerate(value)]}
    if isinstance(value, list):
        return [encode_value(part, f"{where}[{i}]") for i, part in enumerate(value)]
    if type(value) is dict and _KIND not in value and all(isinstance(key, str) for key in value):
        return {key: encode_value(part, f"{where}.{key}") for key, part in value.items()}
    if type(value) in (dict, Counter) and isinstance(value, Mapping):
        pairs = [[encode_value(k, f"{where}'s key"), encode_value(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {_KIND: "counter" if isinstance(value, Counter) else "dict", "items": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: only numbers, texts, None, and lists, tuples and "
        "dicts of them are saved"
    )


def decode_value(value: JSON) -> Any:
    """Return what `encode_value` was given.

    Raises:
        CheckpointError: the value was not written by `encode_value`.
    """
    if isinstance(value, list):
        return [decode_value(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if _KIND not in value:
        return {key: decode_value(part) for key, part in value.items()}
    kind, items = value[_KIND], value.get("items")
    if kind == "float" and value.get("value") in ("inf", "-inf", "nan"):
        return float(str(value["value"]))
    if kind == "tuple" and isinstance(items, list):
        return tuple(decode_value(part) for part in items)
    if kind in ("dict", "counter") and isinstance(items, list):
        try:
            pairs = {decode_value(key): decode_value(part) for key, part in items}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"a {kind} of the file is damaged: {error}") from error
        return Counter(pairs) if kind == "counter" else pairs
    raise CheckpointError(f"a value of the file is of the unknown kind {kind!r}: update Albireo")
