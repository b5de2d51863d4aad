"""What every stage does around its loop: claim the folder, check the parent, open the log,
resume, finish."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from instructax import sharding
from instructax.checkpoints.checkpoint import Checkpoints, committed_steps
from instructax.checkpoints.manifest import config_difference, read_manifest, write_manifest
from instructax.checkpoints.parents import Parent, is_finished
from instructax.config import INT_LIMIT, ConfigError, check_range, require
from instructax.data.chat_template import (
    chat_prompt_format,
    copy_template,
    load_template,
)
from instructax.data.limits import DataLimits
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer, save_tokenizer
from instructax.models import LoraConfig, ModelConfig
from instructax.models.attention_kernels import (
    KernelConditions,
    device_platform,
    select_kernel,
)
from instructax.runtime import goodput
from instructax.runtime.files import write_json
from instructax.runtime.goodput import GoodputLog
from instructax.runtime.heartbeat import Heartbeat
from instructax.runtime.metric_log import MetricLog
from instructax.runtime.nonfinite import NonFiniteGuard
from instructax.runtime.redaction import redact
from instructax.runtime.watchdog import Watchdog
from instructax.training import loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is kept; nothing here changes what is learned."""

    log_every: int  # steps between console lines
    evaluate_every: int  # steps between evaluations on held-out data; 0 = only at the end
    evaluate_batches: int  # the most batches of one evaluation
    save_every: int  # steps between checkpoints
    keep: int  # newest checkpoints that stay
    best_metric: str  # held-out figure whose best checkpoint stays as well, the lowest of a loss; "" = none
    tensorboard: bool
    most_skipped: (
        int  # updates in a row that may be skipped for gradients that are not finite
    )
    watchdog_seconds: float  # the longest that a phase of a step may take, compiling included; 0 = no limit

    def __post_init__(self):
        least = {
            "log_every": 1,
            "evaluate_every": 0,
            "evaluate_batches": 1,
            "save_every": 1,
            "keep": 1,
        }
        check_range(self, least | {"most_skipped": 0, "watchdog_seconds": 0})
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every = {self.save_every} must be a multiple of log_every = {self.log_every}: "
                "a resumed run would have a gap in its log"
            )


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder `workdir` this config's own.

    Raises ConfigError, with the differences, if it holds a run of another config. The
    groups `run` and `mesh` may change, since they decide how a run is kept and where it is
    computed, not what.
    """
    path, config = workdir / "config.json", redact(config)
    if path.exists() and (is_finished(workdir) or committed_steps(workdir)):
        try:
            stored = json.loads(path.read_bytes())
            require(isinstance(stored, dict), "it is no group of values")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}): restore a copy, or choose another --workdir"
            ) from None
        difference = config_difference(_decisive(stored), _decisive(config))
        if stored.get("stage") != config.get("stage"):  # then hardly a name is the same
            difference = [line for line in difference if line.startswith("stage: ")]
        require(
            not difference,
            f"{workdir} holds a run with another config ({'; '.join(difference)}); "
            "give the stored values again or choose another --workdir",
        )
    if jax.process_index() == 0 and not is_finished(workdir):
        write_json(path, config)


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("run", "mesh")}


def check_lengths(limits: DataLimits, model: ModelConfig) -> None:
    """Raises ConfigError unless packed rows, and a prompt with its response, fit the
    model's positions, and there are the two splits that every stage reads."""
    names = [name for name, _ in limits.splits]
    require(
        {"train", "validation"} <= set(names),
        f"config.data.limits.splits has the names {names}: train and validation must be among them",
    )
    pair = limits.prompt_tokens + limits.response_tokens
    for name, length in (
        ("sequence_tokens", limits.sequence_tokens),
        ("prompt_tokens + response_tokens", pair),
    ):
        require(
            length <= model.max_length,
            f"config.data.limits.{name} = {length} is above config.model.max_length = {model.max_length}: lower it",
        )


def check_adapters(lora: LoraConfig, model: ModelConfig, parent: str) -> None:
    """Raises ConfigError for adapters wider than what they adapt, or of a network that
    nobody has trained."""
    require(
        lora.rank <= model.embed_dim,
        f"config.lora.rank = {lora.rank} is above config.model.embed_dim = {model.embed_dim}: lower it, or 0 trains everything",
    )
    require(
        lora.rank == 0 or bool(parent),
        f"config.lora.rank = {lora.rank}, but there is no parent whose weights could stay: give one, or rank 0",
    )


