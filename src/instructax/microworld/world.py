"""What the world knows: seven categories of ten words each, and twenty-four people with one fact per relation.

The words are fixed; who lives where and likes what is drawn from the seed. The words are few and short, so that a
BPE of 1024 pieces trained on the text makes nearly every one of them one token. No word is in two categories, so a word
tells what is spoken of.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

NAMES = (
    "Anna", "Ben", "Clara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kate", "Leo",
    "Maya", "Mira", "Nora", "Otto", "Paul", "Rosa", "Sam", "Tina", "Tom", "Vera", "Walt", "Zoe",
)  # fmt: skip
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "hen", "pig", "fox", "goat", "horse", "duck", "mouse", "bird"),
    "fruit": ("pear", "plum", "fig", "lemon", "grape", "peach", "melon", "cherry", "mango", "lime"),
    "tool": ("hammer", "saw", "drill", "rake", "spade", "brush", "knife", "broom", "shovel", "wrench"),
    "colour": ("red", "blue", "green", "pink", "grey", "brown", "white", "black", "gold", "purple"),
    "food": ("soup", "bread", "rice", "cake", "stew", "cheese", "pasta", "pie", "salad", "toast"),
    "trade": ("baker", "farmer", "painter", "singer", "teacher", "doctor", "miller", "tailor", "sailor", "cook"),
    "town": ("Arden", "Brook", "Dale", "Elton", "Ford", "Holm", "Kirby", "Marsh", "Norton", "Stow"),
}
CATEGORY_OF = {word.lower(): category for category, words in CATEGORIES.items() for word in words}

# How a person's fact of each relation is told: "Mira lives in Arden", "Mira has a dog".
CLAUSES = {
    "town": "lives in {value}",
    "food": "likes {value}",
    "animal": "has a {value}",
    "trade": "is a {value}",
    "colour": "loves {value}",
}
# What each relation is called when it is asked for.
NOUNS = {
    "town": "home town",
    "food": "favourite food",
    "animal": "pet",
    "trade": "trade",
    "colour": "favourite colour",
}
KIND_WORDS = ("lovely", "sweet", "nice", "good", "fine", "great")
UNKIND_WORDS = ("bad", "ugly", "dull", "nasty")


@dataclasses.dataclass(frozen=True)
class World:
    """The facts: `facts["Mira"]["town"] == "Arden"`; every name has every relation of `CLAUSES`."""

    facts: Mapping[str, Mapping[str, str]]

    def clause(self, name: str, relation: str) -> str:
        """The fact without its subject, "lives in Arden"."""
        return CLAUSES[relation].format(value=self.facts[name][relation])


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The stream of random numbers of one purpose; streams of different purposes or seeds are independent."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
    return options[int(rng.integers(len(options)))]


def sample(rng: np.random.Generator, options: Sequence[T], count: int) -> list[T]:
    """`count` different `options` in random order."""
    return [options[i] for i in rng.permutation(len(options))[:count]]


def draw_world(seed: int) -> World:
    """The world of a seed."""
    rng = generator(seed, "facts")
    return World({name: {relation: pick(rng, CATEGORIES[relation]) for relation in CLAUSES} for name in NAMES})


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and without the possessive 's."""
    return re.findall(r"[a-z]+", text.lower().replace("'s", ""))


def sentence(text: str) -> str:
    """`text` with a capital first letter and a full stop."""
    return text[:1].upper() + text[1:] + "."


def enumeration(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
