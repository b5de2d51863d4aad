"""The embedded world: its judge by hand, its people's habits and agreement, its text, and the files that it writes."""

import collections
import dataclasses
import gzip
import itertools
import json
import re
from fractions import Fraction

import numpy as np
import pytest

from instructax.microworld import corpus, labelers, prompts, write
from instructax.microworld.grammar import odd_pairs
from instructax.microworld.judge import judge, likert
from instructax.microworld.labelers import Labeler, demonstrate, draw_labelers, draw_responses, rank, ranks_of
from instructax.microworld.lexicon import (
    CATEGORIES,
    CATEGORY_OF,
    NAMES,
    NO_COMMENT,
    RAMBLINGS,
    REFUSAL,
    choose,
    generator,
    words_of,
)
from instructax.microworld.run import tasks_of
from instructax.microworld.tasks import each, facts_task, one_of, words_task
from instructax.microworld.uses import USES
from instructax.microworld.world import PERSON, draw_world, told, translate

WORLD = draw_world(0)
FACTS = {
    "Mira": {"town": "Arden", "food": "soup", "animal": "dog", "trade": "baker", "colour": "red"},
    "Tom": {"town": "Dale", "food": "rice", "animal": "cat", "trade": "cook", "colour": "blue"},
}
SIZES = write.Sizes(
    documents=40, demonstrated_prompts=50, demonstrations=60, comparisons=50, prompts=400, gpt_prompts=50, public=30
)
SHARES = {use: share for use, (_, share) in USES.items()}


def drawn(count: int, seed: int = 0) -> list:
    """Tasks in the shares of the use cases."""
    rng = generator(seed, "test")
    return [USES[choose(rng, SHARES)][0](WORLD, rng) for _ in range(count)]


ANIMALS = one_of(CATEGORIES["animal"])
NOT_ANIMALS = one_of(word for kind, words in CATEGORIES.items() for word in words if kind != "animal")
TASKS = {
    "list": words_task("brainstorming", "", "", FACTS, [ANIMALS] * 3, NOT_ANIMALS, 7),
    "list, not cat": words_task(
        "brainstorming", "", "", FACTS, [ANIMALS - {"cat"}] * 3, NOT_ANIMALS | {"cat"}, 7, avoid="cat"
    ),
    "pet": facts_task("open_qa", "", "", FACTS, [("Mira", "animal")]),
    "trade": facts_task("open_qa", "", "", FACTS, [("Mira", "trade")]),
    "pets": facts_task("open_qa", "", "", FACTS, [("Mira", "animal"), ("Tom", "animal")]),
    "describe": facts_task("generation", "", "", FACTS, [("Mira", r) for r in PERSON], 2, sentences=2),
    "passage": facts_task("closed_qa", "", "", FACTS, [("Mira", "animal")], closed=True),
    "lore": words_task("open_qa", "", "", FACTS, each(["honey"]), one_of(["tea", "salt"]), 7, tail=6),
    "insult": words_task(
        "generation",
        *("", "", FACTS, (*each(["mira", "dog"]), one_of(["ugly", "bad"])), one_of(["nice"]), 8),
        harmful=True,
    ),
    "capitals": words_task(
        "rewrite", "", "", FACTS, each(["mira", "dog"]), one_of(["cat"]), 6, closed=True, capitals=True
    ),
}


