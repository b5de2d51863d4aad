#!/usr/bin/env python3
"""Talks to a finished policy: python scripts/sample.py --workdir runs/micro/ppo-ptx

One prompt a line, from the terminal or standard input; `\\n` in a line is a line break. Exit codes are train.py's.
"""

import io
import pathlib
import sys

from absl import app, flags, logging

from instructax import command

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string("workdir", None, "a finished run of pretraining, SFT or PPO, or WORKDIR@STEP of one")
LENGTH = flags.DEFINE_integer("length", 32, "the most tokens of an answer", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 = the likeliest token", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "another seed, other answers", lower_bound=0)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "mixed", "bfloat16"], "of the computation")


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1 or not WORKDIR.value:
        print("error: give --workdir=FOLDER of a finished run", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    command.keep_compiled()
    command.use_large_pages()
    from instructax import chat

    # Bytes that are not UTF-8 become a mark, not a traceback.
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    prompts = (line.rstrip("\n").replace("\\n", "\n") for line in prompted(lines))
    return command.guarded(
        lambda: chat.talk(
            WORKDIR.value or ".",
            prompts,
            length=LENGTH.value,
            temperature=TEMPERATURE.value,
            seed=SEED.value,
            dtype=DTYPE.value,
        )
    )


def prompted(lines):
    """The lines of `lines`, asked for with a mark where a person types them."""
    while True:
        if lines.isatty():
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        yield line


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
