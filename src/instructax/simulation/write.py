"""Writes a simulated world as gzipped JSON lines in the data schema.

The same seed and sizes give the same bytes.
"""

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
from instructax.simulation.corpus import SHEET_TASK_WEIGHTS, sample_document
from instructax.simulation.labelers import Labeler, create_labelers, rank_responses
from instructax.simulation.lexicon import choose_weighted, pick, rng_for
from instructax.simulation.prompts import (
    LABELERS_PER_GROUP,
    SimulatedPrompt,
    create_prompt_sets,
)
from instructax.simulation.public_tasks import PUBLIC_TASKS
from instructax.simulation.world import World, create_world
from instructax.simulation.writers import (
    WRITER_STYLES,
    WRITERS,
    sample_responses,
    write_demonstration,
)

# Fewest and most responses that are ranked together (paper, section 3.5).
RESPONSES_PER_PROMPT = (4, 9)
# The "source" of every record. Part of the files, so it keeps the package's first name.
SOURCE = "microworld"

_Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WorldSizes:
    """The number of lines of each file, and of prompts with demonstrations.

    Several writers may answer the same demonstrated prompt.
    """

    documents: int
    demonstrated_prompts: int
    demonstrations: int
    comparisons: int
    prompts: int
    # Prompts as customers send them to GPT, with an example.
    gpt_prompts: int
    # Items of the public tasks with their answers.
    public: int

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < 1:
                raise ConfigError(f"{name} = {size}, must be at least 1")


# The stages of an experiment and its report all ask for the same prompts.
@functools.lru_cache(maxsize=1)
def create_prompts(seed: int, sizes: WorldSizes) -> dict[str, list[SimulatedPrompt]]:
    """Creates the prompts of each set for the world of `seed`."""
    num_prompts = {
        "demonstrations": sizes.demonstrated_prompts,
        "comparisons": sizes.comparisons,
        "prompts": sizes.prompts,
        "gpt_prompts": sizes.gpt_prompts,
    }
    return create_prompt_sets(create_world(seed), seed, num_prompts)


def comparison_record(
    index: int,
    prompt: SimulatedPrompt,
    responses: list[str],
    labeler: Labeler,
    rng: np.random.Generator,
) -> _Record:
    """Returns the record of a labeler's ranking of `responses`.

    Args:
      index: position in the file, which becomes part of the id.
      prompt: the prompt of the responses.
      responses: the responses to rank.
      labeler: who ranks them.
      rng: draws the labeler's noise.
    """
    ranks = rank_responses(labeler, prompt.task, responses, rng)
    # (a, b, 1 if a is better, −1 if b is better, 0 for a tie), with a < b.
    pairs = []
    for a in range(len(ranks)):
        for b in range(a + 1, len(ranks)):
            pairs.append((a, b, (ranks[b] > ranks[a]) - (ranks[b] < ranks[a])))
    return {
        "id": f"comparison-{index:06d}",
        "prompt": prompt.task.prompt,
        "completions": responses,
        "ranks": ranks,
        "pairs": pairs,
        "labeler": labeler.name,
        "source": SOURCE,
        "meta": {"format": prompt.task.format, "use": prompt.task.use_case},
    }


def write_jsonl_gz(path: Path, records: Iterable[_Record]) -> None:
    """Writes one record per line, gzipped; the bytes depend on the records alone."""
    # Without a name and a time in the header, equal records give equal bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        for record in records:
            zipped.write(json.dumps(record).encode() + b"\n")


def write_world(directory: str | os.PathLike[str], *, seed: int, sizes: WorldSizes) -> None:
    """Writes `text` to `public`, one `.jsonl.gz` file each, into a new directory.

    If it fails, it leaves nothing behind.

    Args:
      directory: must not exist yet.
      seed: seed of the world and of everything that is drawn from it.
      sizes: the number of lines of each file.

    Raises:
      ConfigError: `directory` exists, or the world has too few different prompts.
    """
    directory = Path(directory)
    prompts = create_prompts(seed, sizes)
    if directory.exists():
        raise ConfigError(
            f"directory {str(directory)!r} exists already; remove it or choose another one"
        )

    world = create_world(seed)
    records = {
        "text": _documents(world, seed, sizes.documents),
        "demonstrations": _demonstrations(
            prompts["demonstrations"], seed, sizes.demonstrations
        ),
        "comparisons": _comparisons(prompts["comparisons"], seed),
        "prompts": _prompt_records("prompts", prompts["prompts"]),
        "gpt_prompts": _prompt_records("gpt_prompts", prompts["gpt_prompts"]),
        "public": _public_demonstrations(world, seed, sizes.public),
    }

    # The directory appears under its name only when it is complete.
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, lines in records.items():
            write_jsonl_gz(partial / f"{name}.jsonl.gz", lines)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _documents(world: World, seed: int, count: int) -> Iterator[_Record]:
    rng = rng_for(seed, "documents")
    for i in range(count):
        yield {
            "id": f"text-{i:06d}",
            "text": sample_document(world, rng),
            "source": SOURCE,
            "meta": {},
        }


def _demonstrations(
    prompts: list[SimulatedPrompt], seed: int, count: int
) -> Iterator[_Record]:
    rng = rng_for(seed, "writers")
    for i in range(count):
        # Every prompt is used once before any is used again.
        prompt = prompts[i % len(prompts)]
        writer, style = pick(rng, WRITERS)
        yield {
            "id": f"demonstration-{i:06d}",
            "prompt": prompt.task.prompt,
            "format": prompt.task.format,
            "completion": write_demonstration(WRITER_STYLES[style], prompt.task, rng),
            "source": SOURCE,
            "labeler": writer,
            "meta": {"use": prompt.task.use_case, "kind": prompt.kind},
        }


def _comparisons(prompts: list[SimulatedPrompt], seed: int) -> Iterator[_Record]:
    rng = rng_for(seed, "rankings")
    labelers = create_labelers(seed, "labeler", LABELERS_PER_GROUP)
    fewest, most = RESPONSES_PER_PROMPT
    for i, prompt in enumerate(prompts):
        labeler = pick(rng, labelers)
        count = int(rng.integers(fewest, most + 1))
        responses = sample_responses(prompt.task, count, rng)
        yield comparison_record(i, prompt, responses, labeler, rng)


def _prompt_records(set_name: str, prompts: list[SimulatedPrompt]) -> Iterator[_Record]:
    for i, prompt in enumerate(prompts):
        yield {
            "id": f"{set_name}-{i:06d}",
            "prompt": prompt.task.prompt,
            "format": prompt.task.format,
            "kind": prompt.task.use_case,
            "user": prompt.user,
            "source": SOURCE,
        }


def _public_demonstrations(world: World, seed: int, count: int) -> Iterator[_Record]:
    """Items of the public tasks as prompts, without the "Answer:" of question sheets.

    The task "truth" is left out: FLAN and T0 were not tuned on such questions either.
    """
    rng = rng_for(seed, "public demonstrations")
    weights = dict(SHEET_TASK_WEIGHTS)
    del weights["truth"]
    for i in range(count):
        name = choose_weighted(rng, weights)
        item = PUBLIC_TASKS[name].sample_item(world, rng)
        # The last line is the label: "Answer:", "English:" or "Label:".
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
