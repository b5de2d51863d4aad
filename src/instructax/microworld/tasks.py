"""Prompts by template, and their perfect answers.

A prompt ends with a newline and the answer is the next line, as in the question sheets of the pretraining text. A
prompt can be read back with its template: what is asked for is in the text alone.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from instructax.microworld.world import (
    CATEGORIES,
    CLAUSES,
    KIND_WORDS,
    NAMES,
    NOUNS,
    World,
    enumeration,
    pick,
    sample,
    sentence,
)

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATION_NAMED = {name: relation for relation, noun in NOUNS.items() for name in (noun, f"{noun}s")}
CATEGORY_NAMED = {name: category for category in CATEGORIES for name in (category, f"{category}s")}
PLURALS = tuple(f"{category}s" for category in CATEGORIES)
THINGS = ("animal", "food")  # relations whose value can be praised
PRAISE = ("{name}'s {thing} is {kind}", "I think {name}'s {thing} is {kind}", "I like {name}'s {kind} {thing}")

# What may stand in the fields of a template.
OPTIONS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "other": NAMES,
    "count": ("two", "three", "four"),
    "plural": PLURALS,
    "others": PLURALS,
    "single": tuple(CATEGORIES),
    "banned": tuple(itertools.chain(*CATEGORIES.values())),
    "noun": tuple(NOUNS.values()),
    "second": tuple(NOUNS.values()),
    "nouns": tuple(f"{noun}s" for noun in NOUNS.values()),
    "thing": tuple(itertools.chain(*(CATEGORIES[relation] for relation in THINGS))),
    "sentences": ("two sentences", "three sentences", "one sentence"),
}
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("list", "List {count} {plural}."),
    ("list", "Name {count} {plural}."),
    ("list", "Please tell me {count} {plural}."),
    ("list", "Can you think of {count} {plural}?"),
    ("list", "List {count} {plural} but not {banned}."),
    ("list", "Name {count} {plural} other than {banned}."),
    ("list", "Please think of {count} {plural}, not {banned}."),
    ("list", "Give me {count} {plural} and one {single} but not {banned}."),
    ("list", "Name {count} {plural} and one {single}."),
    ("list", "Give me {count} {plural} and one {single}."),
    ("list", "List {count} {plural} and two {others}."),
    ("list", "Can you name {count} {plural} and two {others}?"),
    ("list", "Think of {count} {plural} and two {others}."),
    ("fact", "What is {name}'s {noun}?"),
    ("fact", "Tell me {name}'s {noun}."),
    ("fact", "Do you know the {noun} of {name}?"),
    ("fact", "I forgot {name}'s {noun}. What is it?"),
    ("fact", "What are {name}'s {noun} and {second}?"),
    ("fact", "Tell me the {noun} and the {second} of {name}."),
    ("fact", "What are the {nouns} of {name} and {other}?"),
    ("praise", "Say something kind about {name}'s {thing} in one sentence."),
    ("praise", "Write one kind sentence about {name}'s {thing}."),
    ("praise", "Praise {name}'s {thing} in one sentence."),
    ("praise", "What do you like about {name}'s {thing}?"),
    ("praise", "Please be kind about {name}'s {thing}."),
    ("praise", "Write me something nice about {name}'s {thing}."),
    ("describe", "Describe {name} in {sentences}."),
    ("describe", "Tell me about {name} in {sentences}."),
    ("describe", "Please describe {name} in {sentences}."),
    ("describe", "Who is {name}? Use {sentences}."),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt read back: its template's kind, and the words in the template's fields."""

    kind: str
    fields: Mapping[str, str]

    @property
    def items(self) -> dict[str, int]:
        """How many words of each category a list asks for."""
        wanted = {CATEGORY_NAMED[self.fields["plural"]]: NUMBERS[self.fields["count"]]}
        for field, count in (("single", 1), ("others", 2)):
            if field in self.fields:
                wanted[CATEGORY_NAMED[self.fields[field]]] = count
        return wanted

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The (name, relation) pairs a question asks for; for a description, all that there are of the person."""
        names = [self.fields[field] for field in ("name", "other") if field in self.fields]
        nouns = [self.fields[field] for field in ("noun", "second", "nouns") if field in self.fields]
        relations = [RELATION_NAMED[noun] for noun in nouns] or list(CLAUSES)
        return list(itertools.product(names, relations))

    @property
    def sentences(self) -> int:
        """How many sentences are asked for; 0 where that is not said."""
        return NUMBERS[self.fields["sentences"].split()[0]] if self.kind == "describe" else int(self.kind == "praise")

    @property
    def wanted(self) -> int:
        """How many parts a perfect answer has: items, facts, or for praise the person, the thing and a kind word."""
        if self.kind == "list":
            return sum(self.items.values())
        return 3 if self.kind == "praise" else self.sentences or len(self.facts)


def _fields_of(template: str) -> list[str]:
    return re.findall(r"{(\w+)}", template)


def _pattern(template: str) -> re.Pattern[str]:
    """The template as a regular expression with one named group for each field."""
    text = re.escape(template)
    for field in _fields_of(template):
        text = text.replace(rf"\{{{field}\}}", f"(?P<{field}>{'|'.join(OPTIONS[field])})")
    return re.compile(text)


_PATTERNS = tuple((kind, _pattern(template)) for kind, template in TEMPLATES)


def parse(prompt: str) -> Task:
    """Reads a prompt back; white space at its ends is free.

    Raises:
      ValueError: no template fits.
    """
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            return Task(kind, match.groupdict())
    raise ValueError(
        f"prompt {prompt!r} fits no template of microworld.tasks.TEMPLATES; true rewards exist only for those"
    )


def _sensible(fields: Mapping[str, str], world: World) -> bool:
    """Whether a template's fields agree with each other and with the world, each unordered pair in one order only."""
    plural, name, noun = (fields.get(field, "") for field in ("plural", "name", "noun"))
    if plural:
        category, second = CATEGORY_NAMED[plural], fields.get("single") or fields.get("others", "")
        distinct = CATEGORY_NAMED.get(second) != category
        return distinct and fields.get("banned", CATEGORIES[category][0]) in CATEGORIES[category]
    if "thing" in fields:
        return fields["thing"] in [world.facts[name][relation] for relation in THINGS]
    return name < fields.get("other", "~") and noun < fields.get("second", "~")


