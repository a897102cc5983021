"""A path as a user typed it, before anything is done with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from albireo.errors import ConfigError

__all__ = ["user_path"]

_SHOWN_CHARACTERS = 60


def user_path(flag: str, text: str) -> Path:
    """Return the path that a text means, `~` expanded; whether there is anything is the caller's business.

    Args:
        flag: the option it was given by, for messages.
        text: what was typed. A name that is no path, such as a size or a hub id, comes back as it is.

    Raises:
        ConfigError: no path can be called that, or the system does not let it be looked at.
    """
    if not text.strip():
        # Mostly a shell's variable that is not set: taking the default, or the working folder, would be a bad surprise.
        raise ConfigError(f"{flag} is empty: give a name, or leave {flag} out")
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    try:
        text.encode()
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except UnicodeEncodeError as error:
        # config.json, which is UTF-8, could not hold it.
        raise ConfigError(f"{flag} {shown!a} is not valid UTF-8: give it another name") from error
    except RuntimeError as error:
        raise ConfigError(f"{flag} {shown}: there is no home folder of that user; write the path out") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {shown} cannot be looked at: {reason}") from error
    return path
