#!/usr/bin/env python3
"""Serves a finished policy with OpenAI's protocol: python scripts/serve.py --workdir
runs/micro/ppo-ptx

http://127.0.0.1:8000/v1 then answers /models, /completions and /chat/completions. Exit
codes are train.py's: 130 after Ctrl-C.
"""

import pathlib
import sys

from absl import app, flags, logging

from instructax import cli
from instructax.config import ConfigError

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string(
    "workdir", None, "a finished run of pretraining, SFT or PPO, or WORKDIR@STEP of one"
)
NAME = flags.DEFINE_string(
    "name", "", "what clients call the model; by default the name of the folder"
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "where to listen; anybody who can reach it may ask"
)
PORT = flags.DEFINE_integer(
    "port", 8000, "0 = any that is free", lower_bound=0, upper_bound=65535
)
ROWS = flags.DEFINE_integer("rows", 8, "answers that are drawn at a time", lower_bound=1)
QUEUE = flags.DEFINE_integer(
    "queue", 256, "answers that may wait; more are refused (429)", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "of the computation"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER of a finished run", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    workdir = WORKDIR.value
    return cli.guarded(lambda: serve(workdir))


def serve(workdir: str) -> None:
    """Until Ctrl-C."""
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