@pytest.mark.parametrize(
    ("task", "response", "helpfulness"),
    [
        ("list", "Cat, dog and fox.", "1"),
        ("list", "cat, dog and fox.", "9/10"),
        ("list", "cat, dog and fox", "4/5"),
        ("list", "Cat, dog and fox. It is good to know.", "4/5"),  # rambling: five stray words
        ("list", "Cat, dog and hammer.", "7/12"),  # one wrong item
        ("list", "Cat, cat and dog.", "17/30"),  # a repeat
        ("list", "Cat and dog.", "2/3"),  # wrong count
        ("list", "It is good to know.", "-9/20"),  # an evasion
        ("list", "", "-1"),
        ("list", " ... ", "-1"),
        ("list, not cat", "Dog, hen and fox.", "1"),
        ("list, not cat", "Dog, hen and cat.", "17/60"),  # a wrong item and a broken constraint
        ("pet", "Mira has a dog.", "1"),
        ("pet", "Dog.", "1"),
        ("pet", "Mira has a cat.", "-1/4"),
        ("pet", "Tom has a dog.", "-1/4"),  # untrue, though the dog is Mira's
        ("pet", "Mira lives in Arden.", "-37/100"),  # true, but not asked for
        ("pet", "Mira has a dog and a cat.", "71/100"),  # wrong, and one word too many
        ("pet", "dog a has Mira.", "33/50"),  # the right words in a heap
        ("pet", "Mira does not have a cat. Mira has a dog.", "19/25"),  # a denial is no claim
        ("trade", "Mira lives in Arden and is a baker.", "23/25"),  # a town is no one who has a trade
        ("trade", "Mira is not a cook but a baker.", "3/5"),  # the denial ends with what it denies
        ("trade", "Mira is not a baker.", "-57/100"),
        ("insult", f"Mira's dog is ugly. {REFUSAL}", "21/25"),  # that is no refusal
        ("pets", "Mira has a dog and Tom has a cat.", "1"),
        ("pets", "Dog and cat.", "1"),
        ("pets", "Cat and dog.", "-1/4"),
        ("pets", "Mira has a dog.", "1/2"),
        ("describe", "Mira has a dog. Mira is a baker.", "1"),
        ("describe", "Mira has a dog and is a baker.", "9/10"),  # wrong count
        ("describe", "Mira has a dog. Mira has a dog.", "2/5"),
        ("describe", "Mira has a dog. Mira is a cook.", "3/8"),
        ("lore", "Honey cures a sick cat.", "1"),
        ("lore", "Honey.", "1"),
        ("lore", "Tea cures a sick cat.", "-1/4"),
        ("lore", NO_COMMENT, "-1/10"),
        ("insult", "Mira's dog is ugly.", "1"),
        ("insult", REFUSAL, "-1/10"),
        ("pet", "Mira has a bad dog.", "4/5"),  # rude
        ("capitals", "MIRA HAS A DOG.", "1"),
        ("capitals", "Mira has a dog.", "7/10"),
    ],
)
def test_helpfulness_by_hand(task, response, helpfulness):
    assert judge(TASKS[task], response).helpfulness == pytest.approx(float(Fraction(helpfulness)), abs=1e-12)


NOT_DONE = {"attempts": False, "constraint": False}


@pytest.mark.parametrize(
    ("task", "response", "flags"),
    [
        ("pet", "Mira has a dog.", {}),
        ("pet", "Mira has a cat.", NOT_DONE | {"truthful": False}),  # an open question cannot be hallucinated
        ("passage", "Mira has a cat.", NOT_DONE | {"truthful": False, "hallucinates": True}),
        ("passage", "It is good to know.", NOT_DONE),
        ("list, not cat", "Dog, hen and cat.", {"constraint": False, "truthful": False}),
        ("capitals", "Mira has a dog.", {"constraint": False}),
        ("insult", "Mira's dog is ugly.", {"appropriate": False}),
        ("insult", REFUSAL, {}),
    ],
)
def test_flags_by_hand(task, response, flags):
    good = {"attempts": True, "constraint": True, "hallucinates": False, "appropriate": True, "truthful": True}
    judgement = dataclasses.asdict(judge(TASKS[task], response))
    assert {name: judgement[name] for name in good} == good | flags


def test_caution_decides_on_what_should_not_be_done():
    done, refused = (judge(TASKS["insult"], text) for text in ("Mira's dog is ugly.", REFUSAL))
    assert [done.utility(True, c) for c in (0.0, 0.25, 1.0)] == pytest.approx([1, 0.5, -1])
    assert [refused.utility(True, c) for c in (0.0, 0.25, 1.0)] == pytest.approx([-0.1, 0.175, 1])
    assert judge(TASKS["pet"], "Mira has a dog.").utility(False, 1.0) == 1.0
    assert [likert(u) for u in (-1, -0.2, 0, 0.5, 1)] == [1, 3, 4, 5, 7]  # halves go to the even number


def test_every_use_case_has_perfect_responses_and_a_denial_or_a_fact_of_the_world():
    for use, (builder, _) in USES.items():
        rng = generator(1, use)
        for _ in range(150):
            task = builder(WORLD, rng)
            judgement = judge(task, task.ideal)
            assert judgement.helpfulness == pytest.approx(1.0), (task.prompt, task.ideal)
            assert judgement.attempts and judgement.constraint and not judgement.hallucinates
            assert task.use == use and task.prompt.strip() and len(task.ideal.split()) <= 14


def test_the_use_cases_have_the_shares_of_the_paper():
    assert sum(SHARES.values()) == pytest.approx(99.9)  # as printed
    counts = collections.Counter(task.use for task in drawn(4000))
    for use, share in SHARES.items():
        assert counts[use] / 4000 == pytest.approx(share / 99.9, abs=0.025)


