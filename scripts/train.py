#!/usr/bin/env python3
"""Runs one stage.

python scripts/train.py --config configs/ppo.py:micro --config.kl_coef=0.05 \\
    --workdir runs/micro/ppo

The same command resumes where it stopped; a finished run is not run again. Exit codes:

    0    done
    1    an internal error, or the failure of another process of the run
    2    a value, file or folder that cannot be used; the error is one line
    3    diverged, or an invariant of the run is violated
    42   stopped by Ctrl-C or SIGTERM after saving; the same command resumes
    130  stopped by Ctrl-C without saving: by a second signal, before the first step, after
         the last step, or in a stage without checkpoints
    143  the same, by SIGTERM
    134  ended by the watchdog
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from instructax import cli

# Config files import each other from the root of the project.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file and its argument, FILE:ARGUMENT; override with --config.name=value.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics and samples."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For several processes: HOST:PORT of the first one, or auto to ask the cluster.",
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "The number of processes that share the run.", lower_bound=1
)
PROCESS = flags.DEFINE_integer(
    "process", None, "The index of this process, from 0.", lower_bound=0
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print the config, the parameters and the memory per device, and stop.",
)


def main(argv: list[str]) -> int:
    """Parses the flags, runs the stage, and returns the exit code."""
    if len(argv) > 1 or CONFIG.value is None or not (WORKDIR.value or DRY_RUN.value):
        stray = f"unknown argument {argv[1]!r}; " if len(argv) > 1 else ""
        print(
            f"error: {stray}give --config=FILE:SIZE --config.name=value … --workdir=FOLDER",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it touches
    cli.enable_compilation_cache()
    # Imported here, so that --help answers without JAX.
    from instructax import experiment
    from instructax.runtime import distributed

    config = CONFIG.value.to_dict()
    if DRY_RUN.value:

        def report() -> None:
            # Check the config before printing anything of it.
            memory = experiment.dry_run(config)
            print(experiment.config_lines(config))
            print(memory)

        return cli.guarded(report)

    def run() -> None:
        counted = PROCESSES.value is not None or PROCESS.value is not None
        if COORDINATOR.value or counted:
            distributed.join_processes(
                COORDINATOR.value or "", PROCESSES.value, PROCESS.value
            )
        experiment.run_stage(config, pathlib.Path(WORKDIR.value or "."))

    # Outermost: a process that fails must end before it waits for the others.
    return distributed.exit_on_failure(lambda: cli.guarded(run))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: cli.parse_config(argv, CONFIG))
