"""Albireo trains a large model on little hardware, as if device memory and host memory were one.

Importing the package changes nothing and loads nothing heavy.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
