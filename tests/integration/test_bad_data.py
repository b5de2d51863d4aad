"""Mistakes in data files, from file to prepared rows: refused in one line, or dropped and
counted."""

import dataclasses
import gzip
import json
import shutil
import tracemalloc
from functools import partial

import numpy as np
import pytest
from tests.support import stages
from tests.support.data_limits import LIMITS

from instructax import cli
from instructax.config import ConfigError
from instructax.data import prepare, schema
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.data.schema import DataError, Text, read_jsonl
from instructax.data.tokenizer import load_tokenizer
from instructax.experiment import run_stage

pytest_plugins = ("tests.support.pipeline_fixture",)

TOKENIZER = load_tokenizer("bytes")
PREPARE = {
    "text": prepare.prepare_text,
    "demonstrations": partial(prepare.prepare_demonstrations, prompt_format=PLAIN_FORMAT),
    "prompts": partial(prepare.prepare_prompts, prompt_format=PLAIN_FORMAT),
    "comparisons": partial(prepare.prepare_comparisons, prompt_format=PLAIN_FORMAT),
}
GOOD = {
    "text": {"text": "x"},
    "demonstrations": {"prompt": "p", "format": "plain", "completion": "c"},
    "prompts": {"prompt": "p", "format": "plain"},
    "comparisons": {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
}


def prepare_records(folder, kind, *changes, limits=LIMITS):
    """The prepared rows of one good record and one record for each of `changes`."""
    records = [
        {"id": str(i)} | GOOD[kind] | change for i, change in enumerate(({}, *changes))
    ]
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PREPARE[kind]([file], TOKENIZER, limits, folder)


WORDS = "word " * 20
DROPPED = [
    ("demonstrations", {"completion": "c" * 17}, "completion_tokens"),
    ("demonstrations", {"prompt": "q" * 25}, "prompt_tokens"),
    ("prompts", {"prompt": WORDS}, "prompt_tokens"),
    (
        "comparisons",
        {"completions": ["a", "b", "c", "d", "e"], "ranks": [1, 2, 3, 4, 5]},
        "completions",
    ),
    ("comparisons", {"completions": ["a", "b" * 99], "ranks": [1, 2]}, "response_tokens"),
    ("comparisons", {"completions": ["a", "b", "c"], "ranks": [2, 2, 2]}, "tied"),
    ("comparisons", {"completions": ["a", "b", "c" * 99], "ranks": [1, 1, 2]}, "tied"),
    (
        "comparisons",
        {"ranks": None, "completions": ["a", "b"], "pairs": [[0, 1, 1]]},
        "unranked",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    DROPPED,
    ids=[f"{k}-{r}-{i}" for i, (k, _, r) in enumerate(DROPPED)],
)
def test_what_does_not_fit_is_dropped_and_counted(tmp_path, kind, change, rule):
    report = prepare_records(tmp_path, kind, change).report
    assert {name: count for name, count in report.dropped.items() if count} == {rule: 1}
    assert (report.records, report.kept) == (2, {"train": 1})


def test_of_answers_that_are_left_out_one_pair_is_enough(tmp_path):
    """Of three answers the longest does not fit; the other two still form a pair."""
    source = prepare_records(
        tmp_path, "comparisons", {"completions": ["a", "b", "c" * 99], "ranks": [1, 3, 2]}
    ).sources["train"]
    row = source.__getitems__([1])[0]
    assert row["ranks"].tolist() == [0, 1] and row["lengths"].tolist() == [2, 2]


REFUSED = [
    (
        "comparisons",
        {"completions": ["a"], "ranks": [1]},
        "completions: a comparison needs at least 2 completions, not 1",
    ),
    ("comparisons", {"ranks": [1, 2, 3]}, "ranks: 3 ranks for 2 completions ([1, 2, 3])"),
    (
        "comparisons",
        {"ranks": [0, 1]},
        "ranks: must be null or a list of integers, 1 for the best ([0, 1])",
    ),
    (
        "comparisons",
        {"ranks": [8.5, 1]},
        "ranks: must be null or a list of integers, 1 for the best ([8.5, 1])",
    ),
    (
        "comparisons",
        {"pairs": [[0, 2, 1]]},
        "pairs: needs i and j in 0 .. 1, i != j, and w in -1, 0, 1 ([0, 2, 1])",
    ),
    (
        "comparisons",
        {"pairs": [[0, 1, -1]]},
        "pairs: contradicts ranks [1, 2] ([0, 1, -1])",
    ),
    ("prompts", {"prompt": ""}, "prompt: empty ('')"),
    ("prompts", {"prompt": " \n"}, "prompt: empty (' \\n')"),
    ("demonstrations", {"completion": ""}, "completion: empty ('')"),
    ("text", {"id": "0"}, "id: already used at "),
    (
        "text",
        {"txt": "x"},
        "txt: not a field of Text, which has id, text, source, meta ('x')",
    ),
    ("text", {"text": "a\ud800b"}, "text: lone surrogate at character 1 ('\\ud800')"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    REFUSED,
    ids=[f"{m[:30]}-{i}" for i, (_, _, m) in enumerate(REFUSED)],
)
def test_a_bad_line_ends_a_command_with_one_line_and_code_2(
    tmp_path, capsys, kind, change, message
):
    assert cli.guarded(lambda: prepare_records(tmp_path, kind, change)) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"error: {tmp_path / kind}.jsonl:2: {message}")
        and error.count("\n") == 1
    )
    # No partly prepared rows remain.
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.jsonl"]


@pytest.mark.parametrize("kind", PREPARE)
@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_record(tmp_path, kind, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"no {kind} in .*empty\.jsonl: the files have no records"
    ):
        PREPARE[kind]([tmp_path / "empty.jsonl"], TOKENIZER, LIMITS, tmp_path)


@pytest.mark.parametrize("kind", PREPARE)
def test_one_record_is_enough(tmp_path, kind):
    assert prepare_records(tmp_path, kind).report.rows == {"train": 1}


ODD = [
    "\0",
    "a\0b",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "مرحبا \u202bבעברית\u202c",
    "e\u0301\u0301",
    "\ufeffx",
    "\u2028\u2029x",
    "<|endoftext|>",
    "</s><pad>[INST]",
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_texts_come_through_as_they_are(tmp_path, text):
    """NUL, multi-part emoji, both writing directions, and the spelling of special tokens,
    which stays text."""
    limits = dataclasses.replace(LIMITS, prompt_tokens=64, response_tokens=64)
    source = prepare_records(
        tmp_path, "demonstrations", {"completion": text}, limits=limits
    ).sources["train"]
    tokens = np.concatenate(
        [row["tokens"] for row in source.__getitems__(range(len(source)))]
    )
    ends = np.flatnonzero(tokens == TOKENIZER.eos_id)
    assert len(ends) == 2 and text in TOKENIZER.decode(tokens)


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A hundred megabytes of text that gzip stores in a hundred kilobytes."""
    monkeypatch.setattr(schema, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "a", "text": "' + b"x" * (100 * 2**20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError,
            match=r"bomb\.jsonl\.gz:1: line: longer than 1048576 bytes: split the text",
        ):
            list(read_jsonl([path], Text))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_a_line_of_ten_megabytes_is_a_line(tmp_path):
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"id": "a", "text": "x" * 10_000_000}) + "\n"
    )
    (record,) = read_jsonl([tmp_path / "long.jsonl"], Text)
    assert len(record.text) == 10_000_000


def test_another_split_seed_makes_other_rows(tmp_path):
    limits = dataclasses.replace(LIMITS, splits=(("train", 0.5), ("validation", 0.5)))
    texts = [{"text": f"text {i}"} for i in range(20)]
    one, two = (
        prepare_records(
            tmp_path, "text", *texts, limits=dataclasses.replace(limits, split_seed=s)
        )
        for s in (0, 1)
    )
    assert one.folder != two.folder and one.report.hash != two.report.hash


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("changed", ["data", "tokenizer"])
def test_what_was_edited_between_start_and_resume_is_refused(chain, tmp_path, changed):
    """The hash of the rows depends on the tokenizer, even on one of the same size. Once the
    files are restored, the run resumes."""
    config = stages.config_of(
        chain,
        "pretrain",
        {"steps": 2, "epochs": 0.0, "run.save_every": 1, "run.log_every": 1},
    )
    files = [
        shutil.copy(path, tmp_path / f"{i}.jsonl.gz")
        for i, path in enumerate(config["data"]["text"])
    ]
    own = shutil.copy(config["tokenizer"], tmp_path / "tokenizer.json")
    config = {
        **config,
        "tokenizer": str(own),
        "data": {**config["data"], "text": tuple(map(str, files))},
    }
    workdir = tmp_path / "run"
    run_stage(config, workdir)
    (workdir / "summary.json").unlink()
    edited = files[0] if changed == "data" else own
    before = edited.read_bytes()
    if changed == "data":
        with gzip.open(edited, "at") as file:
            file.write(json.dumps({"id": "one more", "text": "one more"}) + "\n")
    else:
        content = json.loads(before)
        vocab = content["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        edited.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        run_stage(config, workdir)
    assert "was started from other inputs (data.text: '" in str(
        error.value
    ) and "\n" not in str(error.value)
    edited.write_bytes(before)
    assert run_stage(config, workdir)
