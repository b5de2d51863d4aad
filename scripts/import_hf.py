#!/usr/bin/env python3
"""Puts a pretrained model into a run: python scripts/import_hf.py --source gpt2 --workdir
runs/gpt2/pretrain

The source is a folder of Hugging Face files, a .gguf file, or a name on the Hugging Face
hub. Stages then start from it as from a run of pretraining: configs/sft.py:gpt2 and so on.
Exit codes as those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

SOURCE = flags.DEFINE_string(
    "source", None, "folder, .gguf file, or name on the Hugging Face hub"
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; stages find runs/NAME/pretrain by NAME"
)
FSDP = flags.DEFINE_integer(
    "fsdp", 1, "devices that share the parameters on the way", lower_bound=1
)
TENSOR = flags.DEFINE_integer("tensor", 1, "the same of the tensor axis", lower_bound=1)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not SOURCE.value or not WORKDIR.value:
        print(
            "error: give --source=FOLDER, FILE.gguf or NAME, and --workdir=FOLDER",
            file=sys.stderr,
        )
        return 2
    source, workdir = SOURCE.value, pathlib.Path(WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # orbax reports each file it touches

    def run() -> None:
        from instructax.stages import pretrained as interchange

        print(
            interchange.import_model(source, workdir, fsdp=FSDP.value, tensor=TENSOR.value)
        )

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
