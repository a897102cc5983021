"""Plugins by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from albireo.config import PluginConfig
from albireo.errors import ConfigError
from albireo.plugins.base import Plugin
from albireo.plugins.gemini import GeminiPlugin
from albireo.plugins.low_level_zero import LowLevelZeroPlugin
from albireo.plugins.torch_ddp import TorchDDPPlugin
from albireo.plugins.torch_fsdp import TorchFSDPPlugin

__all__ = ["PLUGINS", "make_plugin"]


def _torch_ddp(config: PluginConfig) -> Plugin:
    return TorchDDPPlugin(precision=config.precision or "fp32")


def _torch_fsdp(config: PluginConfig) -> Plugin:
    return TorchFSDPPlugin(precision=config.precision or "fp32", cpu_offload=config.cpu_offload)


def _low_level_zero(config: PluginConfig) -> Plugin:
    return LowLevelZeroPlugin(
        stage=config.zero_stage or 2, precision=config.precision or "fp32", cpu_offload=config.cpu_offload
    )


def _gemini(config: PluginConfig) -> Plugin:
    return GeminiPlugin(
        placement_policy=config.placement,
        shard_param_frac=config.shard_param_frac,
        offload_optim_frac=config.offload_optim_frac,
        offload_param_frac=config.offload_param_frac,
        stream_optim_frac=config.stream_optim_frac,
        precision=config.precision or "fp32",
        max_prefetch=2 if config.prefetch is None else config.prefetch,
        mem_cap_bytes=int(config.mem_cap * 2**30) or None,
        host_cap_bytes=int(config.host_cap * 2**30) or None,
    )


PLUGINS: Mapping[str, Callable[[PluginConfig], Plugin]] = MappingProxyType(
    {
        "torch_ddp": _torch_ddp,
        "torch_ddp_fp16": _torch_ddp,  # `resolve` has set the precision
        "torch_fsdp": _torch_fsdp,
        "low_level_zero": _low_level_zero,
        "gemini": _gemini,
    }
)


def make_plugin(config: PluginConfig) -> Plugin:
    """Return the plugin that a configuration asks for.

    Args:
        config: a resolved configuration.

    Raises:
        ConfigError: there is no plugin of that name.
    """
    if config.plugin not in PLUGINS:
        raise ConfigError(f"--plugin is one of {', '.join(PLUGINS)}, not {config.plugin!r}")
    return PLUGINS[config.plugin](config)
