#!/usr/bin/env python3
"""Samples from a finished policy.

python scripts/sample.py --workdir runs/micro/ppo-ptx

Reads one prompt per line, from the terminal or standard input; `\\n` in a line is a line
break. With --chat the lines are one conversation, and /new starts another. With --input and
--output it answers a file of JSON lines, each with a `prompt` or with `messages`. The exit
codes are those of train.py.
"""

import io
import pathlib
import sys
from collections.abc import Iterator

from absl import app, flags, logging

from instructax import cli

WORKDIR = flags.DEFINE_string(
    "workdir", None, "A finished run of pretraining, SFT or PPO: WORKDIR or WORKDIR@STEP."
)
LENGTH = flags.DEFINE_integer(
    "length", 32, "The largest number of tokens in an answer.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Sampling temperature; 0 is greedy.", lower_bound=0.0
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**31 - 1
)
SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Number of answers to each prompt.", lower_bound=1
)
STOP = flags.DEFINE_multi_string(
    "stop", [], "A text that ends an answer, with \\n for a line break; repeat for more."
)
CHAT = flags.DEFINE_bool("chat", False, "Treat the lines as turns of one conversation.")
SYSTEM = flags.DEFINE_string("system", "", "The system message, with --chat.")
INPUT = flags.DEFINE_string(
    "input", None, "A file of JSON lines to answer, instead of typed prompts."
)
OUTPUT = flags.DEFINE_string(
    "output", None, "The file to write, with --input; it must not exist yet."
)
ROWS = flags.DEFINE_integer(
    "rows", 8, "Number of answers that are sampled at a time, with --input.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)


def main(argv: list[str]) -> int:
    """Parses the flags, samples, and returns the exit code."""
    if mistake := flag_mistake(argv):
        print(f"error: {mistake}", file=sys.stderr)
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    return cli.guarded(run)


def flag_mistake(argv: list[str]) -> str:
    """What is wrong with the combination of arguments; "" if nothing is."""
    if len(argv) > 1 or not WORKDIR.value:
        return "give --workdir=FOLDER of a finished run"
    if bool(INPUT.value) != bool(OUTPUT.value):
        return "give --input and --output together"
    if CHAT.value and (INPUT.value or SAMPLES.value > 1):
        return (
            "--chat goes with neither --input (whose lines may have messages) nor --samples"
        )
    if SYSTEM.value and not CHAT.value:
        return "--system goes with --chat"
    if "" in STOP.value:
        return "--stop must not be empty"
    return ""


def run() -> None:
    """Answers the input file, or the lines of standard input."""
    # Imported here, so that --help answers without JAX.
    from instructax.serving import chat

    params = chat.SamplingParams(
        length=LENGTH.value,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
        samples=SAMPLES.value,
        stops=tuple(stop.replace("\\n", "\n") for stop in STOP.value),
    )
    workdir = str(WORKDIR.value)
    dtype = DTYPE.value
    if INPUT.value:
        source = pathlib.Path(INPUT.value)
        target = pathlib.Path(str(OUTPUT.value))
        chat.answer_file(workdir, source, target, params, dtype=dtype, rows=ROWS.value)
    elif CHAT.value:
        chat.converse(workdir, read_prompts(), params, dtype=dtype, system=SYSTEM.value)
    else:
        chat.talk(workdir, read_prompts(), params, dtype=dtype)


def read_prompts() -> Iterator[str]:
    """Yields the prompts typed or piped to standard input."""
    # Invalid UTF-8 becomes a replacement character instead of an error.
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    while True:
        # A prompt mark for people, none for pipes.
        if lines.isatty():
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        yield line.rstrip("\n").replace("\\n", "\n")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
