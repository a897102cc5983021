"""From what a user calls the data to a source of text."""

from __future__ import annotations

from pathlib import Path

from albireo.data.files import open_files
from albireo.data.hub_source import candidates, open_hub
from albireo.data.readers import JSON_SUFFIXES
from albireo.data.synthetic import SyntheticSource
from albireo.data.text_source import TextSource
from albireo.errors import DataError

__all__ = ["check_source", "local_path", "open_source"]

# A configuration on the hub may have a dot in its name (20231101.en), so that not every ending is a file's.
_FILE_SUFFIXES = frozenset({
    *JSON_SUFFIXES, ".arrow", ".bz2", ".csv", ".gz", ".htm", ".html", ".log", ".md", ".parquet", ".raw", ".rst", ".tar",
    ".tex", ".text", ".tokens", ".tsv", ".txt", ".xml", ".zip", ".zst",
})  # fmt: skip


def open_source(name: str, *, text_field: str = "text", seed: int = 0) -> TextSource:
    """Open the text that a user named.

    Args:
        name: `synthetic`; a text file, a file of JSON records or a folder of them; or a data set of the Hugging Face
            hub as `owner/name/config`, `owner/name` or `name/config`. What exists as a path is a path; a folder
            that is called synthetic is `./synthetic`.
        text_field: the field of JSON records, or the column of a data set, that holds the text.
        seed: which synthetic text.

    Raises:
        DataError: there is nothing of that name, or it cannot be read.
    """
    if name == "synthetic":
        return SyntheticSource(seed)
    path = local_path(name)
    return open_hub(name, text_field) if path is None else open_files(path, name, text_field)


def check_source(name: str, *, text_field: str = "text") -> None:
    """Find out what can be known without reading a text or asking the hub.

    Args:
        name: as for `open_source`.
        text_field: as for `open_source`.

    Raises:
        DataError: there is no such file, nothing in the folder, or no data set of the hub could be called that.
    """
    if name == "synthetic":
        return
    path = local_path(name)
    if path is None:
        candidates(name)
    else:
        open_files(path, name, text_field)


def local_path(name: str) -> Path | None:
    """Return the path that a name of data means; None if it can only be a name on the hub.

    Args:
        name: what the user called it.

    Raises:
        DataError: nothing was named, or there is no such path.
    """
    if not name.strip():
        raise DataError("no data was named; give a file, a folder, a data set of the hub, or synthetic")
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # names that are too long, or hold a zero byte
        raise DataError(f"{name!r} cannot be a file: {error}") from error
    if exists:
        return path
    if name.startswith((".", "/", "~", "\\")) or path.suffix.lower() in _FILE_SUFFIXES or name.endswith("/"):
        raise DataError(f"no such file or folder: {name}")
    return None
