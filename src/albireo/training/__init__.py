"""THE loop, the recipes, the model wrapper and the run folder.

Read `loop` first. Nothing is imported here, so that the command line answers a wrong flag at once: import what you
need from its file.
"""

__all__: list[str] = []
