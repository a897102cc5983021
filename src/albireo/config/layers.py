"""A configuration is made of layers: defaults, a file, flags. Later layers win; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from albireo.config.option import OptionInfo
from albireo.config.run import PLUGIN_OPTIONS, RunConfig
from albireo.errors import ConfigError

__all__ = ["config_from_mapping", "config_to_mapping", "merge", "read_config_file"]

# Either of two options that say the same thing twice replaces what an earlier layer said by the other.
_RIVALS = {"steps": "epochs", "epochs": "steps"}
# So do shares, which mean a static placement, and an automatic one; what is said together is left to be refused.
_SHARES = ("offload_optim_frac", "offload_param_frac", "shard_param_frac")


def config_to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON values, one mapping a section."""
    return dataclasses.asdict(config)


def config_from_mapping(values: Mapping[str, Any], *, where: str, base: RunConfig | None = None) -> RunConfig:
    """Lay the values of a file over a configuration.

    Args:
        values: a mapping of sections, as `config_to_mapping` makes it; any part may be left out.
        where: what to call the file in an error.
        base: what is laid under it; the defaults if None.

    Returns:
        The new configuration.

    Raises:
        ConfigError: an unknown section or key, or a wrong value.
    """
    config = base if base is not None else RunConfig()
    sections = RunConfig.sections(config.recipe)
    flat: dict[str, Any] = {}
    for key, part in values.items():
        if key == "recipe":
            if part != config.recipe:
                raise ConfigError(f"{where} is for the recipe {part!r}, and this is {config.recipe!r}")
            continue
        if key not in sections:
            raise ConfigError(f"{where}: unknown section {key!r}{_suggestion(key, list(sections))}")
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: section {key!r} must be an object, not {part!r}")
        known = {field.name for field in dataclasses.fields(sections[key])}
        for name, value in part.items():
            if name not in known:
                raise ConfigError(f"{where}: unknown key {key}.{name}{_suggestion(name, sorted(known))}")
            flat[name] = value
    try:
        return merge(config, flat)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def merge(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Lay options by their flat names over a configuration.

    Args:
        config: what is laid under.
        values: option name to value.

    Returns:
        The new configuration. Steps given alone take the place of epochs, and the other way round; so do shares and an
        automatic placement; with another plugin, what the one before alone has is gone; with another kind of adapter, so
        are the options of the one before.

    Raises:
        ConfigError: an unknown name or a wrong value.
    """
    infos: dict[str, OptionInfo] = {info.name: info for info in RunConfig.options(config.recipe)}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in infos:
            raise ConfigError(f"the recipe {config.recipe} has no option {name!r}{_suggestion(name, sorted(infos))}")
        info = infos[name]
        changes.setdefault(info.section, {})[name] = info.check(value)
        rival = _RIVALS.get(name)
        if rival is not None and rival not in values and value is not None:
            changes[info.section][rival] = None
    if values.get("placement") == "auto":
        for name in _SHARES:
            changes["plugin"].setdefault(name, None)
    if config.plugin.placement == "auto" and any(values.get(name) is not None for name in _SHARES):
        changes["plugin"].setdefault("placement", None)
    # What one plugin alone has says nothing of another, and no flag takes it back.
    if values.get("plugin", config.plugin.plugin) != config.plugin.plugin:
        for name in PLUGIN_OPTIONS:
            changes["plugin"].setdefault(name, infos[name].default)
    if values.get("adapter", config.adapter.adapter) != config.adapter.adapter:
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
            changes["adapter"].setdefault(name, None)
    sections = {name: dataclasses.replace(getattr(config, name), **part) for name, part in changes.items()}
    return dataclasses.replace(config, **sections)


def read_config_file(path: Path, *, base: RunConfig | None = None) -> RunConfig:
    """Read a JSON configuration.

    Args:
        path: the file.
        base: what is laid under it; the defaults if None.

    Returns:
        The configuration.

    Raises:
        ConfigError: the file is missing, is not JSON, or holds an unknown key or a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ConfigError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a JSON object with the sections of --print-config")
    return config_from_mapping(values, where=str(path), base=base)


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
