"""The embedded default text: a small generated language that can be learnt.

Little stories of people who carry things about. What makes it more than noise: pronouns follow the name, nouns and
verbs agree in number, counts are added up right, days follow one another, a trade decides the place and the material,
the weather decides what is taken along, and the last sentence repeats what only the first ones said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from albireo.data.text_source import TextSource

__all__ = ["SyntheticSource"]

# fmt: off
_NUMBERS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "twenty-one", "twenty-two",
    "twenty-three", "twenty-four",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_THINGS = (
    ("apple", "apples"), ("berry", "berries"), ("book", "books"), ("box", "boxes"), ("brush", "brushes"),
    ("coin", "coins"), ("egg", "eggs"), ("feather", "feathers"), ("flower", "flowers"), ("knife", "knives"),
    ("lamp", "lamps"), ("leaf", "leaves"), ("letter", "letters"), ("loaf", "loaves"), ("map", "maps"),
    ("orange", "oranges"), ("pear", "pears"), ("ring", "rings"), ("rope", "ropes"), ("shell", "shells"),
    ("stone", "stones"), ("watch", "watches"), ("wheel", "wheels"), ("whistle", "whistles"),
)
_LOOKS = (
    "big", "blue", "bright", "broken", "clean", "cold", "golden", "green", "heavy", "light", "new", "old", "pale",
    "red", "round", "small", "soft", "white",
)
_TRADES = (  # a trade, its place and its material
    ("baker", "bakery", "flour"), ("carpenter", "workshop", "wood"), ("doctor", "hospital", "medicine"),
    ("farmer", "field", "seed"), ("fisher", "harbour", "nets"), ("gardener", "garden", "roses"),
    ("jeweller", "shop", "silver"), ("miller", "mill", "grain"), ("painter", "studio", "oil and colour"),
    ("potter", "kiln", "clay"), ("sailor", "boat", "sails"), ("smith", "forge", "iron"),
    ("tailor", "upper room", "cloth"), ("teacher", "school", "chalk"), ("weaver", "loom", "wool"),
)
_WEATHER = (  # what it is like, and what is taken along
    ("it rains", "an umbrella"), ("it snows", "a warm coat"), ("the sun shines", "a straw hat"),
    ("the wind blows", "a long scarf"), ("the fog is thick", "a bright lantern"),
    ("it is freezing", "two thick gloves"),
)
_ONSETS = (
    "b", "br", "c", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "sh", "st", "t", "tr", "v", "w",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
# fmt: on
_MOST = len(_NUMBERS) - 1
_LARGEST_CHANGE = 5


@dataclass(frozen=True)
class _Person:
    name: str
    subject: str
    object: str
    possessive: str


class SyntheticSource(TextSource):
    """Stories of a generated language, one to a line; a pure function of the seed.

    Args:
        seed: which language and which stories.
        size_bytes: about how much text; the story that reaches it is the last one.
    """

    def __init__(self, seed: int = 0, size_bytes: int = 1_200_000) -> None:
        self.name = "synthetic"
        self._seed = seed
        self._size_bytes = size_bytes

    def fingerprint(self) -> str:
        """Return the SHA-256 of the stories themselves: a changed grammar is another text."""
        digest = hashlib.sha256()
        for story in self._read("train"):
            digest.update(story.encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Return one line for the user."""
        return f"synthetic stories, {self._size_bytes / 1e6:.1f} million characters, made from seed {self._seed}"

    def size_bytes(self, split: str) -> int | None:  # noqa: ARG002  there is one split
        """Return about the bytes of all stories."""
        return self._size_bytes

    def _read(self, split: str) -> Iterator[str]:  # noqa: ARG002  there is one split
        random = Random(self._seed)  # noqa: S311  stories, not secrets
        people, towns = _people(random, 96), [_word(random, 3) for _ in range(48)]
        written_bytes = 0
        while written_bytes < self._size_bytes:
            story = _story(random, people, towns)
            written_bytes += len(story.encode())
            yield story


def _word(random: Random, syllables: int) -> str:
    return "".join(random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(syllables)).capitalize() + "n"


def _people(random: Random, count: int) -> list[_Person]:
    """Names tell the pronoun by their last letter, so that a reader can know it from the name alone."""
    stems: dict[str, None] = {}
    while len(stems) < count:
        stems[_word(random, 1 + len(stems) % 2)] = None
    return [
        _Person(stem + "a", "she", "her", "her") if number % 4 < 2 else _Person(stem + "o", "he", "him", "his")
        for number, stem in enumerate(stems)
    ]


def _counted(count: int, look: str, thing: tuple[str, str]) -> str:
    singular, plural = thing
    return f"{_NUMBERS[count]} {look} {singular if count == 1 else plural}"


def _story(random: Random, people: list[_Person], towns: list[str]) -> str:
    hero, other = random.sample(people, 2)
    town, other_town = random.sample(towns, 2)
    trade, place, material = random.choice(_TRADES)
    thing, look = random.choice(_THINGS), random.choice(_LOOKS)
    count = random.randint(2, 12)
    day = random.randrange(len(_DAYS))
    said = [
        f"{hero.name} is a {trade} from {town}.",
        f"Every morning {hero.subject} goes to the {place} and works with {material}.",
        f"On {_DAYS[day]} {hero.name} has {_counted(count, look, thing)} in {hero.possessive} bag.",
    ]
    for _ in range(random.randint(2, 4)):
        day = (day + 1) % len(_DAYS)
        weather, taken = random.choice(_WEATHER)
        said.append(f"On {_DAYS[day]} {weather}, so {hero.subject} takes {taken}.")
        gains = count <= 2 or (count + _LARGEST_CHANGE <= _MOST and random.random() < 0.5)
        change = random.randint(1, _LARGEST_CHANGE if gains else min(_LARGEST_CHANGE, count - 1))
        sentence, mood = _event(random, hero, other, _counted(change, look, thing), gains=gains, one=change == 1)
        count = count + change if gains else count - change
        said += [sentence, f"Now {hero.subject} has {_counted(count, look, thing)} and is {mood}."]
    if random.random() < 0.5:
        said.append(f'"Is the road to {other_town} long?" asks {other.name}. "Yes," says {hero.name}, "it is."')
    said.append(
        f"{hero.subject.capitalize()} goes home to {town}, and {hero.name} the {trade} shows {hero.possessive} "
        f"{_counted(count, look, thing)} to the people at the {place}."
    )
    return " ".join(said) + "\n"


def _event(random: Random, hero: _Person, other: _Person, moved: str, *, gains: bool, one: bool) -> tuple[str, str]:
    """A sentence in which things come to the hero or leave, and how that feels."""
    subject = hero.subject.capitalize()
    events: tuple[tuple[str, str], ...]
    if gains:
        events = (
            (f"{subject} finds {moved} under a tree near {other.name}'s house.", "happy"),
            (f"{subject} buys {moved} from {other.name} at the market.", "content"),
        )
    else:
        events = (
            (f"{subject} gives {moved} to {other.name}, and {other.subject} thanks {hero.object}.", "glad"),
            (f"{subject} loses {moved} on the way, and {other.name} cannot find {'it' if one else 'them'}.", "sad"),
            (f"{subject} sells {moved} to {other.name}, who needs {'it' if one else 'them'} at home.", "proud"),
        )
    return random.choice(events)
