"""Writes a world as JSON lines in the one supported schema, the same bytes for the same seed and sizes.

The prompts of the demonstrations, of the comparisons and of `prompts` come from the same templates but never coincide
(the paper's three prompt sets differ as well, table 6): a prompt held out of one file is in no other.
"""

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instructax.microworld.labelers import (
    ANSWERS,
    STYLES,
    WRITERS,
    demonstrate,
    draw_answers,
    draw_labelers,
    ranks_of,
    utilities,
)
from instructax.microworld.tasks import all_prompts
from instructax.microworld.text import document
from instructax.microworld.world import World, draw_world, generator

SHARES = {"demonstrations": 0.3, "comparisons": 0.3, "prompts": 0.4}  # of the distinct prompts
LABELERS = 12
PROMPTS_PER_USER = 8  # on average; the busiest users ask far more
SOURCE = "microworld"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many lines each file gets; `prompts` is limited by the number of distinct prompts."""

    documents: int
    demonstrations: int
    comparisons: int
    prompts: int


def _prompt_sets(world: World, seed: int) -> dict[str, list[tuple[str, str]]]:
    """The distinct prompts in random order, dealt out to the three files."""
    prompts = all_prompts(world)
    order = generator(seed, "prompt sets").permutation(len(prompts))
    ends = np.cumsum([round(share * len(prompts)) for share in SHARES.values()])[:-1]
    dealt = np.split(order, ends)
    return {name: [prompts[i] for i in part] for name, part in zip(SHARES, dealt, strict=True)}


def _documents(world: World, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "documents")
    for i in range(count):
        yield {"id": f"text-{i:06d}", "text": document(world, rng), "source": SOURCE, "meta": {}}


def _demonstrations(prompts: list[tuple[str, str]], world: World, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "demonstrations")
    for i in range(count):
        _, prompt = prompts[i % len(prompts)]
        writer, style = WRITERS[int(rng.integers(len(WRITERS)))]
        yield {
            "id": f"demonstration-{i:06d}",
            "prompt": prompt,
            "format": "plain",
            "completion": demonstrate(STYLES[style], prompt, world, rng),
            "source": SOURCE,
            "labeler": writer,
            "meta": {},
        }


def _comparisons(prompts: list[tuple[str, str]], world: World, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "comparisons")
    labelers = draw_labelers(seed, LABELERS)
    for i in range(count):
        _, prompt = prompts[i % len(prompts)]
        labeler = labelers[int(rng.integers(LABELERS))]
        answers = draw_answers(prompt, int(rng.integers(ANSWERS[0], ANSWERS[1] + 1)), world, rng)
        ranks = ranks_of(utilities(labeler, prompt, answers, world, rng))
        pairs = [(a, b, (ranks[b] > ranks[a]) - (ranks[b] < ranks[a])) for b in range(len(ranks)) for a in range(b)]
        yield {
            "id": f"comparison-{i:06d}",
            "prompt": prompt,
            "completions": answers,
            "ranks": ranks,
            "pairs": sorted(pairs),
            "labeler": labeler.name,
            "source": SOURCE,
            "meta": {"format": "plain"},
        }


def _prompts(prompts: list[tuple[str, str]], seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "users")
    users = max(1, count // PROMPTS_PER_USER)
    activity = 1 / np.arange(1, users + 1)  # Zipf's law: a long tail of users who ask once
    for i, (kind, prompt) in enumerate(prompts[:count]):
        user = int(rng.choice(users, p=activity / activity.sum()))
        yield {
            "id": f"prompt-{i:06d}",
            "prompt": prompt,
            "format": "plain",
            "kind": kind,
            "user": f"user-{user:04d}",
            "source": SOURCE,
        }


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    # Neither the name nor the time goes into the header: the bytes depend on the records alone.
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        for record in records:
            zipped.write(json.dumps(record).encode() + b"\n")


def write_world(directory: str | os.PathLike[str], *, seed: int, sizes: Sizes) -> None:
    """Writes `text`, `demonstrations`, `comparisons` and `prompts` `.jsonl.gz` into a new `directory`, or nothing.

    Raises:
      ValueError: `directory` exists, a size is below 1, or there are fewer distinct prompts than `sizes.prompts`.
    """
    directory, world = Path(directory), draw_world(seed)
    sets = _prompt_sets(world, seed)
    if directory.exists():
        raise ValueError(f"directory {str(directory)!r} exists already; remove it or choose another one")
    for name, size in dataclasses.asdict(sizes).items():
        if size < 1:
            raise ValueError(f"{name} = {size}, must be at least 1; change it in Sizes")
    if sizes.prompts > len(sets["prompts"]):
        raise ValueError(f"prompts = {sizes.prompts}, must be at most {len(sets['prompts'])}; change it in Sizes")
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_lines(partial / "text.jsonl.gz", _documents(world, seed, sizes.documents))
        demonstrations = _demonstrations(sets["demonstrations"], world, seed, sizes.demonstrations)
        _write_lines(partial / "demonstrations.jsonl.gz", demonstrations)
        comparisons = _comparisons(sets["comparisons"], world, seed, sizes.comparisons)
        _write_lines(partial / "comparisons.jsonl.gz", comparisons)
        _write_lines(partial / "prompts.jsonl.gz", _prompts(sets["prompts"], seed, sizes.prompts))
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
