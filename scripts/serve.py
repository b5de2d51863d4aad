#!/usr/bin/env python3
"""Serves a finished policy with OpenAI's API.

python scripts/serve.py --workdir runs/micro/ppo-ptx

The endpoints are /models, /completions and /chat/completions at http://127.0.0.1:8000/v1.
The exit codes are those of train.py; 130 after Ctrl-C.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "A finished run of pretraining, SFT or PPO: WORKDIR, WORKDIR@STEP or WORKDIR@best.",
)
NAME = flags.DEFINE_string(
    "name", "", "The name of the model in requests; by default that of the folder."
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "The address to listen on; there is no authentication."
)
PORT = flags.DEFINE_integer(
    "port", 8000, "The port; 0 is any free one.", lower_bound=0, upper_bound=65535
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "The number of samples drawn at a time.", lower_bound=1
)
QUEUE_LIMIT = flags.DEFINE_integer(
    "queue_limit", 256, "Samples that may wait; more are refused (429).", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)


def main(argv: list[str]) -> int:
    """Parses the flags, serves, and returns the exit code."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER of a finished run", file=sys.stderr)
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    workdir = WORKDIR.value
    return cli.guarded(lambda: serve(workdir))


def serve(workdir: str) -> None:
    """Serves until Ctrl-C."""
    try:
        from instructax.serving.server.app import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'instructax[serve]'"
        ) from None
    serve(
        workdir,
        name=NAME.value or pathlib.Path(workdir).resolve().name,
        host=HOST.value,
        port=PORT.value,
        dtype=DTYPE.value,
        batch_size=BATCH_SIZE.value,
        queue_limit=QUEUE_LIMIT.value,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
