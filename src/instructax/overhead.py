"""What a run's checks cost, as shares of a step: the finite check of the update, beats and ledger, checks at saves.

The check inside the compiled update cannot be timed alone: two programs, with it and without, run in turn, and the
median of the differences counts. Take a machine that does nothing else: the differences are hundredths of a step.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from instructax import checkpoint, ppo, reward, stage, supervised
from instructax.goodput import Ledger
from instructax.heartbeat import Heartbeat
from instructax.integrity import digests
from instructax.model import joined, trained
from instructax.optimizer import step
from instructax.types import Params, TrainState
from instructax.watchdog import Watchdog
from instructax.workloads import untimed, work_of

STAGES = {  # the module that applies gradients, what is saved for the next stage, and the phases of a step
    "supervised": (supervised, "params", ("data", "update", "save")),
    "reward": (reward, "params", ("data", "update", "save")),
    "ppo": (ppo, "ema", ("data", "update", "rollout", "score", "ppo_update", "samples", "save")),
}
REPETITIONS = 2000  # of beats, which take microseconds


def measure(config: Any, *, pairs: int) -> dict[str, float]:
    """Seconds of a step, and of what is checked and noted in it; `share` is their sum by the step's seconds.

    `config` is the config of a stage that trains; how often it saves and logs is its `run`. `pairs`: steps with the
    check of the update, each beside one without.
    """
    make, mesh = work_of(config)
    module, exported, phases = STAGES[config.stage]
    config, _ = stage.choose_attention(config)
    checked = make(config, mesh, 0.0)
    checked.run(untimed)
    with unchecked(module):
        plain = make(config, mesh, 0.0)
        plain.run(untimed)  # compiled here, without the check
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for kind in (True, False) if pair % 2 else (False, True):  # what runs second is warmer
            seconds[kind].append(_seconds(lambda kind=kind: (checked if kind else plain).run(untimed)))
    differences = [a - b for a, b in zip(seconds[True], seconds[False], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        noted = _noting(Path(folder), phases, config.run.log_every)
        at_save = _saving(Path(folder), checked.state(), exported)
    found = {
        "step": statistics.median(seconds[True]),
        "update check": max(statistics.median(differences), 0.0),
        "beats and ledger": noted,
        "finite check at saves": at_save[0] / config.run.save_every,
        "hashing at saves": at_save[1] / config.run.save_every,
    }
    return {**found, "share": (sum(found.values()) - found["step"]) / found["step"]}


@contextlib.contextmanager
def unchecked(module: Any) -> Iterator[None]:
    """While entered, updates of the stage `module` that are traced move whatever their gradients are."""
    ours = module.apply_gradients

    def apply(optimizer: Any, state: TrainState, gradients: Params, learning_rate: Any) -> TrainState:
        norm, before = optax.tree.norm(gradients), (trained(state.params), state.opt_state)
        params, opt_state = step(optimizer, gradients, learning_rate, norm, *before)
        return dataclasses.replace(state, params=joined(params, state.params), opt_state=opt_state)

    module.apply_gradients = apply
    try:
        yield
    finally:
        module.apply_gradients = ours


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _noting(folder: Path, phases: tuple[str, ...], log_every: int) -> float:
    """Seconds that a step's beats take, and its part of the ledger's lines."""
    heartbeat, ledger = Heartbeat(folder / "heartbeat.json"), Ledger(folder / "goodput.jsonl", writes=True)
    with contextlib.closing(heartbeat), contextlib.closing(ledger), Watchdog(3600.0, folder / "hang.txt") as watchdog:

        def beats_of(number: int) -> None:
            for name in phases:
                for beat in (name, f"the end of {name}"):
                    for listener in (watchdog, heartbeat, ledger):
                        listener.beat(beat)
            if number % log_every == 0:
                ledger.write(number, least=0.0)

        return _seconds(lambda: [beats_of(number) for number in range(REPETITIONS)]) / REPETITIONS


def _saving(folder: Path, state: Any, exported: str) -> tuple[float, float]:
    """Seconds of one look at a stage's whole state for numbers that are none, and of hashing it once it is written."""
    checkpoint.finite(state)
    looks = [_seconds(lambda: checkpoint.finite(state)) for _ in range(5)]
    saving = checkpoint.Checkpoints(folder, save_every=1, keep=1, best_metric="", exported=exported)
    saving.save(1, state, {})
    saving.close()
    hashes = [_seconds(lambda: digests(folder / "checkpoints" / "1")) for _ in range(5)]
    return statistics.median(looks), statistics.median(hashes)


def table(found: Mapping[str, float]) -> list[str]:
    """The figures as lines to read."""
    step = found["step"]
    parts = {name: seconds for name, seconds in found.items() if name not in ("step", "share")}
    lines = [f"{name:<22} {1e6 * seconds:>10,.1f} µs  {seconds / step:>7.2%}" for name, seconds in parts.items()]
    return [f"{'step':<22} {1e6 * step:>10,.1f} µs", *lines, f"{'all checks':<22} {'':>13}  {found['share']:>7.2%}"]
