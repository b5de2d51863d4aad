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
        # 0 is allowed where it turns something off.
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
        # The log is flushed every `log_every` steps, and a resumed run drops later lines.
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every = {self.save_every} must be a multiple of log_every = "
                f"{self.log_every}: a resumed run would have a gap in its log"
            )


@dataclasses.dataclass(frozen=True)
class _Monitors:
    """What observes a run from outside: each hears of a phase as it begins."""

    watchdog: Watchdog  # stops a process whose phase takes too long
    heartbeat: Heartbeat  # the current phase, in a file
    goodput_log: GoodputLog  # seconds spent in each phase

    def beat(self, name: str) -> None:
        """Announces the phase `name` to all of them."""
        for monitor in (self.watchdog, self.heartbeat, self.goodput_log):
            monitor.beat(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a stage, set up; `train(run)` of the stage gets it."""

    config: Any  # the stage's Config, with its attention kernel selected
    # The config before kernel selection, nested; the manifest records it.
    original_config: Mapping[str, Any]
    workdir: Path
    # Empty in stages that run no network on a mesh.
    mesh: Any = None  # Mesh
    tokenizer: Any = None  # Tokenizer
    parents: Mapping[str, Parent] = dataclasses.field(default_factory=dict)
    data: Mapping[str, PreparedData] = dataclasses.field(default_factory=dict)

    def write_manifest(self) -> None:
        """Writes `manifest.json`, the tokenizer and the chat template. Process 0 only.

        The copies make the workdir complete, so that it can be moved.
        """
        if jax.process_index() > 0:
            return
        config = self.config
        save_tokenizer(self.tokenizer, str(self.workdir / "tokenizer.json"))
        # All parents have the same template (`select_prompt_format`).
        if uses_chat(config) and self.parents:
            first = next(iter(self.parents.values()))
            copy_template(first.workdir, self.workdir)
        # Identities of data and parents, which `check_manifest` compares on every restart.
        inputs = self._inputs()
        write_manifest(
            self.workdir,
            stage=config.stage,
            config=dict(self.original_config),
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
        # Stored values were redacted too when the manifest was written.
        inputs = redact({**self._inputs(), "config": fixed_values(self.original_config)})
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
        # Hashes of the prepared rows, so files may move as long as their content is the
        # same.
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
        with contextlib.ExitStack() as stack:
            monitors = self._open_monitors(stack)
            # Restoring and the first compilation can take minutes, so they are phases as
            # well.
            monitors.beat("restore")
            checkpoints = self._checkpoints(exported)
            state, step = self._restore_or_start(checkpoints, abstract, start)
            monitors.beat("start")
            monitors.goodput_log.begin(step)

            log = self._metric_log(monitors, checkpoints, step, total_steps)
            # Closed in reverse order: the last flush of the log writes to the goodput log.
            stack.enter_context(monitors.watchdog)
            stack.enter_context(log)
            callbacks = loop.LoopCallbacks(
                read_batch=read_batch,
                update=lambda state, batch: update(state, batch, log),
                evaluate=evaluate,
                prepare_save=prepare_save,
            )
            self._run_loop(state, callbacks, checkpoints, log, total_steps)
            self._write_summary(log, monitors)
        if jax.process_index() == 0:
            totals = goodput.read_totals(self.workdir / "goodput.jsonl")
            print(goodput.format_totals(totals), flush=True)

    def _open_monitors(self, stack: contextlib.ExitStack) -> _Monitors:
        """Opens what observes the run from outside; `stack` closes it."""
        process = jax.process_index()
        seconds = self.config.run.watchdog_seconds
        watchdog = Watchdog(seconds, self.workdir / f"hang-{process}.txt")
        heartbeat = Heartbeat(self.workdir / f"heartbeat-{process}.json")
        stack.enter_context(contextlib.closing(heartbeat))
        goodput_log = GoodputLog(self.workdir / "goodput.jsonl", writes=process == 0)
        stack.enter_context(contextlib.closing(goodput_log))
        return _Monitors(watchdog, heartbeat, goodput_log)

    def _restore_or_start(
        self, checkpoints: Checkpoints, abstract: Any, start: Callable[[], Any]
    ) -> tuple[Any, int]:
        """(the state of the newest checkpoint, or that of step 0; its step)."""
        restored = checkpoints.restore(abstract)
        if restored:
            state, step = restored
            self.check_manifest()
        else:
            state = start()
            step = 0
        # Only now: a run that cannot continue must not overwrite what it started from.
        self.write_manifest()
        return state, step

    def _metric_log(
        self,
        monitors: _Monitors,
        checkpoints: Checkpoints,
        step: int,
        total_steps: int,
    ) -> MetricLog:
        """The log of metrics from `step` on; later lines of the file are dropped."""
        config: RunConfig = self.config.run
        return MetricLog(
            self.workdir,
            total_steps=total_steps,
            start_step=step,
            log_every=config.log_every,
            tensorboard=config.tensorboard,
            console=True,
            beat=monitors.beat,
            on_flush=monitors.goodput_log.write,
            # A step saved before its evaluation ended has no line in the log yet.
            start_recorded=checkpoints.unevaluated is None,
        )

    def _run_loop(
        self,
        state: Any,
        callbacks: loop.LoopCallbacks,
        checkpoints: Checkpoints,
        log: MetricLog,
        total_steps: int,
    ) -> None:
        """Trains to the end, or until the run is asked to stop; closes the checkpoints."""
        config: RunConfig = self.config.run
        try:
            guard = NonFiniteGuard(config.most_skipped, self.workdir / "skipped")
            loop.fit(
                state,
                callbacks,
                loop.LoopOutputs(checkpoints=checkpoints, log=log, nonfinite_guard=guard),
                total_steps=total_steps,
                evaluate_every=config.evaluate_every,
            )
        finally:
            # Saving is asynchronous: waits until the last step is on disk.
            checkpoints.close()

    def _write_summary(self, log: MetricLog, monitors: _Monitors) -> None:
        """Writes `summary.json`, which marks the run as finished."""
        log.flush()
        monitors.beat("finish")
        # From the file: a run that was killed after its last save computes nothing more.
        last = _last_record(self.workdir / "metrics.jsonl")
        log.write_summary({"stage": self.config.stage, **last})

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


def open_run(
    stage: Any, config: Any, workdir: Path, original_config: Mapping[str, Any]
) -> Run:
    """Sets up a run: mesh, attention kernel, tokenizer, parents and data.

    Args:
      stage: module of the stage.
      config: its Config, which states the parents, data and head of the run.
      workdir: folder of the run, claimed for this config.
      original_config: the nested values that `config` was built from.

    Returns:
      The run. Raises ConfigError or ValueError for inputs that cannot be used.
    """
    # Stages that train and evaluate have a mesh; those that only write files have none.
    mesh = sharding.make_mesh(config.mesh) if hasattr(config, "mesh") else None
    # Before anything is loaded: errors in a config should appear within seconds.
    stage.validate(config, mesh)
    if hasattr(config, "compute"):
        # From here on the config names the kernel that runs.
        config = with_attention_kernel(config, stage.row_lengths(config))
    if mesh is None:
        return Run(config=config, original_config=original_config, workdir=workdir)

    # Parents are opened before the data is prepared: the prompt format comes from them.
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    parents = open_parents(config.parents(), tokenizer, config.tokenizer)
    # The format applies to prompts; pretraining text has none.
    prompt_format = select_prompt_format(uses_chat(config), parents, tokenizer)
    return Run(
        config=config,
        original_config=original_config,
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
    # Parent's config field → its template, or None.
    templates = {}
    for name, parent in parents.items():
        templates[name] = load_template(parent.workdir, tokenizer)
    require(
        bool(templates),
        "config.data.chat = True, but there is no parent that has a chat template: name "
        "one, or set it to False",
    )
    # All must agree with the first: each network must see prompts as it was trained on
    # them.
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