def prompt_format_of(
    chat: bool, parents: Mapping[str, Parent], tokenizer: Tokenizer
) -> PromptFormat:
    """How the prompts of a run are worded: by the chat template of its parents if it is to
    `chat`, else plainly.

    Raises ConfigError if a parent has none, or another than the rest.
    """
    if not chat:
        return PLAIN_FORMAT
    found = {
        name: load_template(parent.workdir, tokenizer) for name, parent in parents.items()
    }
    require(
        bool(found),
        "config.data.chat = True, but there is no parent that has a chat template: give one, or False",
    )
    first, expected = next(iter(found.items()))
    for name, template in found.items():
        require(
            template is not None and template == expected,
            f"config.data.chat = True, but config.{name} = {str(parents[name].workdir)!r} has "
            + (
                "no chat template"
                if template is None
                else f"another chat template than config.{first}"
            )
            + ": train all of them with it, or none",
        )
    return PLAIN_FORMAT if expected is None else chat_prompt_format(expected, tokenizer)


def steps_of(*, steps: int, epochs: float, rows: int, rows_per_step: float) -> int:
    """Length of a run in steps, given by exactly one of `steps` and `epochs` (the other is
    0)."""
    require(
        min(steps, epochs) == 0 < max(steps, epochs),
        f"config.steps = {steps} and config.epochs = {epochs}: set one, the other to 0",
    )
    found = steps or math.ceil(epochs * rows / rows_per_step)
    require(
        found < INT_LIMIT,
        f"config.epochs = {epochs} are {found:.3g} steps of {rows} rows: lower it",
    )
    return found


