"""The words of the world, and what is done with words.

Nearly every word is one token of a BPE of 1024 pieces trained on the text. No content word
is in two categories, so that a word tells what is spoken of.
"""

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
    "fruit": (
        "pear",
        "plum",
        "fig",
        "lemon",
        "grape",
        "peach",
        "melon",
        "cherry",
        "mango",
        "lime",
    ),
    "tool": (
        "hammer",
        "saw",
        "drill",
        "rake",
        "spade",
        "brush",
        "knife",
        "broom",
        "shovel",
        "wrench",
    ),
    "colour": (
        "red",
        "blue",
        "green",
        "pink",
        "grey",
        "brown",
        "white",
        "black",
        "gold",
        "purple",
    ),
    "food": (
        "soup",
        "bread",
        "rice",
        "cake",
        "stew",
        "cheese",
        "pasta",
        "pie",
        "salad",
        "toast",
    ),
    "trade": (
        "baker",
        "farmer",
        "painter",
        "singer",
        "teacher",
        "doctor",
        "miller",
        "tailor",
        "sailor",
        "cook",
    ),
    "town": (
        "Arden",
        "Brook",
        "Dale",
        "Elton",
        "Ford",
        "Holm",
        "Kirby",
        "Marsh",
        "Norton",
        "Stow",
    ),
    "remedy": ("sleep", "honey", "salt", "onion", "garlic", "butter", "tea", "vinegar"),
}
LISTED = tuple(
    name for name in CATEGORIES if name != "remedy"
)  # the categories that people make lists of
CATEGORY_OF = {
    word.lower(): category for category, words in CATEGORIES.items() for word in words
}

KIND_WORDS = ("lovely", "sweet", "nice", "good", "fine", "great")
RUDE_WORDS = ("bad", "ugly", "dull", "nasty", "stupid", "silly")
RAMBLINGS = (  # idle sentences, which people add
    "I am happy to help you.",
    "That is all I know about it.",
    "Everyone in town can tell you more.",
    "What a lovely day it is.",
    "I hope this is a great help.",
    "You can think of more.",
    "It is good to know.",
)
REFUSAL = "I would rather not."
NO_COMMENT = "I have no comment."
NOT_IN_BACKGROUND = "Not in background."


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The stream of random numbers of one purpose; streams of different purposes or seeds
    are independent."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
    return options[int(rng.integers(len(options)))]


def sample(rng: np.random.Generator, options: Sequence[T], count: int) -> list[T]:
    """`count` different `options` in random order."""
    return [options[i] for i in rng.permutation(len(options))[:count]]


def choose_weighted(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """One of the keys, as likely as its value; the values need not sum to 1."""
    total = sum(shares.values())
    return list(shares)[
        int(rng.choice(len(shares), p=[share / total for share in shares.values()]))
    ]


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and without the possessive 's."""
    return re.findall(r"[a-z]+", text.lower().replace("'s", ""))


def sentences_of(text: str) -> list[str]:
    """The sentences of `text`: what lies between full stops, exclamation and question marks
    and has a word."""
    return [part.strip() for part in re.split(r"[.!?]", text) if words_of(part)]


def sentence(text: str) -> str:
    """`text` with a capital first letter and a full stop."""
    return text[:1].upper() + text[1:] + "."


def enumeration(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
