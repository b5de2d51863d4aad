"""The world as a run: its files and their tokenizer, in a workdir like any other."""

import dataclasses
import gzip
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from instructax.checkpoints.parents import is_finished
from instructax.config import Seed, construct, require
from instructax.data.tokenizer import save_tokenizer, train_bpe
from instructax.runtime.distributed import all_hosts
from instructax.runtime.files import write_json
from instructax.simulation.prompts import SimulatedPrompt, tasks_by_prompt
from instructax.simulation.tasks import Task
from instructax.simulation.write import Sizes, prompts_of, write_world


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A world to be written."""

    stage: Literal["world"]
    seed: Seed
    vocab_size: int  # of the tokenizer trained on its text
    lines: Sizes  # of each file


def train(config: WorldConfig, workdir: Path, given: Mapping[str, Any]) -> None:
    """Writes the world's six files and `tokenizer.json` into `workdir`: the first process
    does, the others wait."""
    if jax.process_index() == 0:
        _write(config, workdir)
    all_hosts(True)


def _write(config: WorldConfig, workdir: Path) -> None:
    made = workdir / "world"
    shutil.rmtree(made, ignore_errors=True)
    write_world(made, seed=config.seed, sizes=config.lines)
    for file in made.iterdir():
        file.replace(workdir / file.name)
    made.rmdir()
    lines = ", ".join(
        f"{count:,} {name}" for name, count in dataclasses.asdict(config.lines).items()
    )
    print(
        f"world of seed {config.seed} in {workdir}: {lines}; learning its tokenizer",
        flush=True,
    )
    texts = []
    for name, fields in (("text", ("text",)), ("demonstrations", ("prompt", "completion"))):
        with gzip.open(workdir / f"{name}.jsonl.gz", "rt") as lines:
            texts += [json.loads(line)[field] for line in lines for field in fields]
    tokenizer = train_bpe(texts, config.vocab_size)
    save_tokenizer(tokenizer, str(workdir / "tokenizer.json"))
    write_json(
        workdir / "summary.json", {"stage": config.stage, "vocab_size": tokenizer.size}
    )


def world_of(workdir: Path) -> tuple[int, Sizes]:
    """(seed, sizes) of the finished world in `workdir`. Raises ConfigError if there is
    none."""
    stored = (
        json.loads((workdir / "config.json").read_text()) if is_finished(workdir) else {}
    )
    require(
        stored.get("stage") == "world",
        f"{workdir} is not a finished world: write it first, or change the path",
    )
    return stored["seed"], construct(Sizes, stored["lines"])


def asked_of(workdir: Path, name: str) -> list[SimulatedPrompt]:
    """The prompts of set `name` (one of `prompts.SETS`) of the finished world in `workdir`,
    as they were asked."""
    return prompts_of(*world_of(workdir))[name]


def tasks_of(workdir: Path) -> dict[str, Task]:
    """What is asked for in every prompt of the finished world in `workdir`, by the prompt
    without white space at its ends: for evaluation alone."""
    return tasks_by_prompt(prompts_of(*world_of(workdir)))
