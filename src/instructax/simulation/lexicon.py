"""The vocabulary of the simulated world, and helpers for text and random choices.

Nearly every word is a single token of a BPE with 1024 tokens that is trained on the text.
No content word belongs to two categories, so each word identifies its category.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Option = TypeVar("Option")

# The tables of words are not formatted: one row of names, or one category, per line.
# fmt: off
PERSON_NAMES = (
    "Anna", "Ben", "Clara", "Dan", "Ella", "Finn", "Gina", "Hugo",
    "Ida", "Jon", "Kate", "Leo", "Maya", "Mira", "Nora", "Otto",
    "Paul", "Rosa", "Sam", "Tina", "Tom", "Vera", "Walt", "Zoe",
)
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": (
        "cat", "dog", "hen", "pig", "fox", "goat", "horse", "duck", "mouse", "bird",
    ),
    "fruit": (
        "pear", "plum", "fig", "lemon", "grape", "peach", "melon", "cherry", "mango",
        "lime",
    ),
    "tool": (
        "hammer", "saw", "drill", "rake", "spade", "brush", "knife", "broom", "shovel",
        "wrench",
    ),
    "colour": (
        "red", "blue", "green", "pink", "grey", "brown", "white", "black", "gold", "purple",
    ),
    "food": (
        "soup", "bread", "rice", "cake", "stew", "cheese", "pasta", "pie", "salad", "toast",
    ),
    "trade": (
        "baker", "farmer", "painter", "singer", "teacher", "doctor", "miller", "tailor",
        "sailor", "cook",
    ),
    "town": (
        "Arden", "Brook", "Dale", "Elton", "Ford", "Holm", "Kirby", "Marsh", "Norton",
        "Stow",
    ),
    "remedy": (
        "sleep", "honey", "salt", "onion", "garlic", "butter", "tea", "vinegar",
    ),
}
# fmt: on

# Prompts ask for lists of these categories, and the text contains such lists.
LIST_CATEGORIES = (
    "animal",
    "fruit",
    "tool",
    "colour",
    "food",
    "trade",
    "town",
)

# Lower-case word -> its category.
CATEGORY_OF = {
    word.lower(): category for category, words in CATEGORIES.items() for word in words
}

POSITIVE_WORDS = ("lovely", "sweet", "nice", "good", "fine", "great")
RUDE_WORDS = ("bad", "ugly", "dull", "nasty", "stupid", "silly")
# Sentences without content, which people add to a response.
FILLER_SENTENCES = (
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


def rng_for(seed: int, purpose: str) -> np.random.Generator:
    """Returns the random number generator of one purpose.

    Generators of different purposes or seeds are independent. The purpose is part of the
    seed: changing the string changes every number that is drawn.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """Returns one of `options`, uniformly at random."""
    return options[int(rng.integers(len(options)))]


def pick_distinct(
    rng: np.random.Generator, options: Sequence[Option], count: int
) -> list[Option]:
    """Returns `count` different `options` in random order.

    The generator always advances by one permutation of all options, even if `count` is 0.
    """
    return [options[i] for i in rng.permutation(len(options))[:count]]


def choose_weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """Returns a key of `weights` with probability proportional to its value."""
    total = sum(weights.values())
    probabilities = [weight / total for weight in weights.values()]
    index = int(rng.choice(len(weights), p=probabilities))
    return list(weights)[index]


def words_of(text: str) -> list[str]:
    """Returns the lower-case words of `text`, without punctuation and possessive 's."""
    return re.findall(r"[a-z]+", text.lower().replace("'s", ""))


def sentences_of(text: str) -> list[str]:
    """Splits `text` at full stops, exclamation marks and question marks.

    Parts without a word are dropped.
    """
    return [part.strip() for part in re.split(r"[.!?]", text) if words_of(part)]


def as_sentence(text: str) -> str:
    """Returns `text` with a capital first letter and a full stop."""
    return text[:1].upper() + text[1:] + "."


def join_with_and(parts: Sequence[str]) -> str:
    """Joins parts as "a", "a and b" or "a, b and c"."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
