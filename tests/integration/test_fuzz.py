"""Any input is accepted or refused in one line: no other exception, no hang, no excessive
memory.

The normal suite runs a few hundred cases. `./scripts/test.sh fuzz` runs more than 100,000
and prints its progress.
"""

import contextlib
import gzip
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from instructax import cli
from instructax.checkpoints.manifest import read_manifest
from instructax.config import ConfigError
from instructax.data import filters
from instructax.data.schema import (
    Comparison,
    DataError,
    Demonstration,
    Prompt,
    Text,
    read_jsonl,
)
from instructax.data.tokenizer import END_OF_TEXT, load_tokenizer, save_tokenizer, train_bpe
from instructax.experiment import RunSpec, load_config
from instructax.runtime.files import rewind
from instructax.stages import MODULES, build_config, load_stage
from instructax.stages import memory as estimate

CASES = {"quick": 40, "fuzz": 14_000}  # cases per property; change the number only here
SHARES = {"command_lines": 0.1}  # fraction of those cases; each one runs a config file
SECONDS = 20.0  # time limit of a case
BYTES = 512 * 2**20  # allowed growth of the process's peak memory per property
LINE = 600  # longest error message, not counting its path

ROOT = Path(__file__).resolve().parents[2]
PATH = Path()  # the file that a case writes, to be read
PROPERTIES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {}


def for_all(*strategies: Any) -> Callable[[Any], Any]:
    """Registers a property that must hold for every value of `strategies`."""

    def register(holds: Callable[..., None]) -> Callable[..., None]:
        PROPERTIES[holds.__name__] = holds, strategies
        return holds

    return register