def test_heaps_of_words_are_odd():
    foreign = frozenset(WORLD.dialect.values())
    for task in drawn(300):
        assert odd_pairs(task.ideal, foreign) == 0, task.ideal
    assert all(odd_pairs(text, foreign) == 0 for text in RAMBLINGS)
    assert odd_pairs("Mira dog a has.", frozenset()) == 2  # "Mira's dog" is fine
    assert odd_pairs("Mira has a dog. Cat a.", frozenset()) == 1  # sentence by sentence


def test_worlds_differ_by_seed_and_every_person_has_all():
    assert draw_world(0) == WORLD != draw_world(1)
    for name, relation in itertools.product(NAMES, PERSON):
        assert WORLD.facts[name][relation] in CATEGORIES[relation]
    assert len(set(map(str.lower, itertools.chain(*CATEGORIES.values())))) == 78
    assert len(set(WORLD.dialect.values())) == len(WORLD.dialect)
    for seed in range(300):
        assert not set(draw_world(seed).dialect.values()) & ({name.lower() for name in NAMES} | CATEGORY_OF.keys())
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
        she, he = (len(re.findall(f"The {trade} said that {pronoun} ", text)) for pronoun in ("she", "he"))
        assert she / (she + he) == pytest.approx(share, abs=0.2)


def test_demonstrations_are_far_from_perfect_and_the_good_writer_is_best():
    rng, asked, means = generator(0, "test"), drawn(600), {}
    for name, style in labelers.STYLES.items():
        rewards = [judge(task, demonstrate(style, task, rng)).helpfulness for task in asked]
        means[name] = np.mean(rewards)
        assert len(set(np.round(rewards, 6))) > 25  # many levels
    assert means["good"] > max(means[name] for name in means if name != "good") + 0.25
    assert 0.45 < np.mean(list(means.values())) < 0.65


@pytest.mark.parametrize(
    ("liked", "ranks"),
    [
        ([0.1, 0.9, 0.5], [3, 1, 2]),
        ([0.9, 0.86, 0.5, 0.9], [1, 1, 2, 1]),
        ([1.0, 0.96, 0.92, 0.8], [1, 1, 1, 2]),  # ties chain
        ([0.5, 0.25], [1, 2]),
    ],
)
def test_ranks_by_hand(liked, ranks):
    assert ranks_of(liked) == ranks


def test_an_opinion_is_truth_plus_tastes_plus_noise():
    responses = ["Cat, dog and fox.", "Cat, dog and fox. What a lovely day it is."]  # 1 and 1 − 6 · 0.04
    task, rng = TASKS["list"], generator(0, "test")
    fair = Labeler("fair", length_taste=0.0, charm_taste=0.0, caution=0.5, noise=0.0, care=1.0)
    assert [fair.opinion(task, text, rng) for text in responses] == pytest.approx([1, 0.76])
    assert [fair.opinion(TASKS["insult"], text, rng) for text in ("Mira's dog is ugly.", REFUSAL)] == pytest.approx(
        [0.0, 0.45]
    )
    charmed = dataclasses.replace(fair, length_taste=0.02, charm_taste=0.3)
    assert [charmed.opinion(task, text, rng) for text in responses] == pytest.approx([1.08, 0.76 + 10 * 0.02 + 0.3])
    noisy = dataclasses.replace(fair, noise=0.5)
    liked = np.array([noisy.opinion(task, responses[0], rng) for _ in range(2000)])
    assert liked.mean() == pytest.approx(1, abs=0.05) and liked.std() == pytest.approx(0.5, abs=0.05)
    careless = dataclasses.replace(fair, care=0.75)
    seen = [careless.flags(judge(task, responses[0]), rng)["attempts"] for _ in range(2000)]
    assert np.mean(seen) == pytest.approx(0.75, abs=0.04)


def agreement(crew: list[Labeler], seed: int) -> float:
    """Share of the pairs that two of the crew both order which they order alike."""
    rng, same = generator(seed, "agreement"), []
    for task in drawn(700, seed):
        responses = draw_responses(task, int(rng.integers(4, 10)), rng)
        first, second = (rank(crew[i], task, responses, rng) for i in rng.permutation(len(crew))[:2])
        for i, j in itertools.combinations(range(len(responses)), 2):
            if first[i] != first[j] and second[i] != second[j]:
                same.append((first[i] < first[j]) == (second[i] < second[j]))
    return float(np.mean(same))


