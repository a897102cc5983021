"""What a step does with chunks over time: recorded while it runs, kept as JSON, drawn, and read in words."""

from albireo.memory.tracing.files import TRACE_FILE, read_trace, write_trace
from albireo.memory.tracing.reading import describe_trace
from albireo.memory.tracing.timeline import Timeline

__all__ = ["TRACE_FILE", "Timeline", "describe_trace", "read_trace", "write_trace"]
