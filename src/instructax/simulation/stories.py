"""Line templates of stories and recipes, and the function that fills them in."""

from collections.abc import Mapping

import numpy as np

from instructax.simulation.lexicon import CATEGORIES, POSITIVE_WORDS, RUDE_WORDS, pick
from instructax.simulation.world import World

STORY_LINES = (
    "One {weather} day {name} went to the {place} with a {tool} and a {fruit}.",
    "On the way {she} met {other}, who lives in {town2}.",
    "The {animal} of {name} ran to the {place} and came back with a {fruit}.",
    "{other} said something {kind} and gave {name} some {food2}.",
    "Then the {weather} wind came and they forgot the {tool}.",
    "At night they sat by the fire, ate {food} and were happy.",
    "{name} had no {fruit} left, so {she} had to look for more.",
    "They found a {tool} in the {place}.",
    "In the end {name} came home to {town} and slept.",
)
RECIPE_LINES = (
    "To make {food}, cut a {fruit} with a knife and put it on the fire.",
    "Then add {number} cups of water and wait until it is warm.",
    "Do not use {food2}, for that would be {rude}.",
    "Serve it hot with {food2} when your friends come, and it will be {kind}.",
)

# Template field -> the words that may fill it. One word of every field is drawn for every
# line, in this order, whether or not the line has the field.
FIELD_WORDS: Mapping[str, tuple[str, ...]] = {
    "weather": ("warm", "cold", "wet", "dry", "bright"),
    "place": ("market", "river", "wood", "hill", "field"),
    "number": ("two", "three", "four", "five"),
    "kind": POSITIVE_WORDS,
    "rude": RUDE_WORDS,
    "rude2": RUDE_WORDS,
    "tool": CATEGORIES["tool"],
    "fruit": CATEGORIES["fruit"],
}


def fill_template(
    template: str, world: World, rng: np.random.Generator, name: str, other: str
) -> str:
    """Fills in the fields of a template.

    Args:
      template: text with fields in braces.
      world: the world whose facts are told.
      rng: draws the words of FIELD_WORDS.
      name: the person of {name}; {town}, {food}, … are this person's facts.
      other: the person of {other}; {town2}, {food2}, … are this person's facts.
    """
    random_words = {field: pick(rng, words) for field, words in FIELD_WORDS.items()}
    facts = dict(world.facts[name])
    for relation, value in world.facts[other].items():
        facts[f"{relation}2"] = value
    return template.format(
        name=name, other=other, she=world.pronouns[name], **random_words, **facts
    )
