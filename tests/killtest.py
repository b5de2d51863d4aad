"""Does a run that is killed end as one that nothing stopped? Real commands, SIGKILL, and
sha256 of all that they leave.

Each stage of the tiny alignment experiment runs once undisturbed. Then the same command
runs again in other folders, is killed at drawn places, and started again until it ends. A
place is a phase that the heartbeat shows, a step, and a delay drawn up to the time that the
phase takes; or a moment by the clock alone.
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

from instructax import cli, experiment
from instructax.checkpoints.checksums import has_checksums
from instructax.checkpoints.parents import is_finished
from instructax.checkpoints.restore import read_arrays
from instructax.checkpoints.steps import committed_steps
from instructax.config import require
from instructax.experiment import RunSpec, metrics_of
from instructax.runtime.files import write_json
from instructax.runtime.heartbeat import last_beat

EXPERIMENT, SIZE = "experiments/alignment.py", "tiny"
KEEPING = {"run.log_every": 1, "run.evaluate_every": 3, "run.save_every": 2, "run.keep": 2}
# Stage → what is changed: steps enough to be killed between, dropout, the best step kept as
# well.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 12, "run.best_metric": "text_loss"},
    "sft": {
        "steps": 12,
        "epochs": 0.0,
        "dropout": 0.2,
        "run.best_metric": "demonstrations_loss",
    },
    "reward": {"steps": 12, "epochs": 0.0, "run.best_metric": "held_out_loss"},
    "ppo": {"steps": 8, "run.best_metric": "text_loss"},
    "ppo-ptx": {"steps": 8, "run.best_metric": "text_loss"},
}
READS = {  # run → the runs that it reads
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
KILLS_OF_A_RUN = 5
POLL = 5e-4  # seconds
LEAST = {
    "save": 0.5,
    "finish": 0.05,
    "restore": 0.3,
    "data": 0.01,
}  # seconds: what goes on behind a phase counts too
COLD = 8.0  # seconds in which compiling is killed


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is to be killed."""

    phase: str
    step: int  # finished steps, at least
    delay: float  # seconds after the phase has begun; of "init" and "clock" after the start of the process


