"""What has been measured so far, a line a round, so that a bench that was broken off goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from albireo.bench.case import Case, CaseResult
from albireo.errors import ConfigError, RunFolderError

__all__ = ["KeptRounds"]


class KeptRounds:
    """The file `rounds.jsonl` of a bench's folder.

    Args:
        path: the file, which need not be there.

    Raises:
        RunFolderError: the file cannot be read, or a line of it is no round.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[Case, list[CaseResult]] = {}
        try:
            lines = path.read_text().split("\n") if path.exists() else [""]
            if lines[-1]:
                # What was killed while it wrote: cut, so that the next line does not follow on half a line.
                path.write_text("".join(f"{line}\n" for line in lines[:-1]))
        except OSError as error:
            raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
        for number, line in enumerate(lines[:-1], 1):
            try:
                values = json.loads(line)
                result = CaseResult(case=Case.from_mapping(values.pop("case")), **values)
            except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
                raise RunFolderError(
                    f"{path}: line {number} is no round of this bench: take another --output"
                ) from error
            # What failed may have been mended since; running out of memory is an answer.
            if result.status != "failed":
                self._found.setdefault(result.case, []).append(result)

    def of(self, case: Case) -> list[CaseResult]:
        """Return the rounds of a case, in the order in which they were measured."""
        return list(self._found.get(case, ()))

    def add(self, result: CaseResult) -> None:
        """Keep a round.

        Raises:
            ConfigError: the rounds before are of another machine, or of other versions.
            RunFolderError: the file cannot be written.
        """
        before = next((r.versions for rounds in self._found.values() for r in rounds if r.versions), result.versions)
        if result.versions and before != result.versions:
            raise ConfigError(
                f"the rounds in {self._path} are of another machine or of other versions "
                f"({', '.join(before.values())}): take another --output"
            )
        self._found.setdefault(result.case, []).append(result)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
        except OSError as error:
            raise RunFolderError(f"cannot write {self._path}: {error.strerror or error}") from error