def all_prompts(world: World) -> list[tuple[str, str]]:
    """Every prompt of the world once, as (kind, prompt), in the order of the templates."""
    prompts = []
    for kind, template in TEMPLATES:
        names = _fields_of(template)
        for values in itertools.product(*(OPTIONS[name] for name in names)):
            fields = dict(zip(names, values, strict=True))
            if _sensible(fields, world):
                prompts.append((kind, template.format(**fields) + "\n"))
    return prompts


def ideal_parts(task: Task, world: World, rng: np.random.Generator) -> list[str]:
    """The parts of one of the perfect answers: items, clauses, or sentences without their full stops."""
    fields = task.fields
    if task.kind == "list":
        banned = fields.get("banned")
        kept = {category: [word for word in CATEGORIES[category] if word != banned] for category in task.items}
        return [word for category, count in task.items.items() for word in sample(rng, kept[category], count)]
    if task.kind == "praise":
        return [pick(rng, PRAISE).format(kind=pick(rng, KIND_WORDS), **fields)]
    facts = task.facts
    if task.kind == "describe":
        facts = sample(rng, facts, task.wanted)
    told = [f"{name} {world.clause(name, relation)}" for name, relation in facts]
    if "second" in fields:
        told[1] = world.clause(*facts[1])  # "Mira lives in Arden and has a dog"
    return told


def compose(task: Task, parts: Iterable[str]) -> str:
    """The answer made of `parts`: sentences for a description, else one sentence."""
    return " ".join(map(sentence, parts)) if task.kind == "describe" else sentence(enumeration(list(parts)))


def ideal_response(prompt: str, world: World, rng: np.random.Generator) -> str:
    """One of the answers whose true reward is 1."""
    task = parse(prompt)
    return compose(task, ideal_parts(task, world, rng))
