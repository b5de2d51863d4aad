"""Does a killed run end like an undisturbed one? Real commands, SIGKILL, and sha256 of the
results: python -m tests.killtest --workdir runs/killtest

Each stage of the tiny alignment experiment runs once undisturbed. Then the same command
runs in other folders, is killed at random places, and is restarted until it ends. A place
is a phase that the heartbeat shows, a step, and a delay of at most the time that the phase
takes; or just a moment by the clock.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from tests.support.run_logs import last_beat

from instructax import cli, experiment
from instructax.checkpoints.checksums import has_checksums
from instructax.checkpoints.parents import is_finished
from instructax.checkpoints.restore import read_arrays
from instructax.checkpoints.steps import committed_steps
from instructax.config import require
from instructax.experiment import RunSpec
from instructax.runtime import metric_log
from instructax.runtime.files import write_json
from instructax.runtime.metric_log import read_metrics

EXPERIMENT = "experiments/alignment.py"
SIZE = "tiny"

# How all killed runs are logged and saved.
KEEPING = {"run.log_every": 1, "run.evaluate_every": 3, "run.save_every": 2, "run.keep": 2}

# Stage → changed values: enough steps to be killed in between, dropout, and a best step.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 12, "run.best_metric": "text_loss"},
    "sft": {
        "steps": 12,
        "epochs": 0.0,
        "dropout": 0.2,
        "run.best_metric": "demonstrations_loss",
    },
    "reward": {"steps": 12, "epochs": 0.0, "run.best_metric": "validation_loss"},
    "ppo": {"steps": 8, "run.best_metric": "text_loss"},
    "ppo-ptx": {"steps": 8, "run.best_metric": "text_loss"},
}

# Run → the runs that it reads.
READS = {
    "world": (),
    "pretrain": ("world",),
    "sft": ("pretrain",),
    "collect-early": ("sft",),
    "reward": ("collect-early",),
    "ppo": ("reward",),
    "ppo-ptx": ("reward",),
}
PLACES = ("init", "restore", "compile", "data", "evaluate", "save", "finish", "clock")
UPDATES = {
    "ppo": ("rollout", "score", "ppo_update"),
    "ppo-ptx": ("rollout", "score", "ppo_update"),
}

MAX_KILLS_PER_RUN = 5
POLL_SECONDS = 5e-4

# Seconds added to the length of a phase, for the work that it leaves to the background.
BACKGROUND_SECONDS = {"save": 0.5, "finish": 0.05, "restore": 0.3, "data": 0.01}

# Seconds after the start of compilation within which a process is killed.
COMPILE_SECONDS = 8.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is to be killed."""

    phase: str
    step: int  # finished steps, at least
    delay: float  # seconds after the phase began, or after the process started


