"""What every stage does around its loop: claim the folder, check the parent, open the log, resume, finish."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instructax import sharding
from instructax.checkpoint import Checkpoints, committed_steps, load_params
from instructax.configuration import ConfigError, check_range, require
from instructax.data.batches import Source, comparison_batch, evaluation_rows, lm_batch, mixed_lm_batch, process_slice
from instructax.data.builders import Prepared
from instructax.data.limits import Limits
from instructax.data.prepare import prepare_demonstrations, prepare_text
from instructax.manifest import check_parent, config_difference, manifest_hash, read_manifest, write_manifest
from instructax.model import ModelConfig
from instructax.runlog import RunLog, write_json
from instructax.tokenizer import Tokenizer, load_tokenizer
from instructax.types import Comparisons, LmBatch, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is kept; nothing here changes what is learned."""

    log_every: int  # steps between console lines
    evaluate_every: int  # steps between evaluations on held-out data; 0 = only at the end
    evaluate_batches: int  # the most batches of one evaluation
    save_every: int  # steps between checkpoints
    keep: int  # newest checkpoints that stay
    best_metric: str  # held-out figure, higher is better, whose best checkpoint stays as well; "" = none
    tensorboard: bool

    def __post_init__(self):
        check_range(self, {"log_every": 1, "evaluate_every": 0, "evaluate_batches": 1, "save_every": 1, "keep": 1})
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every = {self.save_every} must be a multiple of log_every = {self.log_every}: "
                "a resumed run would have a gap in its log"
            )


def finished(workdir: Path) -> bool:
    """Whether the run in `workdir` has come to its end."""
    return (workdir / "summary.json").exists()


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes `workdir` this config's own.

    Raises ConfigError, with the differences, if it holds a run of another config. The groups `run` and `mesh` may
    change, since they decide how a run is kept and where it is computed, not what.
    """
    path = workdir / "config.json"
    if path.exists() and (finished(workdir) or committed_steps(workdir)):
        stored = json.loads(path.read_text())
        difference = config_difference(_decisive(stored), _decisive(config))
        require(
            not difference,
            f"{workdir} holds a run with another config ({'; '.join(difference)}); "
            "give the stored values again or choose another --workdir",
        )
    if jax.process_index() == 0 and not finished(workdir):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir {workdir} cannot be made: {error}") from None
        write_json(path, config)


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("run", "mesh")}


def tokenizer_of(path: str, model: ModelConfig) -> Tokenizer:
    """The tokenizer at `path`; raises ConfigError unless the model's vocabulary is its own."""
    tokenizer = load_tokenizer(path)
    require(
        tokenizer.size == model.vocab_size,
        f"config.model.vocab_size = {model.vocab_size}, but the tokenizer {path} has {tokenizer.size} ids; "
        "set config.model.vocab_size to that",
    )
    return tokenizer


def check_lengths(limits: Limits, model: ModelConfig) -> None:
    """Raises ConfigError unless packed rows, and a prompt with its response, fit the model's positions."""
    pair = limits.prompt_tokens + limits.response_tokens
    for name, length in (("sequence_tokens", limits.sequence_tokens), ("prompt_tokens + response_tokens", pair)):
        require(
            length <= model.max_length,
            f"config.data.limits.{name} = {length} is above config.model.max_length = {model.max_length}: lower it",
        )


def steps_of(*, steps: int, epochs: float, rows: int, rows_per_step: int) -> int:
    """Length of a run in steps, given by exactly one of `steps` and `epochs` (the other is 0)."""
    require(
        min(steps, epochs) == 0 < max(steps, epochs),
        f"config.steps = {steps} and config.epochs = {epochs}: set one, the other to 0",
    )
    require(steps > 0 or rows_per_step > 0, "config.data.text_fraction leaves a batch no row of what epochs count")
    return steps or math.ceil(epochs * rows / rows_per_step)


def check_rows(name: str, rows: int, pieces: int, mesh: Mesh) -> None:
    """Raises ConfigError unless `rows` divide into `pieces`, each spread evenly over the mesh."""
    require(pieces > 0, f"config.{name} is split into {pieces} parts; config.accumulate must be at least 1")
    ways = pieces * sharding.row_ways(mesh)
    require(
        rows > 0 and rows % ways == 0,
        f"config.{name} = {rows} rows must be a positive multiple of {ways} = {pieces} parts × "
        f"{sharding.row_ways(mesh)} devices that share rows; change it or config.mesh",
    )


@dataclasses.dataclass(frozen=True)
class Parent:
    """A finished run whose parameters another one starts from."""

    workdir: Path
    manifest: Mapping[str, Any]

    def load(self, wanted: Params) -> Params:
        """Its exported parameters, straight into the shapes and layouts of `wanted`."""
        return load_params(self.workdir, wanted)

    def lineage(self) -> dict[str, Any]:
        """What the child's manifest says of it."""
        return {
            "workdir": str(self.workdir),
            "stage": self.manifest["stage"],
            "step": committed_steps(self.workdir)[-1],
            "manifest_hash": manifest_hash(self.manifest),
        }


def open_parents(
    paths: Mapping[str, str], models: Mapping[str, ModelConfig], tokenizer: Tokenizer, tokenizer_path: str
) -> dict[str, Parent]:
    """The runs to start from, by config field, those with an empty path left out.

    Each must be finished, of this tokenizer, and of the architecture in `models`. Raises ConfigError or ValueError.
    """
    parents = {}
    for name, path in paths.items():
        if not path:
            continue
        workdir = Path(path)
        require(
            finished(workdir), f"config.{name} = {path!r} is not a finished run: train it first, or change the path"
        )
        manifest = read_manifest(workdir)
        check_parent(manifest, tokenizer_hash=tokenizer.hash, tokenizer_path=tokenizer_path)
        difference = config_difference(manifest["model"], dataclasses.asdict(models[name]))
        require(not difference, f"the model of config.{name} = {path!r} is another: {'; '.join(difference)}")
        parents[name] = Parent(workdir, manifest)
    return parents


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmData:
    """Files of packed rows; the share of text counts rows of a batch."""

    demonstrations: tuple[str, ...]
    text: tuple[str, ...]
    text_fraction: float  # 1: pretraining, 0: demonstrations alone, 0.1: the PPO initialisation (paper, C.3)
    limits: Limits
    folder: str  # where prepared rows are kept