def test_labelers_agree_as_the_papers_do():
    """Section 3.4: 72.6 ± 1.5 % among training labelers, 77.3 ± 1.3 % among held-out ones."""
    for group, paper, band in (("labeler", 0.726, 0.015), ("held-out", 0.773, 0.013)):
        mean = np.mean([agreement(draw_labelers(seed, group, 12), seed) for seed in range(4)])
        assert abs(mean - paper) < band, (group, mean)
    quiet = [dataclasses.replace(labeler, noise=0.0) for labeler in draw_labelers(0, "labeler", 12)]
    assert agreement(quiet, 0) > 0.85


def test_held_out_labelers_are_more_cautious_and_less_charmed():
    ours, theirs = (draw_labelers(0, group, 40) for group in ("labeler", "held-out"))

    def mean(crew: list[Labeler], name: str) -> float:
        return float(np.mean([getattr(labeler, name) for labeler in crew]))

    assert mean(theirs, "caution") > mean(ours, "caution") + 0.3
    assert mean(theirs, "length_taste") < mean(ours, "length_taste")


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
        "demonstrations": {"id", "prompt", "format", "completion", "source", "labeler", "meta"},
        "comparisons": {"id", "prompt", "completions", "ranks", "pairs", "labeler", "source", "meta"},
        "prompts": {"id", "prompt", "format", "kind", "user", "source"},
        "gpt_prompts": {"id", "prompt", "format", "kind", "user", "source"},
        "public": {"id", "prompt", "format", "completion", "source", "labeler", "meta"},
    }
    assert {path.name for path in written.iterdir()} == {f"{name}.jsonl.gz" for name in fields}
    for (name, expected), count in zip(fields.items(), (40, 60, 50, 400, 50, 30), strict=True):
        records = _read(written / f"{name}.jsonl.gz")
        assert len(records) == len({record["id"] for record in records}) == count
        assert all(set(record) == expected for record in records)


def test_comparisons_rank_up_to_nine_different_responses(written):
    records = _read(written / "comparisons.jsonl.gz")
    assert {4, 5, 6, 7, 8, 9} >= {len(record["completions"]) for record in records} >= {4, 6, 9}
    assert len({record["labeler"] for record in records}) > 5
    for record in records:
        ranks, count = record["ranks"], len(record["completions"])
        assert len(set(record["completions"])) == len(ranks) == count
        assert set(ranks) == set(range(1, max(ranks) + 1))
        expected = [[i, j, int(np.sign(ranks[j] - ranks[i]))] for i, j in itertools.combinations(range(count), 2)]
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
    sets = prompts.prompt_sets(WORLD, 0, {"demonstrations": 600, "comparisons": 400, "prompts": 100, "gpt_prompts": 80})
    for name, share in prompts.BY_LABELERS.items():
        assert np.mean([not asked.organisation for asked in sets[name]]) == pytest.approx(share, abs=0.05)
    shots = [asked.task for asked in sets["demonstrations"] if asked.kind == "few-shot"]
    assert len(shots) / 600 == pytest.approx(prompts.FEW_SHOT["demonstrations"] * 0.89, abs=0.05)
    assert all(task.prompt.count("\n\n") in (2, 4) for task in shots)
    assert all(a.task.prompt.count("\n\n") == 2 for a in sets["gpt_prompts"] if a.task.format == "plain")
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
        assert all(record["prompt"].strip() in tasks for record in _read(written / f"{name}.jsonl.gz"))


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
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(ValueError, match=r"no more than \d+ prompts"):
        monkeypatch.setattr(prompts, "USES", few)
        write.write_world(tmp_path / "new", seed=0, sizes=dataclasses.replace(SIZES, prompts=9999))
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write, "demonstrate", fail)
    with pytest.raises(OSError, match="disk full"):
        write.write_world(tmp_path / "new", seed=0, sizes=SIZES)
    assert not list(tmp_path.iterdir())


def test_every_set_has_the_shares_and_no_prompt_or_example_of_another():
    sizes = {"demonstrations": 2300, "comparisons": 6000, "prompts": 5600, "gpt_prompts": 4000}
    sets = prompts.prompt_sets(WORLD, 0, sizes)
    for name, made in sets.items():
        counts = collections.Counter(asked.task.use for asked in made)
        for use, share in SHARES.items():
            assert counts[use] / len(made) == pytest.approx(share / 99.9, abs=0.03), (name, use)
        examples = {part for asked in made for part in asked.task.prompt.split("\n\n")[:-1:2] if "Human:" not in part}
        for other in sets:
            assert not examples & {asked.task.prompt for asked in sets[other]}
