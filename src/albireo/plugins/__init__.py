"""One file a plugin: each chooses mechanisms and wires them, and holds no algorithm of its own."""

from albireo.plugins.base import Criterion, ModelWrapper, Plugin
from albireo.plugins.catalog import PLUGINS, make_plugin
from albireo.plugins.gemini import GeminiPlugin
from albireo.plugins.low_level_zero import LowLevelZeroPlugin
from albireo.plugins.torch_ddp import TorchDDPPlugin
from albireo.plugins.torch_fsdp import TorchFSDPPlugin

__all__ = [
    "PLUGINS",
    "Criterion",
    "GeminiPlugin",
    "LowLevelZeroPlugin",
    "ModelWrapper",
    "Plugin",
    "TorchDDPPlugin",
    "TorchFSDPPlugin",
    "make_plugin",
]
