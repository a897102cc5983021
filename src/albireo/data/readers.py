"""Documents out of one file: plain text by lines, or JSON records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from albireo.errors import DataError

__all__ = [
    "JSON_SUFFIXES",
    "is_json",
    "kind_of",
    "read_lines",
    "read_records",
    "read_values",
    "reading",
    "record_text",
]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_LONGEST_LINE_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_json(path: Path) -> bool:
    """Whether a file is read as JSON records: by its name alone."""
    return path.suffix.lower() in JSON_SUFFIXES


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; whatever the system says against it becomes a DataError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_lines(path: Path, longest_line_bytes: int = _LONGEST_LINE_BYTES) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 text file, each with its line break, as Hugging Face's `run_clm` example reads them.

    A line break written as "\r\n" is read as "\n". Lines beyond `longest_line_bytes` are cut into several documents,
    before a space where there is one: a text of a gigabyte may be one single line, and memory has to stay bounded.

    Raises:
        DataError: the file cannot be read, or a byte is not UTF-8; it names the file and the byte's offset.
    """
    with reading(path) as file:
        offset_bytes = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        file.seek(offset_bytes)
        held = b""
        while block := file.readline(longest_line_bytes):
            line = held + block
            end = len(line) if block.endswith(b"\n") or len(block) < longest_line_bytes else _cut(line)
            line, held = line[:end], line[end:]
            text = _decode(line, path, offset_bytes)
            offset_bytes += end
            yield text.removesuffix("\r\n") + "\n" if text.endswith("\r\n") else text
        if held:
            yield _decode(held, path, offset_bytes)


def _cut(line: bytes) -> int:
    """Where to end a piece of a line that goes on: before its last space, or at least between two characters."""
    space = line.rfind(b" ")
    if space > 0:
        return space
    end = len(line)
    while end > len(line) - 4 and line[end - 1] & 0xC0 == 0x80:  # a byte that continues a character
        end -= 1
    if line[end - 1] >= 0xC0:  # the byte that begins it: leave the whole character to the next piece
        end -= 1
    return end if end > 0 else len(line)


def _decode(data: bytes, path: Path, offset_bytes: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset_bytes + error.start} "
            f"cannot be decoded; convert the file to UTF-8"
        ) from error


def read_records(path: Path, text_field: str) -> Iterator[str]:
    """Yield one field of every record of a file of JSON lines, or of one JSON array.

    Lines are read one by one; an array is read as a whole, into memory. Empty lines are skipped.

    Raises:
        DataError: the file cannot be read, a line is no JSON object, or its field is missing or no string; it names
            the file, the line and what came.
    """
    for where, value in read_values(path):
        if isinstance(value, DataError):
            raise value
        yield record_text(value, text_field, where)


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every value of a file of JSON lines, or of one JSON array, with where it stands.

    A line that is no JSON comes as the DataError that says so: it is up to the caller what that means.

    Raises:
        DataError: the file cannot be read, or is an array that is no JSON.
    """
    with reading(path) as file:
        if _first_sign(file) == b"[":
            yield from _read_array(file, path)
            return
        offset_bytes = file.tell()
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    value = _parse(_decode(line, path, offset_bytes), where)
                except DataError as error:
                    value = error
                yield where, value
            offset_bytes += len(line)


def _first_sign(file: BinaryIO) -> bytes:
    """Return the first byte that is no white space; the file is left at its first byte after a byte order mark."""
    start = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
    file.seek(start)
    sign = file.read(1)
    while sign.isspace():
        sign = file.read(1)
    file.seek(start)
    return sign


def _read_array(file: BinaryIO, path: Path) -> Iterator[tuple[str, Any]]:
    offset_bytes = file.tell()
    records = _parse(_decode(file.read(), path, offset_bytes), str(path))
    for number, record in enumerate(records, start=1):
        yield f"{path} record {number}", record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        # A line is parsed by itself: the parser's own "line 1" would contradict the number that is named here.
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where} is not JSON: {reason}") from error


def record_text(record: object, text_field: str, where: str) -> str:
    """Return the text of one record.

    Args:
        record: what one line of JSON, or one row of a data set, held.
        text_field: the name of the field that holds the text.
        where: which record it is, for messages.

    Raises:
        DataError: the record is no object, the field is missing, no string, or a string that is not valid Unicode.
    """
    if not isinstance(record, dict):
        raise DataError(f'{where} holds {kind_of(record)}; expected an object such as {{"{text_field}": "..."}}')
    if text_field not in record:
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(
            f'{where} has no field "{text_field}"; its fields are: {fields}. Name the one with the text by --text-field'
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f'field "{text_field}" of {where} is {kind_of(text)}; expected a string')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f'field "{text_field}" of {where} is not valid Unicode: half a surrogate pair at character {error.start}'
        ) from error
    return text


def kind_of(value: object) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = ((str, "a string"), (dict, "an object"), (list, "an array"), ((int, float), "a number"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")