def check_rows(name: str, rows: int, pieces: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError unless `rows` divide into `pieces`, each spread evenly over the
    mesh."""
    ways = pieces * sharding.num_row_shards(mesh)
    require(
        rows > 0 and rows % ways == 0,
        f"config.{name} = {rows} rows must be a positive multiple of {ways} = {pieces} parts × "
        f"{sharding.num_row_shards(mesh)} devices that share rows; change it or config.mesh",
    )


def row_lengths(config: Any) -> tuple[tuple[int, ...], bool]:
    """(lengths of the rows that the networks of a stage run without a cache, whether texts
    in them share another).

    Of the rows of comparisons it is the longest there can be; the others are pieces of rows
    (`rows.part_shapes`) too.
    """

    def pieces(*widths: int) -> tuple[int, ...]:
        return tuple(
            sorted(
                {
                    width >> i
                    for width in widths
                    for i in range(config.compute.tail_splits + 1)
                }
            )
        )

    if config.stage == "collect":
        return (), False
    if config.stage == "tasks":
        return pieces(config.context_tokens + config.answer_tokens), False
    limits = config.data.limits
    packed, pair = limits.sequence_tokens, limits.prompt_tokens + limits.response_tokens
    if config.stage == "reward":
        return (*pieces(limits.comparison_tokens), packed), True
    if config.stage == "evaluate":
        asked = [
            config.model.max_length for _, _, how in config.policies if how == "few-shot"
        ]
        ranked = [limits.comparison_tokens] if config.data.comparisons else []
        return pieces(packed, max(packed, pair), max(packed, pair, *asked), *ranked), bool(
            ranked
        )
    return pieces(packed) if config.stage == "ppo" else (packed,), False


def select_attention_kernel(
    config: Any, *, sampling_alone: bool = False, side_by_side: bool = False
) -> Any:
    """(the config of a stage with the kernel that its networks take as `compute.attention`,
    that kernel and why).

    `sampling_alone`: of the stage's programs only the sampler runs; `side_by_side`: several
    runs share a program. Raises ConfigError if the config names a kernel that cannot run.
    """
    platform, version = device_platform(jax.devices()[0])
    lengths, branches = ((), False) if sampling_alone else row_lengths(config)
    networks = [
        getattr(config, name) for name in ("model", "reward_model") if hasattr(config, name)
    ]
    given = KernelConditions(
        platform=platform,
        version=version,
        dtype=config.compute.dtype,
        head_dims=[network.head_dim for network in networks],
        lengths=lengths,
        softcap=any(network.attention_softcap > 0 for network in networks),
        sliding_window=any(network.sliding_window > 0 for network in networks),
        shared_prefixes=branches,
        vmapped_runs=side_by_side,
    )
    kernel, reason = select_kernel(config.compute.attention, given)
    compute = dataclasses.replace(config.compute, attention=kernel)
    return dataclasses.replace(config, compute=compute), f"{kernel} ({reason})"


def with_attention_kernel(config: Any) -> Any:
    """The config with its attention kernel chosen, which is said on the console."""
    config, attention = select_attention_kernel(config)
    if jax.process_index() == 0:
        print(f"attention: {attention}", flush=True)
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunManifestInputs:
    """What a run's manifest says: where all that it computes comes from."""

    config: Any  # the stage's dataclass
    given: Mapping[str, Any]  # the same as it was given
    tokenizer: Tokenizer
    data: Mapping[str, PreparedData]
    parents: Mapping[str, Parent]

    def origins(self) -> dict[str, dict[str, Any]]:
        """The hashes of the data, and what the parents are, by name."""
        return {
            "data": {name: prepared.report.hash for name, prepared in self.data.items()},
            "parents": {name: parent.lineage() for name, parent in self.parents.items()},
        }

    def check(self, workdir: Path) -> None:
        """Raises ConfigError if config, data or parents have changed since the manifest in
        `workdir` was written."""
        manifest = read_manifest(workdir)
        origins = redact({**self.origins(), "config": _decisive(self.given)})
        stored = {name: manifest[name] for name in origins}
        difference = config_difference(
            {**stored, "config": _decisive(stored["config"])}, origins
        )
        require(
            not difference,
            f"{workdir} was begun from other inputs ({'; '.join(difference)}); restore them or take another --workdir",
        )

    def write(self, workdir: Path) -> None:
        """Writes `manifest.json`, and `tokenizer.json`, so that the run can be moved; the
        first process does."""
        if jax.process_index() > 0:
            return
        save_tokenizer(self.tokenizer, str(workdir / "tokenizer.json"))
        if getattr(getattr(self.config, "data", None), "chat", False) and self.parents:
            copy_template(next(iter(self.parents.values())).workdir, workdir)
        origins = self.origins()
        write_manifest(
            workdir,
            stage=self.config.stage,
            config=dict(self.given),
            model=dataclasses.asdict(self.config.model),
            tokenizer_hash=self.tokenizer.hash,
            tokenizer_path=self.config.tokenizer,
            data_hashes=origins["data"],
            parents=origins["parents"],
        )


def run(
    workdir: Path,
    record: RunManifestInputs,
    *,
    abstract: Any,
    start: Callable[[], Any],
    exported: str,
    total_steps: int,
    update: Callable[[Any, Any, MetricLog], tuple[Any, dict[str, Any]]],
    batches: Callable[[int], Any],
    evaluate: Callable[[Any], dict[str, Any]],
    at_save: Callable[[Any], Any] = lambda state: state,
) -> None:
    """Restores the newest step or starts anew, trains to the end with `loop.fit`, and
    records the end.

    `abstract` is the state's shapes and layouts, `start()` makes it, `exported` names the
    field that later stages read. `update(state, batch, log)`, `batches`, `evaluate` and
    `at_save` are those of `fit`. The figures of the last step go to `summary.json`.
    """
    config: RunConfig = record.config.run
    process = jax.process_index()
    watchdog = Watchdog(config.watchdog_seconds, workdir / f"hang-{process}.txt")
    with (
        contextlib.closing(Heartbeat(workdir / f"heartbeat-{process}.json")) as heartbeat,
        contextlib.closing(
            GoodputLog(workdir / "goodput.jsonl", writes=process == 0)
        ) as ledger,
    ):

        def beat(name: str) -> None:
            for listener in (watchdog, heartbeat, ledger):
                listener.beat(name)

        beat("restore")
        keeping = {
            "save_every": config.save_every,
            "keep": config.keep,
            "best_metric": config.best_metric,
        }
        checkpoints = Checkpoints(workdir, **keeping, exported=exported)
        restored = checkpoints.restore(abstract)
        state, step = restored if restored else (start(), 0)
        if restored:
            record.check(workdir)
        record.write(workdir)
        beat("start")
        ledger.begin(step)
        logging = {
            "log_every": config.log_every,
            "tensorboard": config.tensorboard,
            "console": True,
        }
        logging |= {
            "beat": beat,
            "written": ledger.write,
            "recorded": checkpoints.unevaluated is None,
        }
        log = MetricLog(workdir, total_steps=total_steps, start_step=step, **logging)
        with watchdog, log:
            try:
                loop.fit(
                    state,
                    loop.LoopCallbacks(
                        read_batch=batches,
                        update=lambda state, batch: update(state, batch, log),
                        evaluate=evaluate,
                        prepare_save=at_save,
                    ),
                    loop.LoopOutputs(
                        checkpoints=checkpoints,
                        log=log,
                        nonfinite_guard=NonFiniteGuard(
                            config.most_skipped, workdir / "skipped"
                        ),
                    ),
                    total_steps=total_steps,
                    evaluate_every=config.evaluate_every,
                )
            finally:
                checkpoints.close()
            log.flush()
            # From the file: a run that was killed after its last save has nothing left to
            # compute.
            beat("finish")
            log.write_summary(
                {"stage": record.config.stage, **last_line(workdir / "metrics.jsonl")}
            )
    if process == 0:
        print(
            goodput.format_totals(goodput.read_totals(workdir / "goodput.jsonl")),
            flush=True,
        )


def last_line(path: Path) -> dict[str, Any]:
    """The last record of a file of JSON lines, {} if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}