@pytest.fixture(scope="module", autouse=True)
def path(tmp_path_factory):
    """A file for this module."""
    global PATH
    PATH = tmp_path_factory.mktemp("fuzz") / "case"


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError if the block takes longer."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def result_or_refusal(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """The result of `call`, or None if it refuses in one line with an error of exactly this
    kind. Other errors pass through."""
    with within(SECONDS):
        try:
            return call()
        except kind as error:
            assert type(error) is kind and "\n" not in str(error), repr(error)
            assert len(str(error)) < LINE, str(error)
            return None


# JSON lines.

RECORDS: dict[Any, dict[str, Any]] = {
    Text: {"id": "t", "text": "x"},
    Demonstration: {
        "id": "d",
        "prompt": "p",
        "format": "plain",
        "completion": "c",
        "labeler": "l",
    },
    Comparison: {
        "id": "c",
        "prompt": "p",
        "completions": ["a", "b", "c"],
        "ranks": [2, 1, 1],
        "pairs": [[0, 1, -1]],
    },
    Prompt: {
        "id": "p",
        "prompt": "p",
        "format": "dialog",
        "user": "u",
        "kind": None,
        "meta": {},
    },
}
TEXTS = st.text(st.characters(codec=None), max_size=40)  # lone surrogates too
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from(
        [
            0,
            1,
            -1,
            2**31,
            2**63,
            -(2**31),
            10**400,
            -(10**4000),
            1e308,
            1e-45,
            5e-324,
            True,
            False,
        ]
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def dump(value: Any) -> bytes:
    with contextlib.suppress(ValueError):  # integers of thousands of digits
        return json.dumps(value).encode()
    return b"1" * 5000


@st.composite
def lines(draw: Any) -> tuple[Any, bytes]:
    """(kind of record, bytes that are nearly a valid file of such records)."""
    cls = draw(st.sampled_from(list(RECORDS)))
    parts = []
    for number in range(draw(st.integers(1, 3))):
        record = RECORDS[cls] | {"id": str(number)}
        if draw(st.booleans()):
            record |= draw(
                st.dictionaries(
                    st.sampled_from([*record, "meta", "extra", ""]), JSON, max_size=2
                )
            )
        line = dump(record)
        if draw(st.booleans()):
            place = draw(st.integers(0, len(line)))
            line = (
                line[:place]
                + draw(st.binary(max_size=6))
                + line[place + draw(st.integers(0, 3)) :]
            )
        parts.append(line)
    content = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r", b""])).join(parts)
    return cls, draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\0"])) + content


@for_all(lines())
def json_lines(given_: tuple[Any, bytes]) -> None:
    cls, content = given_
    PATH.write_bytes(content)
    for record in result_or_refusal(DataError, lambda: list(read_jsonl([PATH], cls))) or ():
        assert all(text.strip() and text.encode() for text in filters.record_texts(record))


@for_all(lines(), st.integers(0, 200), st.integers(0, 255), st.integers(-40, 0))
def damaged_gzip(given_: tuple[Any, bytes], place: int, byte: int, cut: int) -> None:
    cls, content = given_
    packed = bytearray(gzip.compress(content, mtime=0))
    packed[place % len(packed)] = byte
    path = PATH.with_suffix(".gz")
    path.write_bytes(packed[: cut or None])
    result_or_refusal(DataError, lambda: list(read_jsonl([path], cls)))


@for_all(st.binary(max_size=300))
def any_bytes(content: bytes) -> None:
    PATH.write_bytes(content)
    for cls in RECORDS:
        result_or_refusal(DataError, lambda cls=cls: list(read_jsonl([PATH], cls)))
    rewind(PATH, 3)
    for line in PATH.read_text().split("\n")[:-1]:
        assert float(json.loads(line)["step"]) <= 3


COMPLETIONS = st.one_of(
    st.lists(st.sampled_from(["a", "bb", "ccc", "a"]), min_size=2, max_size=3),
    st.lists(JSON),
    JSON,
)
RANKS = st.one_of(
    st.lists(st.integers(1, 3), min_size=2, max_size=3),
    st.none(),
    st.lists(st.integers(-1, 5), max_size=5),
    st.lists(JSON, max_size=4),
    JSON,
)
PAIRS = st.one_of(
    st.none(),
    st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=4),
    st.lists(JSON, max_size=3),
    JSON,
)


@for_all(COMPLETIONS, RANKS, PAIRS)
def rankings(completions: Any, ranks: Any, pairs: Any) -> None:
    record = {
        "id": "c",
        "prompt": "p",
        "completions": completions,
        "ranks": ranks,
        "pairs": pairs,
    }
    PATH.write_bytes(dump(record))
    found = result_or_refusal(DataError, lambda: list(read_jsonl([PATH], Comparison)))
    if not found:
        return
    (comparison,) = found
    count = len(comparison.completions)
    assert count >= 2 and list(comparison.completions) == completions
    for i, j, w in comparison.pairs:
        assert i != j and {i, j} <= set(range(count)) and w in (-1, 0, 1)
    ranked = filters.drop_unranked(found)
    assert len(ranked) == (ranks is not None)
    for kept in filters.drop_tied(filters.drop_long_completions(ranked, 2, len)):
        assert (
            2 <= len(kept.completions) == len(kept.ranks)
            and max(map(len, kept.completions)) <= 2
        )
        dense = filters.dense_ranks(kept.ranks)
        assert sorted(set(dense)) == list(range(len(set(kept.ranks))))
        order = [(a < b) for a in dense for b in dense]
        assert order == [(a < b) for a in kept.ranks for b in kept.ranks]


# Configs.

CONFIGS = tuple(MODULES)
VALUES = st.one_of(
    JSON,
    st.binary(max_size=8),
    st.builds(np.int64, st.integers(-(2**62), 2**62)),
    st.builds(np.float32, st.floats(width=32)),
    st.just(()),
    st.just({}),
    st.just(object),
)


def tiny_config(name: str) -> dict[str, Any]:
    return load_config(RunSpec(name, str(ROOT / "configs" / f"{name}.py:tiny"), {}))


def names_of(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every value and group of a config."""
    found = []
    for name, value in config.items():
        found.append((*prefix, name))
        found += names_of(value, (*prefix, name)) if isinstance(value, dict) else []
    return found


BASES: dict[str, dict[str, Any]] = {}


@st.composite
def changed_configs(draw: Any) -> dict[str, Any]:
    """A stage's config with a few values replaced, missing or added."""
    name = draw(st.sampled_from(CONFIGS))
    base = BASES.setdefault(name, tiny_config(name))
    config = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(names_of(base)))
        group: Any = config
        for part in path[:-1]:
            group = group.get(part) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            continue
        change = draw(st.sampled_from(["set", "set", "set", "delete", "add"]))
        if change == "delete":
            group.pop(path[-1], None)
        else:
            group[path[-1] if change == "set" else draw(TEXTS)] = draw(VALUES)
    return config


