"""Gemini: two memories as one. What a model is trained with lies on the device, or on the host, as the room allows."""

from albireo.memory.gemini import Gemini, Setting
from albireo.memory.planner import MemoryLimits, PlacementPolicy

__all__ = ["Gemini", "MemoryLimits", "PlacementPolicy", "Setting"]