class Commands:
    """The commands of the runs under `root`, with one cache of compiled programs."""

    def __init__(self, root: Path, train: Sequence[str]):
        self.root = root
        self._train = tuple(train)
        runs = experiment.load_file(EXPERIMENT).get_runs(SIZE, str(root))
        self.runs = {run.name: self._changed(run) for run in runs if run.name in READS}

    def _changed(self, run: RunSpec) -> RunSpec:
        changes = KEEPING | STAGES[run.name] if run.name in STAGES else {}
        if run.name == "reward":
            # Without the comparisons of PPO's answers, whose runs are not needed here.
            changes = {
                **changes,
                "data.comparisons": (f"{self.root}/collect-early/comparisons.jsonl.gz",),
            }
        return dataclasses.replace(run, overrides={**run.overrides, **changes})

    @contextlib.contextmanager
    def started(
        self, name: str, workdir: Path, *, cold: bool = False
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Context manager: the process of a run, which is killed at the end if it is alive.

        A `cold` process finds no compiled programs.
        """
        run = self.runs[name]
        values = []
        for key, value in run.overrides.items():
            shown = value if isinstance(value, str) else repr(value)
            values.append(f"--config.{key}={shown}")
        cache = self.root / ("cold" if cold else "compiled")
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compilation
        }
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with workdir.with_name(f"{workdir.name}.log").open("ab") as output:
            process = subprocess.Popen(
                [*self._train, "--config", run.config, *values, "--workdir", str(workdir)],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C must only reach this program
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self, name: str, workdir: Path) -> tuple[int, float]:
        """Runs to the end without a kill and returns (exit code, seconds)."""
        since = time.monotonic()
        with self.started(name, workdir) as process:
            return process.wait(), time.monotonic() - since


def straight(
    commands: Commands, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, float]:
    """Runs the undisturbed runs that `names` need, unless they are finished.

    Returns the seconds that each of `names` takes when its programs are compiled.
    """
    for name in _needed(names):
        if not is_finished(commands.root / name):
            code, seconds = commands.finish(name, commands.root / name)
            require(
                code == 0,
                f"{name} without a kill ended with code {code}: "
                f"see {commands.root / name}.log",
            )
            say(f"{name} without a kill: {seconds:.0f} s")
    times = {}
    for name in names:
        again = commands.root / "again" / name
        shutil.rmtree(again, ignore_errors=True)
        code, times[name] = commands.finish(name, again)
        require(
            code == 0 and not differences(again, commands.root / name),
            f"{name} is not the same twice: {again}",
        )
        say(f"{name} again, equal: {times[name]:.0f} s")
    return times


def _needed(names: Sequence[str]) -> list[str]:
    """`names` and the runs that they read, in the order of the pipeline."""
    needed = set(names)
    for name in reversed(READS):
        needed |= set(READS[name]) if name in needed else set()
    return [name for name in READS if name in needed]


def draw(
    name: str, random: random.Random, seconds: float, metrics: Sequence[Mapping[str, Any]]
) -> Iterator[Place]:
    """Yields places without end; every phase occurs once before one occurs again."""
    phases = (*PLACES, *UPDATES.get(name, ("update",)))
    while True:
        for phase in random.sample(phases, len(phases)):
            lasting = [
                line[f"time/{phase}_s"] for line in metrics[1:] if f"time/{phase}_s" in line
            ]
            longest = max(lasting, default=0.0) + BACKGROUND_SECONDS.get(phase, 0.0)
            longest = {
                "init": seconds / 2,
                "clock": seconds,
                "compile": COMPILE_SECONDS,
            }.get(phase, longest)
            last = (
                len(metrics) - 1
                if phase == "finish"
                else random.randrange(len(metrics) - 1)
            )
            yield Place(
                phase,
                0 if phase in ("restore", "compile") else last,
                random.uniform(0, longest),
            )


def strike(process: subprocess.Popen[bytes], workdir: Path, place: Place) -> bool:
    """Kills the process at the place; returns False if it ended before."""
    since = time.monotonic()
    while process.poll() is None:
        if _reached(process.pid, workdir, place, time.monotonic() - since):
            if place.phase not in ("init", "clock"):
                time.sleep(place.delay)
            process.kill()
            return process.wait() == -signal.SIGKILL
        time.sleep(POLL_SECONDS)
    return False


def _reached(pid: int, workdir: Path, place: Place, seconds: float) -> bool:
    if place.phase in ("init", "clock"):
        return seconds >= place.delay
    beat = last_beat(workdir / "heartbeat-0.json")
    if beat.get("pid") != pid:
        return False
    if place.phase == "compile":  # the first update of this process
        return beat["phase"] in ("update", "rollout")
    return beat["phase"] == place.phase and (
        place.phase == "finish" or _logged(workdir) >= place.step
    )


def _logged(workdir: Path) -> int:
    """The last step in the log, 0 if there is none."""
    try:
        whole = (workdir / "metrics.jsonl").read_text().rpartition("\n")[0]
        return json.loads(whole.splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def found_at(workdir: Path, pid: int, place: Place) -> dict[str, Any]:
    """Where a killed process was, according to its heartbeat and its folder."""
    beat = last_beat(workdir / "heartbeat-0.json")
    root = workdir / "checkpoints"
    steps = committed_steps(workdir)
    saving = bool(steps) and not has_checksums(root / str(steps[-1]))
    saving = (
        saving or any(root.glob("*.orbax-checkpoint-tmp*")) or any(root.glob("*.deleted"))
    )
    phase = beat["phase"] if beat.get("pid") == pid else "init"
    return {
        "wanted": place.phase,
        "phase": "compile" if place.phase == "compile" and phase != "init" else phase,
        "step": _logged(workdir),
        "saving": saving,
        "saved": steps[-1] if steps else 0,
    }


def fingerprint(workdir: Path) -> dict[str, str]:
    """Group → sha256 of the results of a finished run.

    The groups are parameters, optimizer, average, counters, logs without times, the
    summary, and whether the last step was hashed. Raises ConfigError if that step is
    damaged.
    """
    last = workdir / "checkpoints" / str(committed_steps(workdir)[-1])
    arrays = read_arrays(last)
    averaged = any(name.startswith("state/policy/") for name in arrays)
    digests = {group: hashlib.sha256() for group in ("parameters", "optimizer", "counters")}
    if averaged:
        digests["average"] = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        parts = name.split("/")
        group = "counters"
        if "opt_state" in parts:
            group = "optimizer"
        elif averaged and parts[0] == "params":
            group = "average"
        elif "params" in parts:
            group = "parameters"
        host = np.asarray(value)
        digests[group].update(
            f"{name} {host.dtype} {host.shape} ".encode() + host.tobytes()
        )
    metrics = [_timeless(line) for line in read_metrics(workdir)]
    texts = {
        "metrics": json.dumps(metrics),
        "samples": (workdir / "samples.jsonl").read_text(),
        "summary": json.dumps(_timeless(metric_log.read_summary(workdir))),
        "last step": f"{last.name} {has_checksums(last)}",
    }
    return {group: digest.hexdigest() for group, digest in digests.items()} | {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
    }


def _timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("time/")}


def differences(workdir: Path, undisturbed: Path) -> list[str]:
    """The groups of `fingerprint` in which two finished runs differ."""
    ours = fingerprint(workdir)
    theirs = fingerprint(undisturbed)
    return [name for name in theirs if ours.get(name) != theirs[name]]


def killed_run(
    commands: Commands,
    name: str,
    workdir: Path,
    places: Iterator[Place],
    kills: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Kills a run up to `kills` times, lets it end, and compares its results.

    Returns where each kill fell, and what differs.
    """
    found: list[dict[str, Any]] = []
    for place in (next(places) for _ in range(kills)):
        with commands.started(name, workdir, cold=place.phase == "compile") as process:
            if not strike(process, workdir, place):
                break  # it ended by itself; the comparison shows whether correctly
        found.append(found_at(workdir, process.pid, place))
        say(f"killed in {_where(found[-1])}; saved: step {found[-1]['saved']}")
    code, _ = commands.finish(name, workdir)
    try:
        differing = (
            differences(workdir, commands.root / name)
            if code == 0
            else [f"exit code {code}"]
        )
    except (
        ValueError,
        IndexError,
        OSError,
    ) as error:  # a last step that is damaged, or none
        differing = [str(error)]
    if not differing:
        shutil.rmtree(workdir)
    return {"stage": name, "kills": found, "differing": differing}


def _where(kill: Mapping[str, Any]) -> str:
    return f"{kill['phase']} after step {kill['step']}" + (
        ", saving" if kill["saving"] else ""
    )


def run(
    root: Path, train: Sequence[str], *, names: Sequence[str], kills: int, seed: int
) -> int:
    """Kills each of the stages `names` at least `kills` times.

    Args:
      root: the folder of all runs; finished ones are not run again. The table is written to
        `killtest.json` in it after every run.
      train: the training command, to which config and workdir are added.
      names: the stages to kill.
      kills: the number of kills per stage.
      seed: of the places.

    Returns:
      The number of runs that differ from the undisturbed ones.
    """
    unknown = [name for name in names if name not in STAGES]
    require(
        not unknown, f"--stages has {', '.join(unknown)}: give some of {','.join(STAGES)}"
    )
    root = root.absolute()
    commands = Commands(root, train)
    times = straight(commands, names, _say)
    places = {
        name: draw(
            name, random.Random(f"{seed} {name}"), times[name], read_metrics(root / name)
        )
        for name in names
    }
    left = dict.fromkeys(names, kills)
    table = []
    progress = Progress(kills * len(names))
    while any(left.values()):
        # In turn, so that a test that is stopped early has seen all stages.
        for name in [name for name in names if left[name]]:
            workdir = root / "killed" / f"{name}-{len(table)}"
            shutil.rmtree(workdir, ignore_errors=True)
            say = partial(progress.killed, name)
            record = killed_run(
                commands,
                name,
                workdir,
                places[name],
                min(left[name], MAX_KILLS_PER_RUN),
                say,
            )
            # Do not repeat a run that fails without being killed.
            left[name] = max(left[name] - len(record["kills"]), 0) if record["kills"] else 0
            table.append(record)
            _say(f"{name}: {_outcome(record)}")
            write_json(
                root / "killtest.json", {"seed": seed, "kills": kills, "runs": table}
            )
    print("\n".join(rows(table)), flush=True)
    return sum(bool(record["differing"]) for record in table)


class Progress:
    """Prints a line for each kill, with the estimated time to the end."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def killed(self, name: str, line: str) -> None:
        """Counts a kill of the stage `name`; `line` says where it fell."""
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        _say(
            f"[{self._done}/{self._total}] {name} {line}; "
            f"eta {timedelta(seconds=round(left))}"
        )


def _say(line: str) -> None:
    print(line, flush=True)


def _outcome(record: Mapping[str, Any]) -> str:
    return "DIFFERS: " + ", ".join(record["differing"]) if record["differing"] else "equal"


def rows(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as text: one line per kill, then one per stage."""
    lines = [f"{'stage':<10}{'run':>4}  {'killed in':<40}{'went on from':>13}  outcome"]
    for number, record in enumerate(table):
        for kill in record["kills"]:
            where = (
                f"{record['stage']:<10}{number:>4}  {_where(kill):<40}{kill['saved']:>13}"
            )
            lines.append(f"{where}  {_outcome(record)}")
    for name in dict.fromkeys(record["stage"] for record in table):
        mine = [record for record in table if record["stage"] == name]
        equal = sum(not record["differing"] for record in mine)
        killed = sum(len(record["kills"]) for record in mine)
        lines.append(
            f"{name}: {killed} kills in {len(mine)} runs, {equal} of them equal to the "
            "undisturbed one"
        )
    return lines


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of all runs; finished ones are not run again."
)
KILLED = flags.DEFINE_list(
    "stages", ["pretrain", "sft", "reward", "ppo", "ppo-ptx"], "The stages to kill."
)
KILLS = flags.DEFINE_integer("kills", 20, "The number of kills per stage.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "The seed of the places.")


def main(argv: list[str]) -> int:
    """Runs the test from the command line; returns 1 if a killed run differs."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER, and nothing but flags", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    differing: list[int] = []
    # As Ctrl-C: the current run must be ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def call() -> None:
        train = [sys.executable, "scripts/train.py"]
        root = Path(str(WORKDIR.value))
        differing.append(
            run(root, train, names=KILLED.value, kills=KILLS.value, seed=SEED.value)
        )

    return cli.guarded(call) or int(differing[0] > 0)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
