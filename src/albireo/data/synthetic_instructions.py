"""Instructions made up on the spot, small enough to be learnt: sums, opposites, counting, reversing, and fair copies."""

from __future__ import annotations

from random import Random

from albireo.data.instruction import Instruction

__all__ = ["synthetic_instructions"]

_OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("old", "new"), ("light", "dark"), ("fast", "slow"), ("high", "low"),
    ("near", "far"), ("early", "late"), ("full", "empty"), ("soft", "hard"), ("wet", "dry"), ("long", "short"),
)  # fmt: skip
_WORDS = ("apple", "boat", "cloud", "door", "egg", "field", "glass", "hill", "island", "jar", "kite", "lamp")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def synthetic_instructions(seed: int = 0, count: int = 2000) -> tuple[Instruction, ...]:
    """Return made-up records; the same seed gives the same ones.

    Args:
        seed: which.
        count: how many.
    """
    random = Random(seed)  # noqa: S311  no secret hangs on it
    return tuple(_made(random) for _ in range(count))


def _made(random: Random) -> Instruction:
    kind = random.randrange(5)
    words = random.sample(_WORDS, random.randint(2, 5))
    if kind == 0:
        first, second = random.randrange(6), random.randrange(5)
        return Instruction(
            f"Add {_NUMBERS[first]} and {_NUMBERS[second]}.", "", f"The sum is {_NUMBERS[first + second]}."
        )
    if kind == 1:
        pair = random.choice(_OPPOSITES)
        word, opposite = pair if random.random() < 0.5 else pair[::-1]
        return Instruction("Give the opposite of the word.", word, f"The opposite of {word} is {opposite}.")
    if kind == 2:
        return Instruction("Count the words.", " ".join(words), f"There are {_NUMBERS[len(words)]} words.")
    if kind == 3:
        return Instruction("Write the words in reverse order.", " ".join(words), " ".join(reversed(words)))
    return Instruction("Write a list of the words, one in each line.", " ".join(words), "\n".join(words))
