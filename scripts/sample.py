#!/usr/bin/env python3
"""Talks to a finished policy: python scripts/sample.py --workdir runs/micro/ppo-ptx

One prompt a line, from the terminal or standard input; `\\n` in a line is a line break.
With --chat the lines are one conversation, which /new begins anew. With --input and
--output a file of JSON lines is answered, each with a `prompt` or with `messages`. Exit
codes are train.py's.
"""

import io
import pathlib
import sys

from absl import app, flags, logging

from instructax import cli

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

WORKDIR = flags.DEFINE_string(
    "workdir", None, "a finished run of pretraining, SFT or PPO, or WORKDIR@STEP of one"
)
LENGTH = flags.DEFINE_integer("length", 32, "the most tokens of an answer", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "0 = the likeliest token", lower_bound=0.0
)
SEED = flags.DEFINE_integer(
    "seed", 0, "another seed, other answers", lower_bound=0, upper_bound=2**31 - 1
)
SAMPLES = flags.DEFINE_integer("samples", 1, "answers to each prompt", lower_bound=1)
STOP = flags.DEFINE_multi_string(
    "stop", [], "a text that ends an answer, \\n in it a line break; may be given again"
)
CHAT = flags.DEFINE_bool("chat", False, "the lines are what you say in one conversation")
SYSTEM = flags.DEFINE_string("system", "", "with --chat: what the conversation opens with")
INPUT = flags.DEFINE_string(
    "input", None, "a file of JSON lines to answer, instead of what is typed"
)
OUTPUT = flags.DEFINE_string(
    "output", None, "with --input: the file to write, which must not be there yet"
)
ROWS = flags.DEFINE_integer(
    "rows", 8, "with --input: answers that are drawn at a time", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bf16_matmul", "bf16"], "of the computation"
)


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if mistake := wrong(argv):
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.WARNING)
    cli.enable_compilation_cache()
    from instructax.serving import chat

    asking = chat.SamplingParams(
        length=LENGTH.value,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
        samples=SAMPLES.value,
        stops=tuple(stop.replace("\\n", "\n") for stop in STOP.value),
    )
    workdir, dtype = str(WORKDIR.value), DTYPE.value
    if INPUT.value:
        source, target = pathlib.Path(INPUT.value), pathlib.Path(str(OUTPUT.value))
        return cli.guarded(
            lambda: chat.answer_file(
                workdir, source, target, asking, dtype=dtype, rows=ROWS.value
            )
        )
    # Bytes that are not UTF-8 become a mark, not a traceback.
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="replace")
    prompts = (line.rstrip("\n").replace("\\n", "\n") for line in prompted(lines))
    if CHAT.value:
        return cli.guarded(
            lambda: chat.converse(
                workdir, prompts, asking, dtype=dtype, system=SYSTEM.value
            )
        )
    return cli.guarded(lambda: chat.talk(workdir, prompts, asking, dtype=dtype))


def wrong(argv: list[str]) -> str:
    """What is wrong with the arguments; "" if nothing is."""
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
    app.run(main, flags_parser=cli.parse_flags)
