"""What every source of text gives: documents by split, and a fingerprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from albireo.errors import DataError

__all__ = ["TextSource"]


class TextSource(ABC):
    """A text to train on, read as a stream of documents.

    Attributes:
        name: what the user called it, for messages.
        splits: the parts that there are: ("train",) or ("train", "validation").
    """

    name: str
    splits: tuple[str, ...] = ("train",)

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, of the content and of how it is read; where it lies does not count."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for the user: what is read, and what was left aside."""

    @abstractmethod
    def _read(self, split: str) -> Iterator[str]:
        """Yield the documents of a split that exists."""

    def size_bytes(self, split: str) -> int | None:  # noqa: ARG002  a default: most sources cannot know it beforehand
        """Return the bytes of UTF-8 that the documents of a split come to, or None if only reading tells."""
        return None

    def documents(self, split: str = "train") -> Iterator[str]:
        """Yield the documents of a split, each a string with its own line breaks, always in the same order.

        Raises:
            DataError: there is no such split, something in it cannot be read, or all of it is white space.
        """
        if split not in self.splits:
            raise DataError(f"{self.name} has no {split} split; it has {' and '.join(self.splits)}")
        blank = True
        for document in self._read(split):
            blank = blank and not document.strip()
            yield document
        if blank:
            raise DataError(f"the {split} data of {self.name} holds no text, only white space; give data with text")
