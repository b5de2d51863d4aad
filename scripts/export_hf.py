#!/usr/bin/env python3
"""Writes a run for transformers: python scripts/export_hf.py --checkpoint
runs/micro/ppo-ptx --to exported --verify

A policy becomes an AutoModelForCausalLM, a reward model an
AutoModelForSequenceClassification. Exit codes as those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a finished run, WORKDIR, WORKDIR@STEP or WORKDIR@best"
)
TO = flags.DEFINE_string("to", None, "folder to write, new or empty")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the tensors written"
)
VERIFY = flags.DEFINE_bool(
    "verify", False, "read the folder again and compare logits or scores"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not CHECKPOINT.value or not TO.value:
        print("error: give --checkpoint=WORKDIR and --to=FOLDER", file=sys.stderr)
        return 2
    checkpoint, to = CHECKPOINT.value, pathlib.Path(TO.value)
    logging.set_verbosity(logging.WARNING)

    def run() -> None:
        from instructax.stages import pretrained

        print(pretrained.export_run(checkpoint, to, dtype=DTYPE.value, verify=VERIFY.value))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
