"""Runs and experiments.

A run is one stage with one config. An experiment is a list of runs in order, followed by a
report; started again, it skips finished runs and resumes the one that was interrupted.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructax.checkpoints.manifest import flatten
from instructax.checkpoints.parents import is_finished
from instructax.config import ConfigError, format_value, require
from instructax.runtime.redaction import redact
from instructax.runtime.workdir_lock import lock_workdir
from instructax.stages import build_config, load_stage
from instructax.stages.memory import abstract_mesh, memory_report
from instructax.training.run import open_run
from instructax.training.workdir import claim_workdir


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run of an experiment, before it is set up."""

    # Its folder under the experiment's workdir.
    name: str
    # Config file and its argument, such as "configs/ppo.py:micro".
    config: str
    # Dotted name of a config value -> its value in this run.
    overrides: Mapping[str, Any]


def find_files(folder: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """The .jsonl.gz files of `folder` that match any of `patterns`, in the order of these.

    Args:
      folder: the folder with the data of an experiment.
      patterns: paths in the folder with wildcards, without .jsonl.gz.

    Raises:
      ConfigError: there is no such file.
    """
    files: list[str] = []
    for pattern in patterns:
        files += map(str, sorted(Path(folder).glob(f"{pattern}.jsonl.gz")))
    require(
        bool(files),
        f"{folder!r} has no {' or '.join(patterns)} with the ending .jsonl.gz: give the "
        "folder of the data, experiments/NAME.py:DATA",
    )
    return tuple(files)


def load_file(path: str | Path) -> Any:
    """The Python file `path` as a module. Configs and experiments are code, which runs."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    # Config files import each other from the working directory. It is searched last, so
    # that a folder in it cannot hide an installed package.
    root = str(Path.cwd())
    if root not in sys.path:
        sys.path.append(root)
    # Not in `sys.modules`: two files may have the same name.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_config(run: RunSpec) -> dict[str, Any]:
    """The config of `run` with its overrides, as a nested dict.

    Raises ConfigError for an unknown name or a wrong type.
    """
    path, _, arg = run.config.partition(":")
    module = load_file(path)
    require(
        hasattr(module, "get_config"), f"{path} is not a config: it needs get_config(arg)"
    )
    try:
        config = module.get_config(arg)
        # Without the lock, a misspelled override would become a new field.
        config.lock()
        config.update_from_flattened_dict(dict(run.overrides))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        overrides = format_value(dict(run.overrides))
        raise ConfigError(f"{run.config} with {overrides}: {_one_line(error)}") from None
    return config.to_dict()


def _one_line(error: Exception) -> str:
    """An ml_collections error on one line, without the dump of the whole config that it
    appends to unknown names."""
    # The suggestion, if there is one, is on the last line.
    lines = str(error.args[0] if error.args else error).splitlines() or [""]
    message = lines[0].partition(" Other fields present")[0]
    if len(lines) > 1 and lines[-1].startswith("Did you mean"):
        message = f"{message} {lines[-1]}"
    return message


def run_stage(values: Mapping[str, Any], workdir: Path) -> bool:
    """Runs a stage to its end, from the start or from its newest checkpoint.

    Args:
      values: config of the run, a nested dict; `values["stage"]` names the stage.
      workdir: folder of the run.

    Returns:
      Whether anything was run; False if the run was finished already.

    Raises:
      ConfigError: a value cannot be used.
      training.loop.Interrupted: the run was asked to stop.
    """
    config = build_config(values)
    stage = load_stage(config.stage)
    # No lock: nothing writes to a finished workdir. `claim_workdir` compares the configs.
    if is_finished(workdir):
        claim_workdir(workdir, values)
        print(f"{workdir} is finished; nothing to do", flush=True)
        return False
    with lock_workdir(workdir):
        claim_workdir(workdir, values)
        stage.train(open_run(stage, config, workdir, values))
    return True


def config_lines(config: Mapping[str, Any]) -> str:
    """One line per value of a config, in the form of the command line."""
    lines = []
    # Redacted, because the lines end up in logs.
    for name, value in flatten(redact(config)).items():
        lines.append(f"config.{name} = {value}")
    return "\n".join(lines)


def dry_run(values: Mapping[str, Any]) -> str:
    """Checks a config and reports the memory that its run needs on each device.

    Reads no data and needs no devices.
    """
    config = build_config(values)
    stage = load_stage(config.stage)
    # Shapes and shardings follow from the config alone.
    mesh = abstract_mesh(config.mesh) if hasattr(config, "mesh") else None
    stage.validate(config, mesh)
    return memory_report(config, stage.memory(config, mesh))


def require_matplotlib() -> None:
    """Raises ConfigError if figures cannot be drawn, before hours of training for them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "figures need matplotlib, which is not installed: pip install "
            "'instructax[plots]'"
        ) from None


def run_experiment(spec: str, root: Path, *, report_only: bool) -> None:
    """Runs an experiment in order, skipping finished runs, and writes its report.

    Args:
      spec: FILE:SIZE of the experiment.
      root: its workdir; each run gets a folder in it.
      report_only: write the report of finished runs, and run nothing.
    """
    path, _, size = spec.partition(":")
    experiment = load_file(path)
    require(
        hasattr(experiment, "get_runs") and hasattr(experiment, "report"),
        f"{path} is not an experiment: it needs get_runs(arg, root) and report(root)",
    )
    require_matplotlib()
    runs = experiment.get_runs(size, str(root))
    # A run that fails ends the experiment: later runs may start from it.
    if not report_only:
        for number, run in enumerate(runs, start=1):
            print(f"[{number}/{len(runs)}] {run.name}: {run.config}", flush=True)
            # Loaded one by one: a config may depend on files that an earlier run writes.
            run_stage(load_config(run), root / run.name)
    experiment.report(root)
