"""A run of a stage: what is set up before its training loop, and what surrounds the loop.

`open_run` builds the mesh, attention kernel, tokenizer, parents and data of every stage;
`Run.fit` restores the newest checkpoint, trains to the end and writes the summary.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from instructax import sharding
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.manifest import config_difference, read_manifest, write_manifest
from instructax.checkpoints.parents import Parent, open_parents, tokenizer_of
from instructax.config import ConfigError, check_range, require
from instructax.data.chat_template import (
    chat_prompt_format,
    copy_template,
    load_template,
)
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer, save_tokenizer
from instructax.runtime import goodput
from instructax.runtime.goodput import GoodputLog
from instructax.runtime.heartbeat import Heartbeat
from instructax.runtime.metric_log import MetricLog
from instructax.runtime.nonfinite import NonFiniteGuard
from instructax.runtime.redaction import redact
from instructax.runtime.watchdog import Watchdog
from instructax.training import loop
from instructax.training.attention import with_attention_kernel
from instructax.training.checks import uses_chat
from instructax.training.workdir import fixed_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run is logged, evaluated and saved; nothing here changes what is learned."""

    log_every: int  # steps between console lines
    evaluate_every: int  # steps between evaluations on validation data; 0 = only at the end
    evaluate_batches: int  # at most this many batches per evaluation
    save_every: int  # steps between checkpoints
    keep: int  # newest checkpoints that are kept
    best_metric: str  # the checkpoint with its best value is kept as well; "" = none
    best_mode: Literal["min", "max"]  # which value of best_metric is the best
    tensorboard: bool
    most_skipped: int  # updates in a row that may be skipped for non-finite gradients
    watchdog_seconds: float  # limit for each phase of a step, with compiling; 0 = none

    def __post_init__(self):
        least = {
            "log_every": 1,
            "evaluate_every": 0,
            "evaluate_batches": 1,
            "save_every": 1,
            "keep": 1,
            "most_skipped": 0,
            "watchdog_seconds": 0,
        }
        check_range(self, least)
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every = {self.save_every} must be a multiple of log_every = "
                f"{self.log_every}: a resumed run would have a gap in its log"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a stage, set up; `train(run)` of the stage gets it."""

    config: Any  # the stage's Config, with its attention kernel selected
    given: Mapping[str, Any]  # the config as it was given; the manifest records it
    workdir: Path
    # Empty in stages that run no network on a mesh.
    mesh: Any = None  # Mesh
    tokenizer: Any = None  # Tokenizer
    parents: Mapping[str, Parent] = dataclasses.field(default_factory=dict)
    data: Mapping[str, PreparedData] = dataclasses.field(default_factory=dict)

    def write_manifest(self) -> None:
        """Writes `manifest.json`, and beside it the tokenizer and the chat template, so that
        the workdir can be moved. Process 0 only."""
        if jax.process_index() > 0:
            return
        config = self.config
        save_tokenizer(self.tokenizer, str(self.workdir / "tokenizer.json"))
        if uses_chat(config) and self.parents:
            first = next(iter(self.parents.values()))
            copy_template(first.workdir, self.workdir)
        inputs = self._inputs()
        write_manifest(
            self.workdir,
            stage=config.stage,
            config=dict(self.given),
            model=dataclasses.asdict(config.model),
            head=config.head,
            tokenizer_hash=self.tokenizer.hash,
            tokenizer_path=config.tokenizer,
            data_hashes=inputs["data"],
            parents=inputs["parents"],
        )

    def check_manifest(self) -> None:
        """Raises ConfigError if the config, data or parents have changed since the manifest
        was written."""
        manifest = read_manifest(self.workdir)
        inputs = redact({**self._inputs(), "config": fixed_values(self.given)})
        stored = {
            "data": manifest["data"],
            "parents": manifest["parents"],
            "config": fixed_values(manifest["config"]),
        }
        difference = config_difference(stored, inputs)
        require(
            not difference,
            f"{self.workdir} was started from other inputs ({'; '.join(difference)}); "
            "restore them or choose another --workdir",
        )

    def _inputs(self) -> dict[str, dict[str, Any]]:
        """Hashes of the data, and the identity of each parent, by name."""
        data: dict[str, Any] = {}
        for name, prepared in self.data.items():
            data[name] = prepared.report.hash
        parents: dict[str, Any] = {}
        for name, parent in self.parents.items():
            parents[name] = parent.lineage()
        return {"data": data, "parents": parents}

    def fit(
        self,
        *,
        abstract: Any,
        start: Callable[[], Any],
        exported: str,
        total_steps: int,
        update: Callable[[Any, Any, MetricLog], tuple[Any, dict[str, Any]]],
        read_batch: Callable[[int], Any],
        evaluate: Callable[[Any], dict[str, Any]],
        prepare_save: Callable[[Any], Any] = lambda state: state,
    ) -> None:
        """Restores the newest checkpoint or starts anew, trains to the end, and writes the
        metrics of the last step to `summary.json`.

        Args:
          abstract: shapes and shardings of the state.
          start: makes the state of step 0.
          exported: field of the state that later stages read.
          total_steps: the step at which the run ends.
          update: `update(state, batch, log) -> (state, metrics)`.
          read_batch: batch of a step, a function of the step alone.
          evaluate: metrics of a state on validation data.
          prepare_save: changes a state before it is saved, as in `loop.LoopCallbacks`.
        """
        config: RunConfig = self.config.run
        workdir = self.workdir
        process = jax.process_index()
        with contextlib.ExitStack() as stack:
            # Whoever watches the run from outside hears of each phase as it begins.
            watchdog = Watchdog(config.watchdog_seconds, workdir / f"hang-{process}.txt")
            heartbeat = Heartbeat(workdir / f"heartbeat-{process}.json")
            stack.enter_context(contextlib.closing(heartbeat))
            ledger = GoodputLog(workdir / "goodput.jsonl", writes=process == 0)
            stack.enter_context(contextlib.closing(ledger))

            def beat(name: str) -> None:
                for listener in (watchdog, heartbeat, ledger):
                    listener.beat(name)

            beat("restore")
            checkpoints = self._checkpoints(exported)
            restored = checkpoints.restore(abstract)
            if restored:
                state, step = restored
                self.check_manifest()
            else:
                state, step = start(), 0
            self.write_manifest()
            beat("start")
            ledger.begin(step)

            log = MetricLog(
                workdir,
                total_steps=total_steps,
                start_step=step,
                log_every=config.log_every,
                tensorboard=config.tensorboard,
                console=True,
                beat=beat,
                on_flush=ledger.write,
                start_recorded=checkpoints.unevaluated is None,
            )
            stack.enter_context(watchdog)
            stack.enter_context(log)
            try:
                loop.fit(
                    state,
                    loop.LoopCallbacks(
                        read_batch=read_batch,
                        update=lambda state, batch: update(state, batch, log),
                        evaluate=evaluate,
                        prepare_save=prepare_save,
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
            beat("finish")
            # From the file: a run that was killed after its last save computes nothing more.
            last = _last_record(workdir / "metrics.jsonl")
            log.write_summary({"stage": self.config.stage, **last})
        if process == 0:
            totals = goodput.read_totals(workdir / "goodput.jsonl")
            print(goodput.format_totals(totals), flush=True)

    def _checkpoints(self, exported: str) -> Checkpoints:
        config: RunConfig = self.config.run
        return Checkpoints(
            self.workdir,
            save_every=config.save_every,
            keep=config.keep,
            best_metric=config.best_metric,
            best_mode=config.best_mode,
            exported=exported,
        )


def open_run(stage: Any, config: Any, workdir: Path, given: Mapping[str, Any]) -> Run:
    """Sets up a run: mesh, attention kernel, tokenizer, parents and data.

    Args:
      stage: module of the stage.
      config: its Config, which states the parents, data and head of the run.
      workdir: folder of the run, claimed for this config.
      given: the config as it was given, nested.

    Returns:
      The run. Raises ConfigError or ValueError for inputs that cannot be used.
    """
    mesh = sharding.make_mesh(config.mesh) if hasattr(config, "mesh") else None
    stage.validate(config, mesh)
    if hasattr(config, "compute"):
        config = with_attention_kernel(config, stage.row_lengths(config))
    if mesh is None:
        return Run(config=config, given=given, workdir=workdir)

    tokenizer = tokenizer_of(config.tokenizer, config.model)
    parents = open_parents(config.parents(), tokenizer, config.tokenizer)
    prompt_format = select_prompt_format(uses_chat(config), parents, tokenizer)
    return Run(
        config=config,
        given=given,
        workdir=workdir,
        mesh=mesh,
        tokenizer=tokenizer,
        parents=parents,
        data=config.prepare_data(tokenizer, prompt_format),
    )


def select_prompt_format(
    chat: bool, parents: Mapping[str, Parent], tokenizer: Tokenizer
) -> PromptFormat:
    """The chat template of the parents if `chat`, else the plain format.

    Raises ConfigError if a parent has no template, or another one than the first parent.
    """
    if not chat:
        return PLAIN_FORMAT
    templates = {}
    for name, parent in parents.items():
        templates[name] = load_template(parent.workdir, tokenizer)
    require(
        bool(templates),
        "config.data.chat = True, but there is no parent that has a chat template: name "
        "one, or set it to False",
    )
    first, expected = next(iter(templates.items()))
    for name, template in templates.items():
        problem = ""
        if template is None:
            problem = "no chat template"
        elif template != expected:
            problem = f"another chat template than config.{first}"
        require(
            not problem,
            f"config.data.chat = True, but config.{name} = {str(parents[name].workdir)!r} "
            f"has {problem}: train all of them with it, or none",
        )
    assert expected is not None
    return chat_prompt_format(expected, tokenizer)


def _last_record(path: Path) -> dict[str, Any]:
    """The last record of a file of JSON lines, {} if there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}
