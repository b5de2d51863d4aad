#!/usr/bin/env python3
"""Imports a pretrained model as a run that later stages start from.

python scripts/import_hf.py --source gpt2 --workdir runs/gpt2/pretrain

The source is a folder of Hugging Face files, a .gguf file, or a name on the Hugging Face
hub. Later stages start from the import as from a run of pretraining; their size is the
name of its folder, as in configs/sft.py:gpt2. The exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

SOURCE = flags.DEFINE_string(
    "source", None, "A folder, a .gguf file, or a name on the Hugging Face hub."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; configs find runs/NAME/pretrain by NAME."
)
FSDP = flags.DEFINE_integer(
    "fsdp", 1, "Devices along the fsdp axis while converting.", lower_bound=1
)
TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices along the tensor axis while converting.", lower_bound=1
)


def main(argv: list[str]) -> int:
    """Parses the flags, imports the model, and returns the exit code."""
    if len(argv) > 1 or not SOURCE.value or not WORKDIR.value:
        print(
            "error: give --source=FOLDER, FILE.gguf or NAME, and --workdir=FOLDER",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    source = SOURCE.value
    workdir = pathlib.Path(WORKDIR.value)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it touches

    def run() -> None:
        # Imported here, so that --help answers without JAX.
        from instructax.stages import pretrained

        message = pretrained.import_model(
            source, workdir, fsdp=FSDP.value, tensor=TENSOR.value
        )
        print(message)

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
