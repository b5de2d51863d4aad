"""Writes a world as JSON lines in the one supported schema, the same bytes for the same
seed and sizes."""

import dataclasses
import functools
import gzip
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ConfigError
from instructax.simulation.corpus import SHEETS, document
from instructax.simulation.labelers import (
    STYLES,
    WRITERS,
    Labeler,
    demonstrate,
    draw_labelers,
    draw_responses,
    rank,
)
from instructax.simulation.lexicon import choose_weighted, generator, pick
from instructax.simulation.prompts import LABELER_COUNT, SimulatedPrompt, prompt_sets
from instructax.simulation.public_tasks import TASKS
from instructax.simulation.world import World, draw_world

RESPONSES = (4, 9)  # fewest and most responses ranked together (paper, section 3.5)
SOURCE = "microworld"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many there are of what; a demonstration's prompt may be answered by several
    writers."""

    documents: int
    demonstrated_prompts: int
    demonstrations: int
    comparisons: int
    prompts: int
    gpt_prompts: int  # as customers send them to GPT: behind an example
    public: int  # questions of the public tasks, with their answers

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ConfigError(f"{name} = {size}, must be at least 1")


@functools.lru_cache(
    maxsize=1
)  # one experiment's stages and report all ask for the same ones
def prompts_of(seed: int, sizes: Sizes) -> dict[str, list[SimulatedPrompt]]:
    """The prompts of each set of the world of `seed`."""
    counts = {
        "demonstrations": sizes.demonstrated_prompts,
        "comparisons": sizes.comparisons,
        "prompts": sizes.prompts,
        "gpt_prompts": sizes.gpt_prompts,
    }
    return prompt_sets(draw_world(seed), seed, counts)


def _documents(world: World, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "documents")
    for i in range(count):
        yield {
            "id": f"text-{i:06d}",
            "text": document(world, rng),
            "source": SOURCE,
            "meta": {},
        }


def _demonstrations(
    prompts: list[SimulatedPrompt], seed: int, count: int
) -> Iterator[dict[str, Any]]:
    rng = generator(seed, "writers")
    for i in range(count):
        asked = prompts[i % len(prompts)]
        writer, style = pick(rng, WRITERS)
        yield {
            "id": f"demonstration-{i:06d}",
            "prompt": asked.task.prompt,
            "format": asked.task.format,
            "completion": demonstrate(STYLES[style], asked.task, rng),
            "source": SOURCE,
            "labeler": writer,
            "meta": {"use": asked.task.use, "kind": asked.kind},
        }


def comparison(
    number: int,
    asked: SimulatedPrompt,
    responses: list[str],
    labeler: Labeler,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The record of what a labeler thinks of `responses`."""
    ranks = rank(labeler, asked.task, responses, rng)
    pairs = [
        (a, b, (ranks[b] > ranks[a]) - (ranks[b] < ranks[a]))
        for b in range(len(ranks))
        for a in range(b)
    ]
    return {
        "id": f"comparison-{number:06d}",
        "prompt": asked.task.prompt,
        "completions": responses,
        "ranks": ranks,
        "pairs": sorted(pairs),
        "labeler": labeler.name,
        "source": SOURCE,
        "meta": {"format": asked.task.format, "use": asked.task.use},
    }


def _comparisons(prompts: list[SimulatedPrompt], seed: int) -> Iterator[dict[str, Any]]:
    rng, labelers = (
        generator(seed, "rankings"),
        draw_labelers(seed, "labeler", LABELER_COUNT),
    )
    for i, asked in enumerate(prompts):
        labeler = pick(rng, labelers)
        responses = draw_responses(
            asked.task, int(rng.integers(RESPONSES[0], RESPONSES[1] + 1)), rng
        )
        yield comparison(i, asked, responses, labeler, rng)


def _prompts(name: str, prompts: list[SimulatedPrompt]) -> Iterator[dict[str, Any]]:
    for i, asked in enumerate(prompts):
        yield {
            "id": f"{name}-{i:06d}",
            "prompt": asked.task.prompt,
            "format": asked.task.format,
            "kind": asked.task.use,
            "user": asked.user,
            "source": SOURCE,
        }


def _public(world: World, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Questions of the public tasks as prompts, without the label that an answer stands
    behind on a sheet. Of `truth` there are none: what FLAN and T0 were tuned on has no such
    questions either."""
    rng = generator(seed, "public demonstrations")
    shares = {name: share for name, share in SHEETS.items() if name != "truth"}
    for i in range(count):
        name = choose_weighted(rng, shares)
        item = TASKS[name].draw(world, rng)
        question, _, _ = item.context.rpartition("\n")
        yield {
            "id": f"public-{i:06d}",
            "prompt": question,
            "format": "plain",
            "completion": item.answers[0].strip(),
            "source": SOURCE,
            "labeler": None,
            "meta": {"task": name},
        }


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One record a line, gzipped; the bytes depend on the records alone."""
    # Neither the name nor the time goes into the header.
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        for record in records:
            zipped.write(json.dumps(record).encode() + b"\n")


def write_world(directory: str | os.PathLike[str], *, seed: int, sizes: Sizes) -> None:
    """Writes a `.jsonl.gz` of each kind, `text` to `public`, into a new `directory`, or
    nothing.

    Raises:
      ValueError: `directory` exists, or there are fewer distinct prompts than asked for.
    """
    directory, world = Path(directory), draw_world(seed)
    sets = prompts_of(seed, sizes)
    if directory.exists():
        raise ConfigError(
            f"directory {str(directory)!r} exists already; remove it or choose another one"
        )
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        write_lines(partial / "text.jsonl.gz", _documents(world, seed, sizes.documents))
        demonstrations = _demonstrations(sets["demonstrations"], seed, sizes.demonstrations)
        write_lines(partial / "demonstrations.jsonl.gz", demonstrations)
        write_lines(
            partial / "comparisons.jsonl.gz", _comparisons(sets["comparisons"], seed)
        )
        for name in ("prompts", "gpt_prompts"):
            write_lines(partial / f"{name}.jsonl.gz", _prompts(name, sets[name]))
        write_lines(partial / "public.jsonl.gz", _public(world, seed, sizes.public))
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