def read_lm_data(config: LmData, tokenizer: Tokenizer) -> dict[str, Prepared]:
    """The packed rows of each source that has files: "demonstrations", "text"."""
    require(
        bool(config.demonstrations) == (config.text_fraction < 1) and (bool(config.text) or config.text_fraction == 0),
        f"config.data.text_fraction = {config.text_fraction} does not fit {len(config.demonstrations)} files of "
        f"config.data.demonstrations and {len(config.text)} of config.data.text: 1 is text alone, 0 demonstrations",
    )
    prepare = {"demonstrations": prepare_demonstrations, "text": prepare_text}
    files = {"demonstrations": config.demonstrations, "text": config.text}
    return {
        name: prepare[name]([Path(path) for path in paths], tokenizer, config.limits, Path(config.folder))
        for name, paths in files.items()
        if paths
    }


def lm_reader(
    config: LmData, data: Mapping[str, Prepared], split: str, *, batch_size: int, seed: int
) -> Callable[[int], LmBatch]:
    """Batch `step` of packed rows: this process's share of it, as numpy arrays."""
    nothing: Any = ()
    sources = {name: data[name].sources[split] if name in data else nothing for name in ("demonstrations", "text")}

    def read(step: int) -> LmBatch:
        return mixed_lm_batch(
            sources["demonstrations"],
            sources["text"],
            step,
            batch_size=batch_size,
            text_fraction=config.text_fraction,
            length=config.limits.sequence_tokens,
            seed=seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return read


def held_out(source: Source, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """Row ids of at most `limit` batches of held-out rows, this process's share of each."""
    for rows in itertools.islice(evaluation_rows(len(source), batch_size), limit):
        yield process_slice(rows, jax.process_index(), jax.process_count())


def held_out_rows(source: Source, batch_size: int, limit: int, length: int) -> Iterator[LmBatch]:
    """At most `limit` batches of held-out packed rows, this process's share of each."""
    for rows in held_out(source, batch_size, limit):
        yield lm_batch(source, rows, length)


def read_comparisons(source: Source, rows: Any, limits: Limits) -> Comparisons:
    """Comparisons `rows` of `source`, padded to the limits, as numpy arrays."""
    return comparison_batch(
        source,
        rows,
        prompt_tokens=limits.prompt_tokens,
        answers=limits.answers,
        response_tokens=limits.response_tokens,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a run's manifest says."""

    stage: str
    config: Mapping[str, Any]  # as it was given
    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_path: str
    data: Mapping[str, Prepared]
    parents: Mapping[str, Parent]

    def origins(self) -> dict[str, dict[str, Any]]:
        """The hashes of the data, and what the parents are, by name."""
        return {
            "data": {name: prepared.report.hash for name, prepared in self.data.items()},
            "parents": {name: parent.lineage() for name, parent in self.parents.items()},
        }

    def check(self, workdir: Path) -> None:
        """Raises ConfigError if data or parents have changed since the manifest in `workdir` was written."""
        manifest = read_manifest(workdir)
        origins = self.origins()
        difference = config_difference({name: manifest[name] for name in origins}, origins)
        require(
            not difference,
            f"{workdir} was begun from other inputs ({'; '.join(difference)}); restore them or take another --workdir",
        )

    def write(self, workdir: Path) -> None:
        """Writes `manifest.json`."""
        origins = self.origins()
        write_manifest(
            workdir,
            stage=self.stage,
            config=dict(self.config),
            model=dataclasses.asdict(self.model),
            tokenizer_hash=self.tokenizer.hash,
            tokenizer_path=self.tokenizer_path,
            data_hashes=origins["data"],
            parents=origins["parents"],
        )


def run(
    workdir: Path,
    config: RunConfig,
    *,
    record: Record,
    abstract: Any,
    start: Callable[[], Any],
    exported: str,
    total_steps: int,
    loop: Callable[[Any, RunLog, Checkpoints], Any],
) -> None:
    """Restores the newest step or starts anew, runs `loop(state, log, checkpoints)`, and records the end.

    `abstract` is the state's shapes and layouts, `start()` makes it, `exported` names the field that later stages
    read; the figures of its last step go to `summary.json`.
    """
    checkpoints = Checkpoints(
        workdir,
        save_every=config.save_every,
        keep=config.keep,
        best_metric=config.best_metric,
        exported=exported,
    )
    restored = checkpoints.restore(abstract)
    state, step = restored if restored else (start(), 0)
    if restored:
        record.check(workdir)
    if jax.process_index() == 0:
        record.write(workdir)
    log = RunLog(
        workdir,
        total_steps=total_steps,
        log_every=config.log_every,
        start_step=step,
        tensorboard=config.tensorboard,
        console=True,
    )
    with log:
        try:
            loop(state, log, checkpoints)
        finally:
            checkpoints.close()
        log.flush()
        # From the file: a run that was killed after its last save has nothing left to compute.
        log.summary({"stage": record.stage, **last_line(workdir / "metrics.jsonl")})


def last_line(path: Path) -> dict[str, Any]:
    """The last record of a file of JSON lines, {} if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}
