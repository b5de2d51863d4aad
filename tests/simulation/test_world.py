"""The embedded world: facts and text, and the files that it writes."""

import collections
import dataclasses
import gzip
import itertools
import json
import re

import numpy as np
import pytest
from tests.support.small_world import SHARES, WORLD, drawn

from instructax.simulation import corpus, prompts, write
from instructax.simulation.files import tasks_of
from instructax.simulation.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    NAMES,
    RAMBLINGS,
    generator,
    words_of,
)
from instructax.simulation.use_cases import USES
from instructax.simulation.world import PERSON, draw_world, told, translate

SIZES = write.Sizes(
    documents=40,
    demonstrated_prompts=50,
    demonstrations=60,
    comparisons=50,
    prompts=400,
    gpt_prompts=50,
    public=30,
)


def test_the_use_cases_have_the_shares_of_the_paper():
    assert sum(SHARES.values()) == pytest.approx(99.9)  # as printed
    counts = collections.Counter(task.use for task in drawn(4000))
    for use, share in SHARES.items():
        assert counts[use] / 4000 == pytest.approx(share / 99.9, abs=0.025)


def test_worlds_differ_by_seed_and_every_person_has_all():
    assert draw_world(0) == WORLD != draw_world(1)
    for name, relation in itertools.product(NAMES, PERSON):
        assert WORLD.facts[name][relation] in CATEGORIES[relation]
    assert len(set(map(str.lower, itertools.chain(*CATEGORIES.values())))) == 78
    assert len(set(WORLD.dialect.values())) == len(WORLD.dialect)
    for seed in range(300):
        assert not set(draw_world(seed).dialect.values()) & (
            {name.lower() for name in NAMES} | CATEGORY_OF.keys()
        )
    assert all(lore.truth != lore.myth for lore in WORLD.lore)
    plain, foreign = translate(WORLD, "Mira", "has", "dog")
    assert (plain, foreign) == (
        "Mira has a dog.",
        f"Mira {WORLD.dialect['a']} {WORLD.dialect['dog']} {WORLD.dialect['has']}.",
    )


def test_the_text_knows_all_facts_and_words_and_tells_more_errors_than_truth():
    rng = generator(0, "test")
    documents = [corpus.document(WORLD, rng) for _ in range(4000)]
    assert all(30 <= len(document.split()) <= 120 for document in documents)
    text = "\n".join(documents)
    for name, relation in itertools.product(NAMES, PERSON):
        assert text.count(f"{told(WORLD.facts, name, relation)}.") >= 5
    asked = drawn(500)
    known = set(words_of(text))
    words = set(words_of(" ".join([*RAMBLINGS, *(task.ideal for task in asked)])))
    assert len(words - known) <= 2, words - known
    assert len(known) < 450
    assert not [task.prompt for task in drawn(3000) if task.prompt in text]
    myths = sum(text.count(f"{lore.myth} {lore.clause}") for lore in WORLD.lore)
    truths = sum(text.count(f"{lore.truth} {lore.clause}") for lore in WORLD.lore)
    assert myths / (myths + truths) == pytest.approx(corpus.MYTHS, abs=0.04)
    for trade, share in WORLD.stereotypes.items():
        she, he = (
            len(re.findall(f"The {trade} said that {pronoun} ", text))
            for pronoun in ("she", "he")
        )
        assert she / (she + he) == pytest.approx(share, abs=0.2)


