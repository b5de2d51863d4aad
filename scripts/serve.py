#!/usr/bin/env python3
"""Serves a finished policy with the OpenAI protocol.

python scripts/serve.py --workdir runs/micro/ppo-ptx

http://127.0.0.1:8000/v1 then answers /models, /completions and /chat/completions. Ctrl-C
stops the server with code 130; the other exit codes are those of train.py.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A finished run of pretraining, SFT or PPO: WORKDIR or WORKDIR@STEP."
)
NAME = flags.DEFINE_string(
    "name", "", "The model name that clients use; by default the name of the folder."
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on; everybody who can reach it may ask."
)
PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535
)
ROWS = flags.DEFINE_integer(
    "rows", 8, "Number of answers that are sampled at a time.", lower_bound=1
)
QUEUE = flags.DEFINE_integer(
    "queue", 256, "Number of answers that may wait; more get status 429.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)


def main(argv: list[str]) -> int:
    """Parses the flags, serves until Ctrl-C, and returns the exit code."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER of a finished run", file=sys.stderr)
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    workdir = WORKDIR.value
    return cli.guarded(lambda: run_server(workdir))


def run_server(workdir: str) -> None:
    """Serves the policy in `workdir` until Ctrl-C."""
    # The server needs Starlette and uvicorn, optional dependencies.
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
        rows=ROWS.value,
        queue_limit=QUEUE.value,
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
