#!/usr/bin/env python3
"""Samples from a finished policy.

python scripts/sample.py --workdir runs/micro/ppo-ptx

Reads one prompt per line from the terminal or standard input; `\\n` in a line is a line
break. With --chat all lines belong to one conversation, and the line /new starts a new one.
With --input and --output the script completes a JSONL file whose lines have `prompt` or
`messages`. The exit codes are those of train.py.
"""

import io
import pathlib
import sys
from collections.abc import Iterator

from absl import app, flags, logging

from instructax import cli

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "A finished run of pretraining, SFT or PPO: WORKDIR, WORKDIR@STEP or WORKDIR@best.",
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 32, "The most tokens of a completion.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "The sampling temperature; 0 is greedy.", lower_bound=0.0
)
SEED = flags.DEFINE_integer(
    "seed", 0, "The random seed.", lower_bound=0, upper_bound=2**31 - 1
)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "The number of completions of each prompt.", lower_bound=1
)
STOP = flags.DEFINE_multi_string(
    "stop", [], "A string that ends a completion, \\n for a line break; may be repeated."
)
CHAT = flags.DEFINE_bool("chat", False, "The lines are one conversation.")
SYSTEM = flags.DEFINE_string("system", "", "With --chat: the system message.")
INPUT = flags.DEFINE_string("input", None, "The JSONL file to complete.")
OUTPUT = flags.DEFINE_string(
    "output", None, "With --input: the JSONL file to write; it must not exist yet."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "With --input: completions sampled at a time.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "The dtype of the computation."
)


def main(argv: list[str]) -> int:
    """Parses the flags, samples, and returns the exit code."""
    if mistake := find_mistake(argv):
        print(f"error: {mistake}", file=sys.stderr)
        return cli.USER_ERROR
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    return cli.guarded(sample)


def sample() -> None:
    """Completes a file, holds a conversation, or completes the lines of standard input."""
    from instructax.serving import chat

    stop_strings = [stop.replace("\\n", "\n") for stop in STOP.value]
    sampling = chat.SamplingParams(
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
        num_samples=NUM_SAMPLES.value,
        stop_strings=tuple(stop_strings),
    )
    workdir = str(WORKDIR.value)
    dtype = DTYPE.value
    if INPUT.value:
        chat.complete_file(
            workdir,
            pathlib.Path(INPUT.value),
            pathlib.Path(str(OUTPUT.value)),
            sampling,
            dtype=dtype,
            batch_size=BATCH_SIZE.value,
        )
    elif CHAT.value:
        chat.run_chat(workdir, read_lines(), sampling, dtype=dtype, system=SYSTEM.value)
    else:
        chat.print_completions(workdir, read_lines(), sampling, dtype=dtype)


def find_mistake(argv: list[str]) -> str:
    """Returns what is wrong with the arguments, or ""."""
    if len(argv) > 1 or not WORKDIR.value:
        return "give --workdir=FOLDER of a finished run"
    if bool(INPUT.value) != bool(OUTPUT.value):
        return "give --input and --output together"
    if CHAT.value and INPUT.value:
        return "--chat cannot be combined with --input, whose lines may have messages"
    if CHAT.value and NUM_SAMPLES.value > 1:
        return "--chat cannot be combined with --num_samples"
    if SYSTEM.value and not CHAT.value:
        return "--system requires --chat"
    if "" in STOP.value:
        return "--stop must not be empty"
    return ""


def read_lines() -> Iterator[str]:
    """Yields the lines of standard input, with a prompt sign on a terminal."""
    # Bytes that are not UTF-8 become replacement characters.
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    while True:
        if lines.isatty():
            print("> ", end="", flush=True)
        line = lines.readline()
        if not line:
            return
        yield line.rstrip("\n").replace("\\n", "\n")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
