"""A data set of the Hugging Face hub as a source of text, through the `datasets` package."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from albireo.data.hub import hub_is_reachable
from albireo.data.readers import record_text
from albireo.data.split_names import assign_splits
from albireo.data.text_source import TextSource
from albireo.errors import DataError

__all__ = ["HubSource", "Loader", "candidates", "load_tables", "open_hub"]

Loader = Callable[[str, str | None], Any]
"""Takes the name of a data set and a configuration or None; returns a `datasets.DatasetDict`."""

_MOVED = MappingProxyType({"wikitext": "Salesforce/wikitext"})
_LOCAL_HINT = "give a local text file or folder instead, or --data synthetic"
_ROWS = 1000


class HubSource(TextSource):
    """Text out of the rows of a data set.

    Args:
        name: what the user called it.
        tables: the data sets by split, each a `datasets.Dataset`.
        text_field: the column that holds the text.

    Raises:
        DataError: there is no split with rows, or no such column.
    """

    def __init__(self, name: str, tables: Mapping[str, Any], text_field: str = "text") -> None:
        plan = assign_splits(str(split) for split, table in tables.items() if len(table))
        if not plan.train:
            raise DataError(f"the data set {name} has no rows; {_LOCAL_HINT}")
        parts = {"train": plan.train, "validation": plan.validation}
        self.name = name
        self.splits = tuple(split for split, names in parts.items() if names)
        self._tables = {split: [(part, tables[part]) for part in parts[split]] for split in self.splits}
        self._text_field = text_field
        self._left_aside = plan.left_aside
        self._fingerprint: str | None = None
        for tables_of_split in self._tables.values():
            for part, table in tables_of_split:
                if text_field not in table.column_names:
                    raise DataError(
                        f'the {part} split of {name} has no column "{text_field}"; its columns are: '
                        f"{', '.join(table.column_names)}. Name the one with the text by --text-field"
                    )

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts; reads the whole data set once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"hub 1")
            for split in self.splits:
                digest.update(f"\0{split}\0".encode())
                for text in self._read(split):
                    data = text.encode()
                    # Lengths keep apart what joins to the same bytes: "ab" and "c" are not "a" and "bc".
                    digest.update(len(data).to_bytes(8, "little"))
                    digest.update(data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def describe(self) -> str:
        """Return one line for the user, with the splits that were left aside."""
        counts = [
            f"{split} {sum(len(table) for _, table in tables):,} rows ({', '.join(part for part, _ in tables)})"
            for split, tables in self._tables.items()
        ]
        aside = f"; left aside: {', '.join(self._left_aside)}" if self._left_aside else ""
        return f"{self.name} of the Hugging Face hub: {'; '.join(counts)}{aside}"

    def _read(self, split: str) -> Iterator[str]:
        for part, table in self._tables[split]:
            column = table.select_columns([self._text_field])
            for first in range(0, len(column), _ROWS):
                try:
                    texts = column[first : first + _ROWS][self._text_field]
                except (OSError, ValueError) as error:  # the files of its cache
                    raise DataError(f"the data set {self.name} cannot be read: {_first_line(error)}") from error
                for row, text in enumerate(texts, start=first):
                    where = f"row {row} of the {part} split of {self.name}"
                    yield record_text({self._text_field: text}, self._text_field, where)


def open_hub(name: str, text_field: str = "text", load: Loader | None = None) -> HubSource:
    """Open a data set of the hub: `owner/name/config`, `owner/name`, or `name/config`.

    Args:
        name: as above. Two parts may mean either, so both are tried.
        text_field: the column that holds the text.
        load: what loads it; `datasets.load_dataset`, or its cache where the hub cannot be reached, if None.

    Raises:
        DataError: `datasets` is missing, the hub cannot be reached, or it has no such data set.
    """
    return HubSource(name, load_tables(name, load), text_field)


def load_tables(name: str, load: Loader | None = None) -> Mapping[str, Any]:
    """Return the splits of a data set of the hub, each a `datasets.Dataset`.

    Args:
        name: as for `open_hub`.
        load: as for `open_hub`.

    Raises:
        DataError: `datasets` is missing, the hub cannot be reached, or it has no such data set.
    """
    meanings = candidates(name)
    load = load if load is not None else default_loader()
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    reasons: list[str] = []
    for repository, config in meanings:
        try:
            tables = load(repository, config)
        except DatasetNotFoundError as error:
            reasons.append(_first_line(error))
        except ConnectionError:
            reasons.append("the Hugging Face hub cannot be reached, or HF_HUB_OFFLINE is set")
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise DataError(f"the data set {name} cannot be loaded: {_first_line(error)}; {_LOCAL_HINT}") from error
        else:
            found: Mapping[str, Any] = tables
            return found
    raise DataError(f"there is no file or folder {name}, and no such data set: {reasons[0]}; {_LOCAL_HINT}")


def candidates(name: str) -> list[tuple[str, str | None]]:
    """Return what a name of the hub may mean, (repository, configuration), the likeliest first. Pure.

    Raises:
        DataError: the name does not have two or three parts.
    """
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(
            f"there is no file or folder {name!r}, and a data set of the Hugging Face hub is named "
            f"owner/name/config, owner/name or name/config"
        )
    if len(parts) == 3:
        return [(f"{parts[0]}/{parts[1]}", parts[2])]
    if parts[0] in _MOVED:
        return [(_MOVED[parts[0]], parts[1])]
    return [(name, None), (parts[0], parts[1])]


def default_loader(cache_folder: Path | None = None, *, reachable: Callable[[], bool] = hub_is_reachable) -> Loader:
    """Return what loads data sets: from the hub, or, where it cannot be reached, from the cache of `datasets`.

    Args:
        cache_folder: where `datasets` keeps what it loaded; its own choice if None.
        reachable: tells whether the hub can be reached; asked once, when the first data set is loaded.

    Raises:
        DataError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"a data set of the Hugging Face hub needs the package datasets: pip install 'albireo[hub]'; "
            f"or {_LOCAL_HINT}"
        ) from error

    online: list[bool] = []

    def load(repository: str, config: str | None) -> Any:
        if not online:
            online.append(reachable())
        if online[0]:
            return datasets.load_dataset(repository, config, cache_dir=cache_folder)
        return _load_cached(repository, config, cache_folder)

    return load


def _load_cached(repository: str, config: str | None, cache_folder: Path | None) -> Any:
    """Load what `datasets` has prepared before, without a single request; a ConnectionError if it has not."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            repo_id=repository,
            dataset_name=repository.rsplit("/", maxsplit=1)[-1],
            config_name=config,
            version="auto",
            hash="auto",
            cache_dir=None if cache_folder is None else str(cache_folder),
        )
        return builder.as_dataset()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"{repository} is not in the cache: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
