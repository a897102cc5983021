from __future__ import annotations

import hashlib
import json
import math
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.checkpoint.documents import NewerFormatError, decode_document, encode_document, to_plain
from albireo.errors import CheckpointError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


def sealed(body: str) -> bytes:
    """Seal any text as a document, as one who forges a checkpoint would."""
    data = body.rstrip("}").encode()
    return data + f', "sha256": "{hashlib.sha256(data).hexdigest()}"}}\n'.encode()


def head(**members: object) -> str:
    return json.dumps({"format": "albireo-checkpoint", "version": 1, **members})


@settings(max_examples=50)
@given(value=values)
def test_any_json_comes_back_exactly(value: object) -> None:
    fields = decode_document(encode_document({"state": {"x": value}}), "a.json")
    assert fields.mapping("state") == {"x": value}
    assert repr(fields.mapping("state")["x"]) == repr(value)


def test_a_document_is_plain_json_with_its_checksum_last() -> None:
    data = encode_document({"step": 3})
    content = json.loads(data)
    assert list(content) == ["format", "version", "step", "sha256"]
    assert data.endswith(b"}\n")


def test_other_containers_become_plain() -> None:
    assert to_plain(MappingProxyType({"betas": (0.9, 0.999)}), "x") == {"betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "state.x is nan, which JSON cannot hold"),
        (math.inf, "state.x is inf, which JSON cannot hold"),
        ([0, {"y": -math.inf}], r"state.x\[1\].y is -inf"),
        ({3: 1}, "state.x has the key 3; JSON needs text as keys"),
        (b"bytes", "state.x is a bytes"),
        (1 << 5000, "state.x is a huge number"),
        ({1, 2}, "state.x is a set"),
    ],
)
def test_what_json_would_change_or_lose_is_refused(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encode_document({"state": {"x": value}})  # type: ignore[dict-item]


def test_every_cut_and_every_changed_byte_is_found() -> None:
    data = encode_document({"step": 3, "text": "some text"})
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match=r"^m\.json was cut short or altered"):
            decode_document(data[:length], "m.json")
    for index in range(len(data)):
        for flip in (0x01, 0x20, 0xFF):
            altered = bytes([*data[:index], data[index] ^ flip, *data[index + 1 :]])
            with pytest.raises(CheckpointError, match=r"^m\.json was (cut short or )?altered"):
                decode_document(altered, "m.json")
    with pytest.raises(CheckpointError, match="altered"):
        decode_document(data + b"\n", "m.json")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{no json", "is not valid JSON"),
        ("[1, 2", "is not valid JSON"),
        (head()[:-1] + ', "x": NaN', "NaN is not a number of JSON"),
        (head()[:-1] + ', "x": -Infinity', "-Infinity is not a number"),
        (head()[:-1] + ', "x": 1e999', "1e999 is too large"),
        (head()[:-1] + ', "x": 1, "x": 2', "a key comes twice"),
        (head()[:-1] + ', "x": ' + "9" * 5000, "is not valid JSON"),
        (head()[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000, "is not valid JSON"),
        ('{"format": "another", "version": 1', "is not of a checkpoint"),
        ('{"version": 1', "format is missing"),
        ('{"format": "albireo-checkpoint", "version": true', "version must be a whole number"),
        ('{"format": "albireo-checkpoint", "version": 0', "version must be a whole number"),
        ('{"format": "albireo-checkpoint", "version": 1.0', "version must be a whole number"),
    ],
)
def test_forged_json_is_refused(body: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        decode_document(sealed(body), "m.json")
    assert str(caught.value).startswith("m.json")


def test_a_newer_version_is_told_from_damage() -> None:
    with pytest.raises(NewerFormatError, match="written by a newer Albireo: its format has version 2"):
        decode_document(sealed('{"format": "albireo-checkpoint", "version": 2'), "m.json")


def test_fields_say_what_was_expected_and_what_came() -> None:
    fields = decode_document(encode_document({"n": -1, "t": 5, "a": {}, "m": []}), "m.json")
    with pytest.raises(CheckpointError, match=r"m\.json: n must be a whole number of 0 to \d+, but is -1"):
        fields.integer("n")
    with pytest.raises(CheckpointError, match=r"m\.json: t must be text, but is 5"):
        fields.text("t")
    with pytest.raises(CheckpointError, match=r"m\.json: a must be a list"):
        fields.array("a")
    with pytest.raises(CheckpointError, match=r"m\.json: m must be an object"):
        fields.mapping("m")
    with pytest.raises(CheckpointError, match=r"m\.json: z is missing"):
        fields.integer("z")
