#!/usr/bin/env python3
"""Kills runs and compares how they end: python scripts/killtest.py --workdir runs/killtest --kills 20

Each stage of the tiny alignment experiment is killed (SIGKILL) at drawn places, resumed by the same command, and must
end to the bit as a run that nothing stopped. Prints a table, which is also in killtest.json. Exit codes: 1 if a run
ended otherwise, else those of train.py. To be started in the folder of the project.
"""

import pathlib
import signal
import sys

from absl import app, flags, logging

from instructax import command

WORKDIR = flags.DEFINE_string("workdir", None, "folder of all runs; what is finished in it is not run again")
STAGES = flags.DEFINE_list("stages", ["pretrain", "sft", "reward", "ppo", "ppo-ptx"], "which stages are killed")
KILLS = flags.DEFINE_integer("kills", 20, "of each stage, at least", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the places")


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER, and nothing but flags", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    train = [sys.executable, str(pathlib.Path(__file__).resolve().with_name("train.py"))]
    differing: list[int] = []

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run under way is ended too

    def run() -> None:
        from instructax import killtest

        root = pathlib.Path(str(WORKDIR.value))
        differing.append(killtest.run(root, train, names=STAGES.value, kills=KILLS.value, seed=SEED.value))

    return command.guarded(run) or int(differing[0] > 0)


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
