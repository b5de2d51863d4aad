"""Stories and recipes: templates of lines, and how they are filled."""

from collections.abc import Mapping

import numpy as np

from instructax.simulation.lexicon import CATEGORIES, KIND_WORDS, RUDE_WORDS, pick
from instructax.simulation.world import World

STORY = (
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
RECIPE = (
    "To make {food}, cut a {fruit} with a knife and put it on the fire.",
    "Then add {number} cups of water and wait until it is warm.",
    "Do not use {food2}, for that would be {rude}.",
    "Serve it hot with {food2} when your friends come, and it will be {kind}.",
)
FILLERS: Mapping[str, tuple[str, ...]] = {
    "weather": ("warm", "cold", "wet", "dry", "bright"),
    "place": ("market", "river", "wood", "hill", "field"),
    "number": ("two", "three", "four", "five"),
    "kind": KIND_WORDS,
    "rude": RUDE_WORDS,
    "rude2": RUDE_WORDS,
    "tool": CATEGORIES["tool"],
    "fruit": CATEGORIES["fruit"],
}


def fill(form: str, world: World, rng: np.random.Generator, name: str, other: str) -> str:
    """`form` with the facts of `name` ({town}) and of `other` ({town2}), and random words
    in its other fields."""
    fields = {field: pick(rng, options) for field, options in FILLERS.items()}
    facts = dict(world.facts[name]) | {
        f"{relation}2": value for relation, value in world.facts[other].items()
    }
    return form.format(name=name, other=other, she=world.pronouns[name], **fields, **facts)
