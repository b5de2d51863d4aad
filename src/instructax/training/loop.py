"""The training loop that all stages share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

from instructax.runtime.distributed import any_host
from instructax.runtime.nonfinite import NonFiniteGuard
from instructax.runtime.preemption import GracefulShutdown, StopRequested


class Interrupted(Exception):
    """The run was asked to stop and has saved `step`."""

    def __init__(self, step: int):
        super().__init__(
            f"interrupted; step {step} is saved, the same command goes on from there"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopCallbacks:
    """What a stage does in each part of the loop."""

    # step → batch; a function of the step alone, so a resumed run reads the same batches
    read_batch: Callable[[int], Any]
    # (state, batch) → (state, metrics); `metrics["tokens"]`, if any, gives tokens/s
    update: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    # state → metrics
    evaluate: Callable[[Any], dict[str, Any]]
    # state → the state to save; later steps and `evaluate` must not depend on the change
    prepare_save: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOutputs:
    """Where the loop keeps its results."""

    # Typed as Any: `checkpoints` and `runtime` need not be imported here.
    checkpoints: Any  # checkpoints.checkpoint.Checkpoints
    log: Any  # runtime.metric_log.MetricLog
    nonfinite_guard: NonFiniteGuard


def fit(
    state: Any,
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
    *,
    total_steps: int,
    evaluate_every: int,
) -> tuple[Any, dict[str, Any]]:
    """Trains from `state.step` to `total_steps`: read, update, evaluate, log, save.

    A first Ctrl-C or SIGTERM saves the last finished step and raises Interrupted. An update
    that calls `check_stop_requested` is abandoned. So is an evaluation: its step is saved
    as unevaluated, and is evaluated and logged when the run resumes.

    Args:
      state: the restored or fresh state. One that has reached `total_steps` is evaluated
        and nothing else: its run was killed between its last save and its summary.
      callbacks: the stage's functions.
      outputs: checkpoints, log and the guard that raises Diverged.
      total_steps: the length of the run.
      evaluate_every: steps between evaluations, 0 for none but the last.

    Returns:
      (the final state, its metrics)
    """
    first = int(state.step)
    metrics: dict[str, Any] = {}

    with GracefulShutdown() as shutdown:
        if outputs.checkpoints.unevaluated is not None:
            metrics = _evaluate_restored(first, state, callbacks, outputs)
        elif first >= total_steps:
            return state, _evaluate(first, state, metrics, callbacks, outputs)

        for step in range(first, total_steps):
            batch, state, metrics = _update(step, state, metrics, callbacks, outputs)
            if step == first:
                outputs.log.first_step_done(metrics)

            done = step + 1
            is_last = done == total_steps
            # Reads the metrics of the previous update, so the devices stay busy.
            outputs.nonfinite_guard.observe(done, batch, metrics)
            if is_last or (evaluate_every and done % evaluate_every == 0):
                metrics = _evaluate(done, state, metrics, callbacks, outputs)
            outputs.log.record(done, metrics)
            state = _save_or_stop(
                done, state, metrics, callbacks, outputs, shutdown, is_last=is_last
            )
    return state, metrics


def _update(
    step: int,
    state: Any,
    metrics: dict[str, Any],
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
) -> tuple[Any, Any, dict[str, Any]]:
    """Reads the batch of `step` and updates on it; a stop request saves the last state.

    Returns:
      (batch, new state, its metrics)
    """
    try:
        # Phases time the parts of a step; their names appear in the log.
        with outputs.log.phase("data"):
            batch = callbacks.read_batch(step)
        with outputs.log.phase("update"):
            state, metrics = callbacks.update(state, batch)
    except StopRequested:
        # `update` raises it before it donates the state, so the old one can be saved.
        _save_and_stop(step, state, metrics, callbacks, outputs, evaluated=True)
    return batch, state, metrics


def _evaluate_restored(
    step: int, state: Any, callbacks: LoopCallbacks, outputs: LoopOutputs
) -> dict[str, Any]:
    """Evaluates and logs a restored step whose evaluation was abandoned."""
    checkpoints = outputs.checkpoints
    metrics = _evaluate(step, state, checkpoints.unevaluated, callbacks, outputs)
    # Logged before it is marked: a run killed between the two evaluates the step again.
    outputs.log.record(step, metrics)
    checkpoints.mark_evaluated(metrics)
    return metrics


def _evaluate(
    step: int,
    state: Any,
    metrics: dict[str, Any],
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
) -> dict[str, Any]:
    """`metrics` and those of an evaluation; a stop request saves the step without them."""
    try:
        # Metrics of the update come first, then those of the evaluation.
        with outputs.log.phase("evaluate"):
            return {**metrics, **callbacks.evaluate(state)}
    except StopRequested:
        _save_and_stop(step, state, metrics, callbacks, outputs, evaluated=False)


def _save_or_stop(
    step: int,
    state: Any,
    metrics: dict[str, Any],
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
    shutdown: GracefulShutdown,
    *,
    is_last: bool,
) -> Any:
    """Saves a finished step if it is due, the last, or a stop was requested.

    Returns the state to continue from; raises Interrupted for a stop before the last step.
    """
    # All hosts must agree, or some would wait for the others in a collective. Read the flag
    # once: a signal during the save below waits for the next step.
    stop_requested = any_host(shutdown.stop_requested)
    forced = is_last or stop_requested
    state = _save(step, state, metrics, callbacks, outputs, forced=forced)
    if stop_requested and not is_last:
        raise Interrupted(step)
    return state


def _save(
    step: int,
    state: Any,
    metrics: dict[str, Any],
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
    *,
    forced: bool,
) -> Any:
    """Saves the step if it is due or `forced`; returns the state to continue from."""
    checkpoints = outputs.checkpoints
    # A state of non-finite updates must not become the newest checkpoint.
    if forced or checkpoints.due(step):
        outputs.nonfinite_guard.check()
        state = callbacks.prepare_save(state)
    with outputs.log.phase("save"):
        if forced:
            # The log must be on disk before the step that resumes it. A due step flushes
            # the log itself: `save_every` is a multiple of `log_every`.
            outputs.log.flush()
            checkpoints.save(step, state, metrics)
        else:
            checkpoints.maybe_save(step, state, metrics)
    return state


def _save_and_stop(
    step: int,
    state: Any,
    metrics: dict[str, Any],
    callbacks: LoopCallbacks,
    outputs: LoopOutputs,
    *,
    evaluated: bool,
) -> NoReturn:
    """Saves a step whose successor, or whose evaluation, was abandoned."""
    # As in `_save`, for a step that is not due.
    outputs.nonfinite_guard.check()
    outputs.log.flush()  # the log must be on disk before the step that resumes it
    with outputs.log.phase("save"):
        prepared = callbacks.prepare_save(state)
        outputs.checkpoints.save(step, prepared, metrics, evaluated=evaluated)
    raise Interrupted(step) from None