def numbers_of(value: Any) -> Iterator[float]:
    """All numbers in a built config."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from numbers_of(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from numbers_of(getattr(value, name))


@for_all(changed_configs())
def config_values(config: dict[str, Any]) -> None:
    def build() -> Any:
        built = build_config(config)
        mesh = estimate.abstract_mesh(built.mesh) if hasattr(built, "mesh") else None
        load_stage(built.stage).validate(built, mesh)
        return built

    built = result_or_refusal(ConfigError, build)
    if built is not None:
        assert all(
            math.isfinite(number) and abs(number) < 2.0**128 for number in numbers_of(built)
        )
        assert all(
            abs(number) < 2**31 for number in numbers_of(built) if isinstance(number, int)
        )


ARGUMENTS = st.one_of(
    TEXTS,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "nan",
            "inf",
            "-1",
            "1e400",
            "9" * 5000,
            "None",
            "True",
            "()",
            "('a',",
            "(1, 'b')",
            "[[]]",
            "{}",
        ]
    ),
)


@for_all(st.sampled_from(CONFIGS), st.data(), ARGUMENTS)
def command_lines(name: str, data: Any, text: str) -> None:
    """An override as typed: the config builds or is refused, or the exit code is 2 with one
    line."""
    assume("\0" not in text and text.isprintable())
    base = BASES.setdefault(name, tiny_config(name))
    path = ".".join(data.draw(st.sampled_from(names_of(base))))
    values = flags.FlagValues()
    arguments = [
        "train.py",
        f"--config={ROOT / 'configs' / name}.py:tiny",
        f"--config.{path}={text}",
    ]
    with (
        mock.patch.object(flags, "FLAGS", values),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.object(sys, "stderr") as stderr,
        within(SECONDS),
    ):
        holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
        try:
            cli.parse_config(arguments, holder)
        except SystemExit as end:
            assert end.code == 2
            written = "".join(call.args[0] for call in stderr.write.call_args_list)
            assert written.startswith("error: ") and written.count("\n") == 1, written
            return
    config: Any = holder.value.to_dict()
    result_or_refusal(ConfigError, lambda: build_config(config))


@for_all(JSON)
def manifests(content: Any) -> None:
    folder = PATH.with_suffix(".run")
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(dump(content))
    result_or_refusal(ConfigError, lambda: read_manifest(folder))


# Tokenizers.

SPECIAL = st.sampled_from(
    [
        END_OF_TEXT,
        "</s>",
        "<|im_end|>",
        "<|im_start|>",
        "<|",
        "endoftext",
        "\ufdd0",
        "\U0010ffff",
    ]
)
SPOKEN = st.lists(TEXTS | SPECIAL | st.text(max_size=30), max_size=5).map("".join)
TOKENIZERS = [
    load_tokenizer("bytes"),
    train_bpe(["the quick brown fox", "ééé 中文 <|endoftext|>"] * 9, 300),
]


@for_all(SPOKEN, st.lists(st.integers(-1, 300), max_size=12))
def tokens(text: str, ids: list[int]) -> None:
    for tokenizer in TOKENIZERS:
        valid = not any(0xD800 <= ord(char) < 0xE000 for char in text)
        encoded = result_or_refusal(ValueError, lambda t=tokenizer: t.encode(text))
        assert (encoded is not None) == valid
        if encoded is not None:
            assert tokenizer.eos_id not in encoded and tokenizer.decode(encoded) == text
            assert len(encoded) <= len(text.encode())
        decoded = result_or_refusal(ValueError, lambda t=tokenizer: t.decode(ids))
        assert (decoded is not None) == all(0 <= index < tokenizer.size for index in ids)


@for_all(st.data())
def tokenizer_files(data: Any) -> None:
    """A tokenizer.json in which something is changed."""
    content = json.loads(TOKENIZERS[1].content)
    for _ in range(data.draw(st.integers(1, 2))):
        group: Any = content if data.draw(st.booleans()) else content["model"]
        if isinstance(group, dict):
            group[data.draw(st.sampled_from([*group, "x"]))] = data.draw(JSON | st.just({}))
        if not isinstance(content.get("model"), dict):
            break
    path = PATH.with_suffix(".json")
    path.write_bytes(dump(content))
    made = result_or_refusal(ConfigError, lambda: load_tokenizer(str(path)))
    if made is not None:
        save_tokenizer(made, str(path))
        assert load_tokenizer(str(path)).hash == made.hash


@pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning"
)  # ml_collections reads a config this way
@pytest.mark.parametrize("profile", ["quick", pytest.param("fuzz", marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("name", PROPERTIES)
def test_it_is_taken_or_refused_in_one_line(name, profile, capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    since = time.monotonic()
    cases = round(CASES[profile] * SHARES.get(name, 1.0))
    checks = settings(
        max_examples=cases,
        derandomize=profile == "quick",
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    holds, strategies = PROPERTIES[name]
    checks(given(*strategies)(holds))()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < BYTES
    if profile == "fuzz":
        with capsys.disabled():
            seconds = time.monotonic() - since
            print(
                f"\n{name}: {cases} cases, {seconds:.0f} s, {grown / 2**20:.0f} MiB more",
                flush=True,
            )
