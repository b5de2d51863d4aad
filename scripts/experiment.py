#!/usr/bin/env python3
"""Runs a whole experiment: python scripts/experiment.py experiments/alignment.py:micro
--workdir runs/micro

Its runs in order, then its table and figure. The head of an experiment's file says which
sizes it takes: alignment.py takes tiny, micro, milli, centi and family, each with a seed
after a comma if you like. The same command again goes on where it stopped. Exit codes as
those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the experiment; each run gets a folder in it"
)
REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "draw the report of runs that are finished"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) != 2 or not WORKDIR.value:
        print(
            "error: give FILE:SIZE of one experiment and --workdir=FOLDER", file=sys.stderr
        )
        return 2
    logging.set_verbosity(logging.WARNING)  # orbax reports each file it touches
    cli.enable_compilation_cache()
    from instructax import experiment

    root = pathlib.Path(WORKDIR.value)
    return cli.guarded(
        lambda: experiment.run_experiment(argv[1], root, report_only=REPORT_ONLY.value)
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
