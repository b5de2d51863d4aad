#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer on text files.

python scripts/train_tokenizer.py --files books.jsonl.gz --files notes.txt \\
    --vocab_size 8192 --out tokenizer.json

A .txt file is one text. Each line of a .jsonl file is an object with a text under --field.
Both may be compressed as .gz. The exit codes are those of train.py.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from instructax import cli
from instructax.config import ConfigError

FILES = flags.DEFINE_multi_string(
    "files", None, "A .txt or .jsonl file, or .gz of one; repeat for more.", required=True
)
FIELD = flags.DEFINE_string(
    "field", "text", "The key of the text in each line of a .jsonl file."
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    None,
    "Vocabulary size, including 256 bytes and <|endoftext|>.",
    required=True,
)
OUT = flags.DEFINE_string("out", None, "Where to write tokenizer.json.", required=True)


def main(argv: list[str]) -> int:
    """Parses the flags, trains, and returns the exit code."""
    if len(argv) > 1:
        print(
            f"error: unexpected argument {argv[1]}: repeat --files for each file",
            file=sys.stderr,
        )
        return cli.USER_ERROR
    return cli.guarded(train)


def train() -> None:
    """Trains on the files and writes the tokenizer."""
    if Path(OUT.value).is_dir():  # report it before training, not after
        raise ConfigError(f"--out={OUT.value} is a folder: give the file to write")
    # Imported late, so that --help answers at once.
    from instructax.data import tokenizer

    # A generator: the files may be larger than memory.
    texts = (text for path in FILES.value for text in read_texts(path, FIELD.value))
    trained = tokenizer.train_bpe(texts, VOCAB_SIZE.value)
    tokenizer.save_tokenizer(trained, OUT.value)
    print(f"{OUT.value}: {trained.size} tokens, hash {trained.hash}")


def read_texts(path: str, field: str) -> Iterator[str]:
    """Yields the texts of one file. Raises ConfigError if it cannot be read."""
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"--files={path}: must end in .txt or .jsonl, or one of these and .gz"
        )
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if suffix == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, start=1):
                yield read_field(line, field, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"--files={path}: cannot be read ({error})") from error


def read_field(line: str, field: str, place: str) -> str:
    """The text under `field` of a .jsonl line; `place` is for error messages."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(
            f"{place}: not a JSON object with a string under {field!r} (--field)"
        )
    return text


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
