"""From data files to rows on disk: which records are kept, and what determines the folder's
name."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
from tests.support.data_limits import SHORT_LIMITS

from instructax.data import batches, prepare, recipe
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.data.schema import DataError
from instructax.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
EOS = TOKENIZER.eos_id
HALVES = dataclasses.replace(SHORT_LIMITS, splits=(("train", 0.5), ("valid", 0.5)))


@pytest.fixture(autouse=True)
def bare_prompts(request, monkeypatch):
    """Disables prompt separators, so that lengths are easy to count. One test below enables
    them."""
    if request.node.name != "test_prompts_get_a_separator":
        monkeypatch.setattr(recipe, "add_separator", lambda prompt: prompt)


def test_prompts_get_a_separator(tmp_path):
    texts = ["Who?", "Human: hi\n\nAssistant:", "Sum:\n", "end "]
    limits = dataclasses.replace(SHORT_LIMITS, sequence_tokens=40, prompt_tokens=24)
    prepared = prepare.prepare_prompts(
        [prompts(tmp_path / "p.jsonl", texts)], TOKENIZER, limits, tmp_path, PLAIN_FORMAT
    )
    expected = ["Who?\n\n", "Human: hi\n\nAssistant: ", "Sum:\n", "end "]
    assert [decode(row["tokens"]) for row in rows_of(prepared.sources["train"])] == expected
    prepared = prepare.prepare_demonstrations(
        [demonstrations(tmp_path / "d.jsonl", [("Who?", "me")])],
        TOKENIZER,
        limits,
        tmp_path,
        PLAIN_FORMAT,
    )
    assert decode(rows_of(prepared.sources["train"])[0]["tokens"]) == "Who?\n\nme$"
    comparisons = write(
        tmp_path / "c.jsonl",
        [{"prompt": "Who?", "completions": ["a", "b"], "ranks": [1, 2]}],
    )
    prepared = prepare.prepare_comparisons(
        [comparisons], TOKENIZER, limits, tmp_path, PLAIN_FORMAT
    )
    assert decode(rows_of(prepared.sources["train"])[0]["prompt"]) == "Who?\n\n"


def write(file, records):
    file.write_text(
        "".join(
            json.dumps({"id": str(i)} | record) + "\n" for i, record in enumerate(records)
        )
    )
    return file


def prompts(file, texts, users=None):
    users = users or [None] * len(texts)
    return write(
        file,
        [
            {"prompt": p, "format": "plain", "user": u}
            for p, u in zip(texts, users, strict=True)
        ],
    )


def demonstrations(file, pairs):
    return write(
        file, [{"prompt": p, "format": "plain", "completion": c} for p, c in pairs]
    )


def rows_of(source):
    return [
        {name: np.asarray(value).tolist() for name, value in row.items()}
        for row in source.__getitems__(range(len(source)))
    ]


def decode(ids):
    return "".join("$" if i == EOS else chr(i) for i in ids)


def test_golden_text_rows(tmp_path):
    file = write(
        tmp_path / "t.jsonl",
        [{"text": "abcdefghijklmnopqr"}, {"text": "0123456789"}, {"text": "xy"}],
    )
    prepared = prepare.prepare_text([file], TOKENIZER, SHORT_LIMITS, tmp_path / "data")
    rows = rows_of(prepared.sources["train"])
    assert [(decode(row["tokens"]), row["lengths"]) for row in rows] == [
        ("abcdefghijklmnop", [16]),
        ("qr$0123456789$", [3, 11]),
        ("xy$", [3]),
    ]
    assert rows[1]["loss_mask"] == [False, True, True, False] + [True] * 10
    report = prepared.report
    assert (report.records, report.dropped, report.kept) == (3, {}, {"train": 3})
    assert (report.rows, report.tokens) == ({"train": 3}, {"train": 33})
    assert report.padding == {"train": 1 - 33 / 48}
    assert report.hash[:16] == prepared.folder.name.removeprefix("text-")


def test_demonstrations_are_kept_whole_or_dropped(tmp_path):
    pairs = [
        ("ask", "tell"),
        ("p" * 9, "c"),
        ("p", "c" * 6),
        ("p" * 8, "c" * 5),
        ("12345678", "12345"),
    ]
    limits = dataclasses.replace(SHORT_LIMITS, sequence_tokens=14)
    file = demonstrations(tmp_path / "d.jsonl", [*pairs, ("q", "r")])
    prepared = prepare.prepare_demonstrations(
        [file], TOKENIZER, limits, tmp_path / "data", PLAIN_FORMAT
    )
    rows = rows_of(prepared.sources["train"])
    assert [decode(row["tokens"]) for row in rows] == [
        "asktell$qr$",
        "ppppppppccccc$",
        "12345678" + "12345$",
    ]
    assert rows[0]["loss_mask"] == [False] * 3 + [True] * 5 + [False, True, True]
    assert prepared.report.dropped == {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "sequence_tokens": 0,
    }
    short = dataclasses.replace(limits, sequence_tokens=13)
    prepared = prepare.prepare_demonstrations(
        [file], TOKENIZER, short, tmp_path / "data", PLAIN_FORMAT
    )
    assert prepared.report.dropped == {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "sequence_tokens": 2,
    }
    assert prepared.report.kept == {"train": 2}


def test_every_demonstration_trains_on_one_end_token(tmp_path):
    file = demonstrations(tmp_path / "d.jsonl", [("ab", "cd"), ("e", "f"), ("g", "hi")])
    (row,) = rows_of(
        prepare.prepare_demonstrations(
            [file], TOKENIZER, SHORT_LIMITS, tmp_path, PLAIN_FORMAT
        ).sources["train"]
    )
    starts = np.cumsum([0, *row["lengths"]])
    for start, stop in itertools.pairwise(starts):
        trained = np.array(row["tokens"][start:stop])[
            np.array(row["loss_mask"][start:stop])
        ]
        assert (trained == EOS).tolist() == [False] * (len(trained) - 1) + [True]


def test_a_second_end_token_in_a_completion_is_an_error(tmp_path):
    """Ordinary text never contains the end token, but an unknown word becomes it if the
    tokenizer uses one token for both."""
    words = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {"a": 0, "b": 1, "</s>": 2},
            "unk_token": "</s>",
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    # A prompt may contain it, because prompts are not trained.
    known = demonstrations(tmp_path / "known.jsonl", [("a what", "b a")])
    (row,) = rows_of(
        prepare.prepare_demonstrations(
            [known], tokenizer, SHORT_LIMITS, tmp_path, PLAIN_FORMAT
        ).sources["train"]
    )
    assert row["tokens"] == [0, 2, 1, 0, 2]
    file = demonstrations(tmp_path / "d.jsonl", [("a", "b a"), ("a", "b what")])
    with pytest.raises(
        DataError,
        match="demonstration '1': completion: its tokens contain the end token 2 before",
    ):
        prepare.prepare_demonstrations(
            [file], tokenizer, SHORT_LIMITS, tmp_path, PLAIN_FORMAT
        )


def test_every_filter_of_prompts_counts_what_it_drops(tmp_path):
    texts = ["abcd1", "abcd2", "x1", "x2", "x3", "longer than 8", "a@b.cd"]
    users = ["u", None, "v", "v", "v", None, None]
    limits = dataclasses.replace(
        SHORT_LIMITS, prefix_characters=4, prompts_per_user=2, filter_pii=True
    )
    prepared = prepare.prepare_prompts(
        [prompts(tmp_path / "p.jsonl", texts, users)],
        TOKENIZER,
        limits,
        tmp_path / "data",
        PLAIN_FORMAT,
    )
    assert [decode(row["tokens"]) for row in rows_of(prepared.sources["train"])] == [
        "abcd1",
        "x1",
        "x2",
    ]
    dropped = {"prefix_characters": 1, "prompts_per_user": 1, "pii": 1, "prompt_tokens": 1}
    assert prepared.report.dropped == dropped
    assert prepared.report.padding == {"train": 1 - 9 / 24}


def test_personal_data_is_dropped_from_the_training_split_only(tmp_path):
    texts = [f"{i}@b.cd" for i in range(40)] + [f"plain{i}" for i in range(10)]
    file = prompts(tmp_path / "p.jsonl", texts)
    limits = dataclasses.replace(HALVES, filter_pii=True)
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, limits, tmp_path / "data", PLAIN_FORMAT
    )
    train = [decode(row["tokens"]) for row in rows_of(prepared.sources["train"])]
    valid = [decode(row["tokens"]) for row in rows_of(prepared.sources["valid"])]
    assert not any("@" in text for text in train)
    assert sum("@" in text for text in valid) == 40 - prepared.report.dropped["pii"] > 5
    assert sorted(train + valid) == sorted(
        set(texts) - ({t for t in texts if "@" in t} - set(valid))
    )


def test_splits_contain_whole_users_and_are_stable_when_data_is_added(tmp_path):
    texts = [f"p{i}" for i in range(60)]
    users = [f"user {i % 12}" for i in range(60)]
    first = prepare.prepare_prompts(
        [prompts(tmp_path / "1.jsonl", texts[:40], users[:40])],
        TOKENIZER,
        HALVES,
        tmp_path,
        PLAIN_FORMAT,
    )
    more = prepare.prepare_prompts(
        [prompts(tmp_path / "2.jsonl", texts, users)],
        TOKENIZER,
        HALVES,
        tmp_path,
        PLAIN_FORMAT,
    )
    owner = dict(zip(texts, users, strict=True))
    seen = {}
    for name in ("train", "valid"):
        found = [decode(row["tokens"]) for row in rows_of(more.sources[name])]
        assert found[: len(first.sources[name])] == [
            decode(row["tokens"]) for row in rows_of(first.sources[name])
        ]
        seen[name] = {owner[text] for text in found}
        assert seen[name]
    assert not seen["train"] & seen["valid"]
    assert sum(len(source) for source in more.sources.values()) == 60


COMPARISONS = [
    {"prompt": "p", "completions": ["a", "bb", "c"], "ranks": [5, 1, 5], "labeler": "zoe"},
    {
        "prompt": "p",
        "completions": ["too long", "a", "b"],
        "ranks": [1, 3, 2],
        "labeler": "ann",
    },
    {
        "prompt": "p",
        "completions": ["too long", "a", "b"],
        "ranks": [1, 3, 3],
        "labeler": "tied when cut",
    },
    {
        "prompt": "p",
        "completions": ["a", "b"],
        "ranks": None,
        "pairs": [[0, 1, 1]],
        "labeler": "ann",
    },
    {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [1, 2, 3, 4]},
    {"prompt": "p", "completions": ["a", "much too long"], "ranks": [1, 2]},
    {"prompt": "long prompt", "completions": ["a", "b"], "ranks": [1, 2]},
    {"prompt": "q", "completions": ["12345", "123456"], "ranks": [1, 2]},
    {"prompt": "r", "completions": ["e", "f"], "ranks": [2, 1]},
]


def test_golden_comparison_rows(tmp_path):
    file = write(tmp_path / "c.jsonl", COMPARISONS)
    prepared = prepare.prepare_comparisons(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    a, b, c, e, f = (ord(letter) for letter in "abcef")
    assert rows_of(prepared.sources["train"]) == [
        {
            "prompt": [ord("p")],
            "responses": [a, EOS, b, b, EOS, c, EOS],
            "lengths": [2, 3, 2],
            "ranks": [1, 0, 1],
            "labeler": 2,
        },
        {
            "prompt": [ord("p")],
            "responses": [a, EOS, b, EOS],
            "lengths": [2, 2],
            "ranks": [1, 0],
            "labeler": 0,
        },
        {
            "prompt": [ord("r")],
            "responses": [e, EOS, f, EOS],
            "lengths": [2, 2],
            "ranks": [1, 0],
            "labeler": -1,
        },
    ]
    dropped = {
        "unranked": 1,
        "prompt_tokens": 1,
        "response_tokens": 2,
        "completions": 1,
        "tied": 1,
    }
    assert prepared.report.dropped == dropped
    assert prepared.report.labelers == ["ann", "tied when cut", "zoe"]
    assert prepared.report.tokens == {"train": 7 + 4 + 4 + 3}
    assert prepared.report.padding == {"train": 1 - 18 / (3 * (8 + 3 * 6))}
    batch = batches.comparison_batch(
        prepared.sources["train"],
        np.array([2, 0]),
        prompt_tokens=8,
        completions=3,
        response_tokens=6,
    )
    assert batch.responses[1, 1].tolist() == [b, b, EOS, 0, 0, 0]
    assert batch.valid.tolist() == [[True, True, False], [True] * 3]


def test_many_rows_are_read_back_in_order(tmp_path):
    texts = [f"prompt{i % 97}"[:8] for i in range(300)]
    file = prompts(tmp_path / "p.jsonl", texts)
    prepared = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    rows = batches.batch_row_ids(2, 64, len(prepared.sources["train"]), 0)
    batch = batches.prompt_batch(prepared.sources["train"], rows, 8)
    found = [
        decode(tokens[mask]) for tokens, mask in zip(batch.tokens, batch.mask, strict=True)
    ]
    assert found == [texts[row] for row in rows]


def test_rows_are_prepared_once_and_then_reused(tmp_path, monkeypatch):
    file = prompts(tmp_path / "p.jsonl", ["a", "b"])
    first = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    # A second preparation would call this.
    monkeypatch.setattr(recipe, "read_jsonl", None)
    again = prepare.prepare_prompts(
        [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
    )
    assert again.report == first.report
    assert rows_of(again.sources["train"]) == rows_of(first.sources["train"])
    assert [path.name for path in (tmp_path / "data").iterdir()] == [first.folder.name]
    assert "tensorflow" not in sys.modules


def test_every_input_is_in_the_hash(tmp_path, monkeypatch):
    file = prompts(tmp_path / "p.jsonl", ["a", "b"])

    def hash_of(files=(file,), tokenizer=TOKENIZER, limits=SHORT_LIMITS):
        return prepare.prepare_prompts(
            files, tokenizer, limits, tmp_path / "data", PLAIN_FORMAT
        ).report.hash

    hashes = [hash_of()]
    hashes.append(hash_of(limits=dataclasses.replace(SHORT_LIMITS, prompt_tokens=7)))
    hashes.append(hash_of(tokenizer=dataclasses.replace(TOKENIZER, hash="other")))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    assert hash_of(files=[copy]) == hashes[0]
    copy.write_bytes(file.read_bytes().replace(b'"b"', b'"c"'))
    hashes.append(hash_of(files=[copy]))
    monkeypatch.setattr(recipe, "ROWS_VERSION", 99)
    hashes.append(hash_of())
    texts = write(tmp_path / "t.jsonl", [{"text": "a"}])
    hashes.append(
        prepare.prepare_text(
            [texts], TOKENIZER, SHORT_LIMITS, tmp_path / "data"
        ).report.hash
    )
    assert len(set(hashes)) == len(hashes)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(.*No such file"):
        hash_of(files=[tmp_path / "none.jsonl"])


def test_an_empty_split_says_what_was_dropped(tmp_path):
    file = prompts(tmp_path / "p.jsonl", ["longer than 8", "another too long"])
    with pytest.raises(ValueError, match="split 'train' of prompts is empty") as caught:
        prepare.prepare_prompts(
            [file], TOKENIZER, SHORT_LIMITS, tmp_path / "data", PLAIN_FORMAT
        )
    assert "of 2 records in 1 files, 2 reached it" in str(caught.value)
    assert "dropped by rule, in all splits: {'prompt_tokens': 2}" in str(caught.value)
    assert not (tmp_path / "data").exists()
    file.write_text("\n")
    with pytest.raises(
        ValueError, match=rf"^no text in {file}: the files have no records$"
    ):
        prepare.prepare_text([file], TOKENIZER, SHORT_LIMITS, tmp_path / "data")
    with pytest.raises(ValueError, match=r"^no files of text: give at least one$"):
        prepare.prepare_text([], TOKENIZER, SHORT_LIMITS, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sequence_tokens", 1, "sequence_tokens = 1 must be at least 2"),
        ("prompt_tokens", 0, "prompt_tokens = 0 must be at least 1"),
        ("response_tokens", 1, "response_tokens = 1 must be at least 2"),
        ("completions", 1, "completions = 1 must be at least 2"),
        (
            "prefix_characters",
            0,
            "prefix_characters = 0 must be at least 1, or None to keep all",
        ),
        (
            "prompts_per_user",
            -1,
            "prompts_per_user = -1 must be at least 1, or None",
        ),
        (
            "splits",
            (("a", 0.5), ("a", 0.5)),
            "splits = (('a', 0.5), ('a', 0.5)): the names must",
        ),
        ("splits", (("a b", 1.0),), "splits = (('a b', 1.0),): the names must"),
        (
            "splits",
            (("a", 0.5), ("b", 0.6)),
            "splits = (('a', 0.5), ('b', 0.6)): the fractions must be above 0 and sum",
        ),
        (
            "splits",
            (("a", 1.0), ("b", 0.0)),
            "splits = (('a', 1.0), ('b', 0.0)): the fractions",
        ),
        ("splits", (), "splits = (): the fractions"),
    ],
)
def test_limits_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(SHORT_LIMITS, **{name: value})
    assert message in str(caught.value)


def test_filtering_personal_data_needs_a_training_split():
    with pytest.raises(
        ValueError,
        match=r'filter_pii = True needs a split called "train", but splits = .*all',
    ):
        dataclasses.replace(SHORT_LIMITS, filter_pii=True, splits=(("all", 1.0),))
