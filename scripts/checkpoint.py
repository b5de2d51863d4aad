#!/usr/bin/env python3
"""Lists, verifies or exports the checkpoints of a run.

python scripts/checkpoint.py ls runs/micro/ppo-ptx
python scripts/checkpoint.py verify runs/micro/ppo-ptx [--step=40]
python scripts/checkpoint.py to-numpy runs/micro/ppo-ptx --to=params.npz

ls prints one line per saved step. verify compares the size and sha256 of every file with
the recorded ones, lists damaged, missing and unlisted files, and exits with 2 if there are
any. to-numpy writes arrays to a .npz or .safetensors file, under their names in the
parameter tree. The other exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli
from instructax.runtime.redaction import printable

STEP = flags.DEFINE_integer(
    "step",
    None,
    "verify: check only this step. to-numpy: write this step instead of the newest.",
    lower_bound=0,
)
TO = flags.DEFINE_string("to", None, "to-numpy: the file to write; it must not exist yet.")
LEAVES = flags.DEFINE_enum(
    "leaves",
    "exported",
    ["exported", "trained", "all"],
    "to-numpy: the parameters that later stages read (for PPO the averaged policy), the "
    "policy before averaging, or the whole state.",
)

# The first argument.
COMMANDS = ("ls", "verify", "to-numpy")


def main(argv: list[str]) -> int:
    """Parses the command line, runs the command, and returns the exit code."""
    command = argv[1] if len(argv) == 3 else ""
    if command not in COMMANDS or (command == "to-numpy") != bool(TO.value):
        print(
            "error: give ls WORKDIR, verify WORKDIR, or to-numpy WORKDIR --to=FILE",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(argv[2])
    problems: list[str] = []

    def run() -> None:
        # Imported here, so that --help answers without JAX.
        from instructax.checkpoints import inspection

        if command == "ls":
            lines = inspection.list_checkpoints(workdir)
        elif command == "verify":
            intact, wrong = inspection.verify_checkpoints(workdir, STEP.value)
            problems.extend(wrong)
            lines = [*intact, *wrong]
        else:
            to = pathlib.Path(str(TO.value))
            lines = [inspection.write_arrays(workdir, STEP.value, to, LEAVES.value)]
        for line in lines:
            print(printable(line))

    # What the command found must be visible in its exit code.
    code = cli.guarded(run)
    if code == cli.SUCCESS and problems:
        return cli.USER_ERROR
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
