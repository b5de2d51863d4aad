"""Runs and their order: load a config, run its stage, run a list of them and resume where
it stopped."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instructax.checkpoints.manifest import flatten
from instructax.checkpoints.parents import is_finished
from instructax.config import ConfigError, construct, format_value, require
from instructax.runtime.redaction import redact
from instructax.runtime.workdir_lock import lock_workdir
from instructax.stages import memory
from instructax.training import run as stage


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of an experiment."""

    name: str  # its folder under the experiment's workdir
    config: str  # file and argument: "configs/ppo.py:micro"
    overrides: Mapping[str, Any]  # dotted name → value


def load_file(path: str | Path) -> Any:
    """The Python file `path` as a module; a config or an experiment is code, and is run."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    root = str(Path.cwd())
    if root not in sys.path:
        sys.path.append(
            root
        )  # files of configs/ import each other; what is installed comes first
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(run: Run) -> dict[str, Any]:
    """The config of `run`, its overrides applied: a nested dict. Raises ConfigError for an
    unknown name or type."""
    path, _, arg = run.config.partition(":")
    module = load_file(path)
    require(
        hasattr(module, "get_config"), f"{path} is not a config: it needs get_config(arg)"
    )
    try:
        config = module.get_config(arg)
        config.lock()  # else a misspelt override would be a value of its own
        config.update_from_flattened_dict(dict(run.overrides))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{run.config} with {format_value(dict(run.overrides))}: {_without_config(error)}"
        ) from None
    return config.to_dict()


def _without_config(error: Exception) -> str:
    """What ml_collections says of an override, but for the whole config, which it adds
    where a name is unknown."""
    first, *others = str(error.args[0] if error.args else error).splitlines() or [""]
    hint = others[-1:] if others and others[-1].startswith("Did you mean") else []
    return " ".join([first.partition(" Other fields present")[0], *hint])


def stage_of(config: Mapping[str, Any]) -> tuple[type, Any]:
    """(config dataclass, module) of the stage that `config` names; imports that stage
    alone."""
    modules = {
        "world": ("simulation.files", "WorldConfig"),
        "collect": ("stages.collect", "CollectConfig"),
        "supervised": ("stages.sft", "SupervisedConfig"),
        "reward": ("stages.reward_model", "RewardConfig"),
        "ppo": ("stages.ppo.stage", "PpoConfig"),
        "evaluate": ("stages.evaluate", "EvaluateConfig"),
        "tasks": ("stages.public_tasks", "TasksConfig"),
    }
    name = config.get("stage")
    if name not in tuple(modules):  # by equality: not all that a config can hold has a hash
        raise ConfigError(
            f"config.stage = {format_value(name)} must be one of {', '.join(modules)}"
        )
    module = importlib.import_module(f"instructax.{modules[name][0]}")
    return getattr(module, modules[name][1]), module


def run_stage(config: Mapping[str, Any], workdir: Path) -> bool:
    """Runs one stage to its end, from the start or from where it stopped; False if there
    was nothing left to do.

    Raises ConfigError (a ValueError) for a value that cannot be used, training.Interrupted
    when asked to stop.
    """
    cls, module = stage_of(config)
    built = construct(cls, config)
    if is_finished(workdir):
        stage.claim(workdir, config)
        print(f"{workdir} is finished; nothing to do", flush=True)
        return False
    with lock_workdir(workdir):
        stage.claim(workdir, config)
        module.train(built, workdir, config)
    return True


def values_of(config: Mapping[str, Any]) -> str:
    """A line for each value of a config, as the command line names it."""
    return "\n".join(
        f"config.{name} = {value}" for name, value in flatten(redact(config)).items()
    )


def dry_run(config: Mapping[str, Any]) -> str:
    """Checks the config of a stage and says what it would hold on each device; reads no
    data."""
    cls, module = stage_of(config)
    built = construct(cls, config)
    if hasattr(module, "check"):
        module.check(built, memory.abstract_mesh(built.mesh))
    return memory.report(built) if hasattr(built, "run") else "nothing is trained"


def require_matplotlib() -> None:
    """Raises ConfigError where no figure can be drawn; asked before what the figures are of
    is computed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "figures are drawn by matplotlib, which is not installed: pip install 'instructax[plots]'"
        ) from None


def run_experiment(spec: str, root: Path, *, report_only: bool) -> None:
    """Runs the experiment `spec` (FILE:SIZE) in order under `root`, finished runs passed
    over, and reports."""
    path, _, size = spec.partition(":")
    experiment = load_file(path)
    require(
        hasattr(experiment, "get_runs") and hasattr(experiment, "report"),
        f"{path} is not an experiment: it needs get_runs(arg, root) and report(root)",
    )
    require_matplotlib()
    runs = experiment.get_runs(size, str(root))
    for number, run in enumerate([] if report_only else runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}: {run.config}", flush=True)
        run_stage(load_config(run), root / run.name)
    experiment.report(root)


def summary_of(workdir: Path) -> dict[str, Any]:
    """The final figures of a run. Raises ConfigError if it is not finished."""
    require(
        is_finished(workdir),
        f"{workdir} is not a finished run: run the whole experiment, not its report alone",
    )
    return json.loads((workdir / "summary.json").read_text())


def metrics_of(workdir: Path) -> list[dict[str, Any]]:
    """The metrics of every step of a run."""
    return [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def samples_of(workdir: Path) -> list[dict[str, Any]]:
    """The samples that a run wrote."""
    return [
        json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()
    ]
