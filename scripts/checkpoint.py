#!/usr/bin/env python3
"""Looks at checkpoints: python scripts/checkpoint.py ls|verify|to-numpy runs/micro/ppo-ptx

ls: a line for each saved step. verify: every file against its size and sha256; a damaged,
missing or additional one is named, and the exit code is 2. to-numpy --to=params.npz (or
.safetensors): the parameters under their names in the tree. Other exit codes are those of
train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli
from instructax.runtime.redaction import printable

STEP = flags.DEFINE_integer(
    "step",
    None,
    "verify: this step alone; to-numpy: this one, not the newest",
    lower_bound=0,
)
TO = flags.DEFINE_string(
    "to", None, "to-numpy: the file to write, which must not be there yet"
)
LEAVES = flags.DEFINE_enum(
    "leaves",
    "exported",
    ["exported", "trained", "all"],
    "to-numpy: what later stages read (of PPO the averaged policy), the policy before averaging, or the whole state",
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if (
        len(argv) != 3
        or argv[1] not in ("ls", "verify", "to-numpy")
        or (argv[1] == "to-numpy") != bool(TO.value)
    ):
        print(
            "error: give ls WORKDIR, verify WORKDIR, or to-numpy WORKDIR --to=FILE",
            file=sys.stderr,
        )
        return 2
    logging.set_verbosity(logging.WARNING)
    task, workdir, wrong = argv[1], pathlib.Path(argv[2]), []

    def run() -> None:
        from instructax.checkpoints import inspection

        if task == "ls":
            print("\n".join(map(printable, inspection.list_checkpoints(workdir))))
        elif task == "verify":
            good, bad = inspection.verify_checkpoints(workdir, STEP.value)
            wrong.extend(bad)
            print("\n".join(map(printable, [*good, *bad])))
        else:
            print(
                inspection.write_arrays(
                    workdir, STEP.value, pathlib.Path(str(TO.value)), LEAVES.value
                )
            )

    return cli.guarded(run) or (2 if wrong else 0)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
