"""The files of a world: schema, contents, reproducibility and failures."""

import dataclasses
import gzip
import itertools
import json

import numpy as np
import pytest

from instructax.simulation import prompts, write
from instructax.simulation.files import recreate_tasks
from instructax.simulation.use_cases import USE_CASES

SIZES = write.WorldSizes(
    documents=40,
    demonstrated_prompts=50,
    demonstrations=60,
    comparisons=50,
    prompts=400,
    gpt_prompts=50,
    public=30,
)
PROMPT_FIELDS = {"id", "prompt", "format", "kind", "user", "source"}
RESPONSE_FIELDS = {"id", "prompt", "format", "completion", "source", "labeler", "meta"}
RANKING_FIELDS = {
    "id",
    "prompt",
    "completions",
    "ranks",
    "pairs",
    "labeler",
    "source",
    "meta",
}


def read_records(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "seed0"
    write.write_world(directory, seed=0, sizes=SIZES)
    return directory


def test_there_is_no_other_file(written):
    names = ("text", "demonstrations", "comparisons", "prompts", "gpt_prompts", "public")
    expected = {f"{name}.jsonl.gz" for name in names}
    assert {path.name for path in written.iterdir()} == expected


@pytest.mark.parametrize(
    ("name", "count", "fields"),
    [
        ("text", 40, {"id", "text", "source", "meta"}),
        ("demonstrations", 60, RESPONSE_FIELDS),
        ("comparisons", 50, RANKING_FIELDS),
        ("prompts", 400, PROMPT_FIELDS),
        ("gpt_prompts", 50, PROMPT_FIELDS),
        ("public", 30, RESPONSE_FIELDS),
    ],
)
def test_files_follow_the_schema(written, name, count, fields):
    records = read_records(written / f"{name}.jsonl.gz")
    assert len(records) == len({record["id"] for record in records}) == count
    assert all(set(record) == fields for record in records)


def test_comparisons_rank_four_to_nine_different_responses(written):
    records = read_records(written / "comparisons.jsonl.gz")
    counts = {len(record["completions"]) for record in records}
    assert {4, 5, 6, 7, 8, 9} >= counts >= {4, 6, 9}
    assert len({record["labeler"] for record in records}) > 5
    for record in records:
        ranks = record["ranks"]
        count = len(record["completions"])
        assert len(set(record["completions"])) == len(ranks) == count
        assert set(ranks) == set(range(1, max(ranks) + 1))
        expected = []
        for i, j in itertools.combinations(range(count), 2):
            expected.append([i, j, int(np.sign(ranks[j] - ranks[i]))])
        assert record["pairs"] == expected


def test_no_prompt_is_in_two_files_and_users_have_a_long_tail(written):
    texts = []
    for name in ("demonstrations", "comparisons", "prompts"):
        records = read_records(written / f"{name}.jsonl.gz")
        texts.append({record["prompt"] for record in records})
    assert len(texts[2]) == SIZES.prompts
    for some, others in itertools.combinations(texts, 2):
        assert not some & others

    users = [record["user"] for record in read_records(written / "prompts.jsonl.gz")]
    counts = sorted((users.count(user) for user in set(users)), reverse=True)
    assert counts[0] > 40 and counts[-1] <= 2 and len(counts) > 30
    assert not any(user.startswith("labeler") for user in users)


def test_the_tasks_of_a_run_are_found_by_its_prompts(written, tmp_path):
    config = {"stage": "world", "seed": 0, "lines": dataclasses.asdict(SIZES)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not a finished world"):
        recreate_tasks(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    tasks = recreate_tasks(tmp_path)
    for name in ("demonstrations", "comparisons", "prompts"):
        records = read_records(written / f"{name}.jsonl.gz")
        assert all(record["prompt"].strip() in tasks for record in records)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(written, tmp_path):
    write.write_world(tmp_path / "again", seed=0, sizes=SIZES)
    write.write_world(tmp_path / "other", seed=1, sizes=SIZES)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
        assert path.read_bytes()[4:8] == bytes(4)  # no time in the gzip header


def test_invalid_requests_write_nothing(written, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="documents = 0, must be at least 1"):
        dataclasses.replace(SIZES, documents=0)
    with pytest.raises(ValueError, match="exists already"):
        write.write_world(written, seed=0, sizes=SIZES)

    only_classification = {"classification": USE_CASES["classification"]}
    monkeypatch.setattr(prompts, "USE_CASES", only_classification)
    too_many = dataclasses.replace(SIZES, prompts=9999)
    with pytest.raises(ValueError, match=r"no more than \d+ prompts"):
        write.write_world(tmp_path / "new", seed=0, sizes=too_many)
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_demonstration", fail)
    with pytest.raises(OSError, match="disk full"):
        write.write_world(tmp_path / "new", seed=0, sizes=SIZES)
    assert not list(tmp_path.iterdir())