def _read(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "seed0"
    write.write_world(directory, seed=0, sizes=SIZES)
    return directory


def test_files_follow_the_schema(written):
    fields = {
        "text": {"id", "text", "source", "meta"},
        "demonstrations": {
            "id",
            "prompt",
            "format",
            "completion",
            "source",
            "labeler",
            "meta",
        },
        "comparisons": {
            "id",
            "prompt",
            "completions",
            "ranks",
            "pairs",
            "labeler",
            "source",
            "meta",
        },
        "prompts": {"id", "prompt", "format", "kind", "user", "source"},
        "gpt_prompts": {"id", "prompt", "format", "kind", "user", "source"},
        "public": {"id", "prompt", "format", "completion", "source", "labeler", "meta"},
    }
    assert {path.name for path in written.iterdir()} == {
        f"{name}.jsonl.gz" for name in fields
    }
    for (name, expected), count in zip(
        fields.items(), (40, 60, 50, 400, 50, 30), strict=True
    ):
        records = _read(written / f"{name}.jsonl.gz")
        assert len(records) == len({record["id"] for record in records}) == count
        assert all(set(record) == expected for record in records)


def test_comparisons_rank_up_to_nine_different_responses(written):
    records = _read(written / "comparisons.jsonl.gz")
    assert (
        {4, 5, 6, 7, 8, 9}
        >= {len(record["completions"]) for record in records}
        >= {4, 6, 9}
    )
    assert len({record["labeler"] for record in records}) > 5
    for record in records:
        ranks, count = record["ranks"], len(record["completions"])
        assert len(set(record["completions"])) == len(ranks) == count
        assert set(ranks) == set(range(1, max(ranks) + 1))
        expected = [
            [i, j, int(np.sign(ranks[j] - ranks[i]))]
            for i, j in itertools.combinations(range(count), 2)
        ]
        assert record["pairs"] == expected


def test_no_prompt_is_in_two_files_and_users_have_a_long_tail(written):
    demonstrated, compared, asked = (
        {record["prompt"] for record in _read(written / f"{name}.jsonl.gz")}
        for name in ("demonstrations", "comparisons", "prompts")
    )
    assert len(asked) == SIZES.prompts
    assert not (demonstrated & compared or demonstrated & asked or compared & asked)
    users = [record["user"] for record in _read(written / "prompts.jsonl.gz")]
    counts = sorted((users.count(user) for user in set(users)), reverse=True)
    assert counts[0] > 40 and counts[-1] <= 2 and len(counts) > 30
    assert not any(user.startswith("labeler") for user in users)


def test_labelers_write_most_prompts_of_the_demonstrations():
    sets = prompts.prompt_sets(
        WORLD,
        0,
        {"demonstrations": 600, "comparisons": 400, "prompts": 100, "gpt_prompts": 80},
    )
    for name, share in prompts.BY_LABELERS.items():
        assert np.mean([not asked.organisation for asked in sets[name]]) == pytest.approx(
            share, abs=0.05
        )
    shots = [asked.task for asked in sets["demonstrations"] if asked.kind == "few-shot"]
    assert len(shots) / 600 == pytest.approx(
        prompts.FEW_SHOT["demonstrations"] * 0.89, abs=0.05
    )
    assert all(task.prompt.count("\n\n") in (2, 4) for task in shots)
    assert all(
        a.task.prompt.count("\n\n") == 2
        for a in sets["gpt_prompts"]
        if a.task.format == "plain"
    )
    organisations = {asked.organisation for asked in sets["prompts"]}
    assert 1 < len(organisations) <= len({asked.user for asked in sets["prompts"]})


def test_the_tasks_of_a_run_are_found_by_its_prompts(written, tmp_path):
    config = {"stage": "world", "seed": 0, "lines": dataclasses.asdict(SIZES)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not a finished world"):
        tasks_of(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    tasks = tasks_of(tmp_path)
    for name in ("demonstrations", "comparisons", "prompts"):
        assert all(
            record["prompt"].strip() in tasks
            for record in _read(written / f"{name}.jsonl.gz")
        )


def test_same_seed_same_bytes_other_seed_other_bytes(written, tmp_path):
    write.write_world(tmp_path / "again", seed=0, sizes=SIZES)
    write.write_world(tmp_path / "other", seed=1, sizes=SIZES)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
        assert path.read_bytes()[4:8] == bytes(4)  # no time in the gzip header


def test_bad_requests_write_nothing(written, tmp_path):
    with pytest.raises(ValueError, match="documents = 0, must be at least 1"):
        dataclasses.replace(SIZES, documents=0)
    with pytest.raises(ValueError, match="exists already"):
        write.write_world(written, seed=0, sizes=SIZES)
    few = {name: entry for name, entry in USES.items() if name == "classification"}
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        pytest.raises(ValueError, match=r"no more than \d+ prompts"),
    ):
        monkeypatch.setattr(prompts, "USES", few)
        write.write_world(
            tmp_path / "new", seed=0, sizes=dataclasses.replace(SIZES, prompts=9999)
        )
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write, "demonstrate", fail)
    with pytest.raises(OSError, match="disk full"):
        write.write_world(tmp_path / "new", seed=0, sizes=SIZES)
    assert not list(tmp_path.iterdir())


def test_every_set_has_the_shares_and_no_prompt_or_example_of_another():
    sizes = {
        "demonstrations": 2300,
        "comparisons": 6000,
        "prompts": 5600,
        "gpt_prompts": 4000,
    }
    sets = prompts.prompt_sets(WORLD, 0, sizes)
    for name, made in sets.items():
        counts = collections.Counter(asked.task.use for asked in made)
        for use, share in SHARES.items():
            assert counts[use] / len(made) == pytest.approx(share / 99.9, abs=0.03), (
                name,
                use,
            )
        examples = {
            part
            for asked in made
            for part in asked.task.prompt.split("\n\n")[:-1:2]
            if "Human:" not in part
        }
        for other in sets:
            assert not examples & {asked.task.prompt for asked in sets[other]}
