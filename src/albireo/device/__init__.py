"""The machine under a run: its device, its memory, its random state, and the only counters of peaks."""

from albireo.device.attention import attention_for_many_shapes
from albireo.device.cap import apply_device_cap, device_room_bytes
from albireo.device.clock import Moment
from albireo.device.machine import describe_device, detect_device_type, device_count, has_native_bf16, select_device
from albireo.device.memory import HostMemory, device_total_bytes, host_room_bytes, read_host_memory
from albireo.device.peaks import PeakMemory, PeakReading
from albireo.device.random_state import capture_random_state, restore_random_state, seed_everything, seed_of
from albireo.device.readback import Readback

__all__ = [
    "HostMemory",
    "Moment",
    "PeakMemory",
    "PeakReading",
    "Readback",
    "apply_device_cap",
    "attention_for_many_shapes",
    "capture_random_state",
    "describe_device",
    "detect_device_type",
    "device_count",
    "device_room_bytes",
    "device_total_bytes",
    "has_native_bf16",
    "host_room_bytes",
    "read_host_memory",
    "restore_random_state",
    "seed_everything",
    "seed_of",
    "select_device",
]