class Commands:
    """The commands of the runs under `root`, with one cache of compiled programs."""

    def __init__(self, root: Path, train: Sequence[str]):
        self.root, self._train = root, tuple(train)
        runs = experiment.load_file(EXPERIMENT).get_runs(SIZE, str(root))
        self.runs = {run.name: self._changed(run) for run in runs if run.name in READS}

    def _changed(self, run: RunSpec) -> RunSpec:
        changes = KEEPING | STAGES[run.name] if run.name in STAGES else {}
        if (
            run.name == "reward"
        ):  # what answers of PPO it learns from besides is of no matter here
            changes = {
                **changes,
                "data.comparisons": (f"{self.root}/collect-early/comparisons.jsonl.gz",),
            }
        return dataclasses.replace(run, overrides={**run.overrides, **changes})

    @contextlib.contextmanager
    def started(
        self, name: str, workdir: Path, *, cold: bool = False
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The process of a run, killed at the end if it is still there; a `cold` one finds
        nothing compiled."""
        run = self.runs[name]
        values = (
            f"--config.{key}={value!r}"
            if not isinstance(value, str)
            else f"--config.{key}={value}"
            for key, value in run.overrides.items()
        )
        cache = self.root / ("cold" if cold else "compiled")
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what is waited for here is the compiler
        }
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with workdir.with_name(f"{workdir.name}.log").open("ab") as output:
            process = subprocess.Popen(
                [*self._train, "--config", run.config, *values, "--workdir", str(workdir)],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is ours
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def finish(self, name: str, workdir: Path) -> tuple[int, float]:
        """(exit code, seconds) of a run that is left alone."""
        since = time.monotonic()
        with self.started(name, workdir) as process:
            return process.wait(), time.monotonic() - since


def straight(
    commands: Commands, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, float]:
    """Runs what is not finished yet of the undisturbed runs that `names` need; seconds of
    each of `names`, once more compiled."""
    for name in _needed(names):
        if not is_finished(commands.root / name):
            code, seconds = commands.finish(name, commands.root / name)
            require(
                code == 0,
                f"{name} without a kill ended with code {code}: see {commands.root / name}.log",
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
    """`names` and what they read, in the order of the pipeline."""
    needed = set(names)
    for name in reversed(READS):
        needed |= set(READS[name]) if name in needed else set()
    return [name for name in READS if name in needed]


def draw(
    name: str, random: random.Random, seconds: float, metrics: Sequence[Mapping[str, Any]]
) -> Iterator[Place]:
    """Places of a stage for ever, each phase once before any comes again."""
    phases = (*PLACES, *UPDATES.get(name, ("update",)))
    while True:
        for phase in random.sample(phases, len(phases)):
            lasting = [
                line[f"time/{phase}_s"] for line in metrics[1:] if f"time/{phase}_s" in line
            ]
            longest = max(lasting, default=0.0) + LEAST.get(phase, 0.0)
            longest = {"init": seconds / 2, "clock": seconds, "compile": COLD}.get(
                phase, longest
            )
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
    """Kills the process at the place; False if it ended before."""
    since = time.monotonic()
    while process.poll() is None:
        if _reached(process.pid, workdir, place, time.monotonic() - since):
            if place.phase not in ("init", "clock"):
                time.sleep(place.delay)
            process.kill()
            return process.wait() == -signal.SIGKILL
        time.sleep(POLL)
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
    """Where a killed process was: what its heartbeat and its folder say."""
    beat, root = last_beat(workdir / "heartbeat-0.json"), workdir / "checkpoints"
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
    """sha256 of what a finished run has left: parameters, optimizer, average, counters,
    logs without times, summary. Missing hashes of its last step are in it too. Raises
    ValueError for a last step that is damaged."""
    last = workdir / "checkpoints" / str(committed_steps(workdir)[-1])
    arrays = read_arrays(last)
    averaged = any(name.startswith("state/policy/") for name in arrays)
    digests = {group: hashlib.sha256() for group in ("parameters", "optimizer", "counters")}
    if averaged:
        digests["average"] = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        parts = name.split("/")
        group = (
            "average"
            if averaged and parts[0] == "params"
            else "parameters"
            if "params" in parts
            else "counters"
        )
        host = np.asarray(value)
        group = "optimizer" if "opt_state" in parts else group
        digests[group].update(
            f"{name} {host.dtype} {host.shape} ".encode() + host.tobytes()
        )
    metrics = [_timeless(line) for line in metrics_of(workdir)]
    texts = {
        "metrics": json.dumps(metrics),
        "samples": (workdir / "samples.jsonl").read_text(),
        "summary": json.dumps(_timeless(experiment.summary_of(workdir))),
        "last step": f"{last.name} {has_checksums(last)}",
    }
    return {group: digest.hexdigest() for group, digest in digests.items()} | {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
    }


def _timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("time/")}


def differences(workdir: Path, undisturbed: Path) -> list[str]:
    """What of two finished runs is not the same."""
    ours, theirs = fingerprint(workdir), fingerprint(undisturbed)
    return [name for name in theirs if ours.get(name) != theirs[name]]


def killed_run(
    commands: Commands,
    name: str,
    workdir: Path,
    places: Iterator[Place],
    kills: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One run, killed up to `kills` times and then left alone: where each kill fell, and
    what differs in the end."""
    found: list[dict[str, Any]] = []
    for place in (next(places) for _ in range(kills)):
        with commands.started(name, workdir, cold=place.phase == "compile") as process:
            if not strike(process, workdir, place):
                break  # it had come to its end; whether well, is seen next
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
    """Kills each of the stages `names` at least `kills` times; the number of runs that then
    differ.

    `train` is the command that trains, to which config and workdir are added. Everything is
    under `root`, where what is finished is not run again; the table is `killtest.json`,
    written after every run.
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
            name, random.Random(f"{seed} {name}"), times[name], metrics_of(root / name)
        )
        for name in names
    }
    left, table = dict.fromkeys(names, kills), []
    progress = Progress(kills * len(names))
    while any(left.values()):
        for name in (
            name for name in names if left[name]
        ):  # in turn: a test that is ended early has seen all stages
            workdir = root / "killed" / f"{name}-{len(table)}"
            shutil.rmtree(workdir, ignore_errors=True)
            say = partial(progress.killed, name)
            record = killed_run(
                commands, name, workdir, places[name], min(left[name], KILLS_OF_A_RUN), say
            )
            # A run that ends wrongly by itself would do so for ever.
            left[name] = max(left[name] - len(record["kills"]), 0) if record["kills"] else 0
            table.append(record)
            _say(f"{name}: {_outcome(record)}")
            write_json(
                root / "killtest.json", {"seed": seed, "kills": kills, "runs": table}
            )
    print("\n".join(rows(table)), flush=True)
    return sum(bool(record["differing"]) for record in table)


class Progress:
    """A line for each kill, with the time that the others will take."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def killed(self, name: str, line: str) -> None:
        """Notes a kill of the stage `name`; `line` says where it fell."""
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        _say(
            f"[{self._done}/{self._total}] {name} {line}; eta {timedelta(seconds=round(left))}"
        )


def _say(line: str) -> None:
    print(line, flush=True)


def _outcome(record: Mapping[str, Any]) -> str:
    return "DIFFERS: " + ", ".join(record["differing"]) if record["differing"] else "equal"


def rows(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as lines to read: a line for each kill, a line for each stage."""
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
            f"{name}: {killed} kills in {len(mine)} runs, {equal} of them equal to the undisturbed one"
        )
    return lines


WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of all runs; what is finished in it is not run again"
)
KILLED = flags.DEFINE_list(
    "stages", ["pretrain", "sft", "reward", "ppo", "ppo-ptx"], "which stages are killed"
)
KILLS = flags.DEFINE_integer("kills", 20, "of each stage, at least", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the places")


def main(argv: list[str]) -> int:
    """Runs the test from the command line; 1 if a run ended otherwise."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER, and nothing but flags", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    differing: list[int] = []
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # the run under way is ended too

    def call() -> None:
        train = [sys.executable, "scripts/train.py"]
        root = Path(str(WORKDIR.value))
        differing.append(
            run(root, train, names=KILLED.value, kills=KILLS.value, seed=SEED.value)
        )

    return cli.guarded(call) or int(differing[0] > 0)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
