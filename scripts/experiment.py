#!/usr/bin/env python3
"""Runs a whole experiment: its runs in order, then its table and figures.

python scripts/experiment.py experiments/alignment.py:micro --workdir runs/micro

The docstring of an experiment describes its argument. alignment.py takes tiny, micro,
milli, centi or family, optionally followed by a seed: micro,1. The same command resumes an
experiment where it stopped. The exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

# Experiments and configs import each other from the root of the project.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the experiment; each run gets a folder in it."
)
REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "Only write the report on the runs that are finished."
)


def main(argv: list[str]) -> int:
    """Parses the flags, runs the experiment, and returns the exit code."""
    if len(argv) != 2 or not WORKDIR.value:
        print(
            "error: give FILE:SIZE of one experiment and --workdir=FOLDER", file=sys.stderr
        )
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it touches
    cli.enable_compilation_cache()
    # Imported here, so that --help answers without JAX.
    from instructax import experiment

    root = pathlib.Path(WORKDIR.value)
    return cli.guarded(
        lambda: experiment.run_experiment(argv[1], root, report_only=REPORT_ONLY.value)
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
