"""A trace's files: JSON, Chrome's form and a picture, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from albireo.errors import RunFolderError
from albireo.files import FileOperations
from albireo.memory.tracing.chrome import to_chrome
from albireo.memory.tracing.picture import draw_timeline
from albireo.memory.tracing.timeline import Timeline

__all__ = ["CHROME_FILE", "PICTURE_FILE", "TRACE_FILE", "read_trace", "write_trace"]

TRACE_FILE, CHROME_FILE, PICTURE_FILE = "trace.json", "trace-chrome.json", "trace.png"


def write_trace(timeline: Timeline, folder: Path, files: FileOperations | None = None) -> None:
    """Write a timeline's three files; each is replaced whole or not at all.

    Args:
        timeline: a step's.
        folder: which is made if it is not there.
        files: what touches the disk.

    Raises:
        RunFolderError: something cannot be written.
    """
    files = files if files is not None else FileOperations()
    content = {
        TRACE_FILE: json.dumps(timeline.to_mapping(), indent=1).encode(),
        CHROME_FILE: json.dumps(to_chrome(timeline)).encode(),
        PICTURE_FILE: draw_timeline(timeline),
    }
    try:
        if not folder.is_dir():
            files.make_directory(folder)
        for name, data in content.items():
            files.replace(folder / name, data)
    except OSError as error:
        raise RunFolderError(f"cannot write a trace in {folder}: {error.strerror or error}") from error


def read_trace(path: Path) -> Timeline:
    """Read a timeline.

    Args:
        path: the JSON file, or the folder that has it.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    file = path / TRACE_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        hint = ": a run writes it with --plugin gemini --trace" if path.is_dir() else ""
        raise RunFolderError(f"cannot read {file}: {error.strerror or error}{hint}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a million brackets
        raise RunFolderError(f"{file} is no trace: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{file} is no trace: it must hold a JSON object")
    return Timeline.of_mapping(content, str(file))
