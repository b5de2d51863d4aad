"""The simulated world as a run: its data files and the tokenizer trained on them.

It stands in for the prompts that the paper collected from its API and for its labelers
(section 3.2). Everything it writes is a function of the seed.
"""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import jax

from instructax.config import Seed
from instructax.data.tokenizer import save_tokenizer, train_bpe
from instructax.runtime.distributed import all_hosts
from instructax.runtime.files import write_json
from instructax.simulation.write import WorldSizes, write_world
from instructax.training.attention import NO_ROWS, RowLengths
from instructax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Seed and sizes of a simulated world."""

    stage: Literal["world"]
    seed: Seed
    # Token ids of the tokenizer that is trained on the world's text.
    vocab_size: int
    # Records in each file.
    lines: WorldSizes


def validate(config: Config, mesh: Any) -> None:
    """Does nothing: `construct` has checked every value, and there is no mesh."""


def row_lengths(config: Config) -> RowLengths:
    """No rows: no network runs."""
    return NO_ROWS


def memory(config: Config, mesh: Any) -> dict[str, int]:
    """Nothing is held on a device."""
    return {}


def train(run: Run) -> None:
    """Writes the six files and `tokenizer.json` on process 0; the others wait."""
    if jax.process_index() == 0:
        _write_files(run.config, run.workdir)
    # A barrier: no process continues before the files are complete.
    all_hosts(True)


def _write_files(config: Config, workdir: Path) -> None:
    # Files move into the workdir only when all of them are complete. What a killed process
    # left in the staging folder is deleted first.
    staging = workdir / "world"
    shutil.rmtree(staging, ignore_errors=True)
    write_world(staging, seed=config.seed, sizes=config.lines)
    for file in staging.iterdir():
        file.replace(workdir / file.name)
    staging.rmdir()

    # Printed now, because training the tokenizer takes a while without output.
    counts = dataclasses.asdict(config.lines)
    described = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(
        f"world of seed {config.seed} in {workdir}: {described}; training its tokenizer",
        flush=True,
    )

    # The tokenizer sees only what the first two training stages read, no comparisons.
    texts = _fields(workdir / "text.jsonl.gz", ("text",))
    texts += _fields(workdir / "demonstrations.jsonl.gz", ("prompt", "completion"))
    tokenizer = train_bpe(texts, config.vocab_size)
    save_tokenizer(tokenizer, str(workdir / "tokenizer.json"))

    # The summary marks the run as finished, so it comes last.
    summary = {"stage": config.stage, "vocab_size": tokenizer.size}
    write_json(workdir / "summary.json", summary)


def _fields(path: Path, names: tuple[str, ...]) -> list[str]:
    """The named fields of every record, in order."""
    texts: list[str] = []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            record = json.loads(line)
            texts.extend(record[name] for name in names)
    return texts
