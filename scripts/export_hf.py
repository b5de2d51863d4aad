#!/usr/bin/env python3
"""Exports a run to a folder that Hugging Face transformers can load.

python scripts/export_hf.py --checkpoint runs/micro/ppo-ptx --to exported --verify

A policy becomes an AutoModelForCausalLM, a reward model an
AutoModelForSequenceClassification. The exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A finished run: WORKDIR, WORKDIR@STEP or WORKDIR@best."
)
TO = flags.DEFINE_string("to", None, "Folder to write; it must be new or empty.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "The dtype of the written tensors."
)
VERIFY = flags.DEFINE_bool(
    "verify", False, "Load the written folder again and compare its logits or scores."
)


def main(argv: list[str]) -> int:
    """Parses the flags, exports, and returns the exit code."""
    if len(argv) > 1 or not CHECKPOINT.value or not TO.value:
        print("error: give --checkpoint=WORKDIR and --to=FOLDER", file=sys.stderr)
        return cli.USER_ERROR
    checkpoint = CHECKPOINT.value
    to = pathlib.Path(TO.value)
    logging.set_verbosity(logging.WARNING)

    def run() -> None:
        # Imported here, so that --help answers without JAX.
        from instructax.stages import pretrained

        print(pretrained.export_run(checkpoint, to, dtype=DTYPE.value, verify=VERIFY.value))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
