"""Trains a byte-level BPE tokenizer on text files.

python scripts/train_tokenizer.py --files books.jsonl.gz --files notes.txt --vocab_size 8192
--out tokenizer.json

A .txt file is one text; each line of a .jsonl file is an object with a text under --field;
both may end in .gz. Exits with 2 and one line on bad input.
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
    "vocab_size", None, "Size, 256 bytes and <|endoftext|> included.", required=True
)
OUT = flags.DEFINE_string("out", None, "Where to write tokenizer.json.", required=True)


def read_texts(path: str, field: str) -> Iterator[str]:
    """Yields the texts of one file."""
    kind = Path(path.removesuffix(".gz")).suffix
    if kind not in (".txt", ".jsonl"):
        raise ConfigError(
            f"--files={path}: must end in .txt or .jsonl, or one of these and .gz"
        )
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if kind == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                yield read_field(line, field, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"--files={path}: cannot be read ({error})") from error


def read_field(line: str, field: str, place: str) -> str:
    """Returns the text of one line of a .jsonl file."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(
            f"{place}: not a JSON object with a string under {field!r} (--field)"
        )
    return text


def main(argv: list[str]) -> int:
    """Flags in, one library call, exit code out."""
    if len(argv) > 1:
        print(
            f"error: unexpected argument {argv[1]}: repeat --files for each file",
            file=sys.stderr,
        )
        return 2
    return cli.guarded(train)


def train() -> None:
    """Trains on the files and writes the result."""
    if Path(OUT.value).is_dir():  # said before the training, not after it
        raise ConfigError(f"--out={OUT.value} is a folder: give the file to write")
    from instructax.data import tokenizer  # after the flags, so that --help answers at once

    texts = (text for path in FILES.value for text in read_texts(path, FIELD.value))
    trained = tokenizer.train_bpe(texts, VOCAB_SIZE.value)
    tokenizer.save_tokenizer(trained, OUT.value)
    print(f"{OUT.value}: {trained.size} tokens, hash {trained.hash}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
