#!/usr/bin/env python3
"""Runs one stage: python scripts/train.py --config configs/ppo.py:micro
--config.kl_coef=0.05 --workdir runs/micro/ppo

The same command again goes on where it stopped; a finished run is left alone. Exit codes: 0
done, 2 a value that cannot be used (one line says which), 3 diverged or an invariant of the
run is broken, 42 asked to stop and saved (the same command goes on), 130 interrupted by
hand before anything could be saved, 134 stopped by the watchdog, 1 an error of the program
itself.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from instructax import cli

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE:ARGUMENT of a config; values as --config.name=value"
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run: checkpoints, metrics, samples"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "several processes: HOST:PORT of the first; auto: ask the cluster"
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "how many processes share the run", lower_bound=1
)
PROCESS = flags.DEFINE_integer(
    "process", None, "which of them this one is, from 0", lower_bound=0
)
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print config, parameters and memory per device, and stop"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or CONFIG.value is None or not (WORKDIR.value or DRY_RUN.value):
        stray = f"unknown argument {argv[1]!r}; " if len(argv) > 1 else ""
        print(
            f"error: {stray}give --config=FILE:SIZE --config.name=value … --workdir=FOLDER",
            file=sys.stderr,
        )
        return 2
    logging.set_verbosity(logging.WARNING)  # orbax reports each file it touches
    cli.enable_compilation_cache()
    from instructax import experiment
    from instructax.runtime import distributed

    config = CONFIG.value.to_dict()
    if DRY_RUN.value:
        return cli.guarded(
            lambda: print(
                experiment.config_lines(config), experiment.dry_run(config), sep="\n"
            )
        )

    def run() -> None:
        if COORDINATOR.value or PROCESSES.value is not None or PROCESS.value is not None:
            distributed.join_processes(
                COORDINATOR.value or "", PROCESSES.value, PROCESS.value
            )
        experiment.run_stage(config, pathlib.Path(WORKDIR.value or "."))

    return distributed.exit_on_failure(lambda: cli.guarded(run))


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: cli.parse_config(argv, CONFIG))
