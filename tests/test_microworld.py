"""The embedded world: its true reward by hand, its people's habits, and the files that it writes."""

import gzip
import itertools
import json
import re
from fractions import Fraction

import numpy as np
import pytest

from instructax.microworld import labelers, tasks, text, write
from instructax.microworld.labelers import Labeler, demonstrate, draw_answers, draw_labelers, ranks_of, utilities
from instructax.microworld.truth import true_reward
from instructax.microworld.world import CATEGORIES, NAMES, World, draw_world, generator, words_of

WORLD = draw_world(0)
PROMPTS = [prompt for _, prompt in tasks.all_prompts(WORLD)]
SOME_PROMPTS = PROMPTS[::23]
TINY = World(
    {
        "Mira": {"town": "Arden", "food": "soup", "animal": "dog", "trade": "baker", "colour": "red"},
        "Tom": {"town": "Dale", "food": "rice", "animal": "cat", "trade": "cook", "colour": "blue"},
    }
)
SIZES = write.Sizes(documents=40, demonstrations=60, comparisons=50, prompts=400)


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("List three animals.\n", "Cat, dog and fox.", "1"),
        ("List three animals.\n", "Three animals are cat, dog and fox.", "1"),
        ("List three animals.\n", "Here are three fine animals: cat, dog and fox.", "23/25"),  # two words too many
        ("List three animals.\n", "cat, dog and fox.", "9/10"),
        ("List three animals.\n", "cat, dog and fox", "4/5"),
        ("List three animals.\n", "Cat, dog and fox. It is good to know.", "4/5"),  # rambling: five stray words
        ("List three animals.\n", "Cat, dog and fox. it is good to know.", "7/10"),
        ("List three animals.\n", "Cat, dog and hammer.", "7/12"),  # one wrong item
        ("List three animals.\n", "Cat, cat and dog.", "17/30"),  # a repeat
        ("List three animals.\n", "Cat and dog.", "2/3"),  # wrong count
        ("List three animals.\n", "Cat, dog, fox and hen.", "11/12"),  # wrong count
        ("List three animals.\n", "Red, blue and gold.", "-1/4"),
        ("List three animals.\n", "It is good to know.", "-9/20"),  # an evasion
        ("List three animals.\n", "", "-1"),
        ("List three animals.\n", " ... ", "-1"),
        ("List three animals.\n", "Red " * 12, "-1"),  # the floor
        ("List two towns but not Dale.\n", "Holm and Stow.", "1"),
        ("List two towns but not Dale.\n", "Holm and Dale.", "3/8"),
        ("Name two fruits and one tool.\n", "Pear, plum and saw.", "1"),
        ("Name two fruits and one tool.\n", "Pear, saw and rake.", "7/12"),
        ("List two fruits and two tools.\n", "Pear, plum and saw.", "3/4"),
        ("What is Mira's pet?\n", "Mira has a dog.", "1"),
        ("What is Mira's pet?\n", "Dog.", "1"),
        ("What is Mira's pet?\n", "The dog is the pet of Mira.", "24/25"),  # one word too many
        ("What is Mira's pet?\n", "Mira has a cat.", "-1/4"),
        ("What is Mira's pet?\n", "Tom has a dog.", "-1/4"),  # untrue, though the dog is Mira's
        ("What is Mira's pet?\n", "Mira lives in Arden.", "-37/100"),  # true, but not asked for
        ("What is Mira's pet?\n", "Mira has a dog and a cat.", "71/100"),
        ("What is Mira's pet?\n", "Mira has a dog. Mira has a dog.", "41/50"),
        ("What are the pets of Mira and Tom?\n", "Mira has a dog and Tom has a cat.", "1"),
        ("What are the pets of Mira and Tom?\n", "Dog and cat.", "1"),
        ("What are the pets of Mira and Tom?\n", "Cat and dog.", "-1/4"),
        ("What are the pets of Mira and Tom?\n", "Mira has a dog.", "1/2"),
        ("What are the pets of Mira and Tom?\n", "Mira has a cat and Tom has a cat.", "3/8"),
        ("What are Mira's home town and pet?\n", "Mira lives in Arden and has a dog.", "1"),
        ("What are Mira's home town and pet?\n", "Mira lives in Arden and has a cat.", "3/8"),
        ("Praise Mira's dog in one sentence.\n", "Mira's dog is lovely.", "1"),
        ("Praise Mira's dog in one sentence.\n", "The dog is lovely.", "2/3"),
        ("Praise Mira's dog in one sentence.\n", "Mira's dog is ugly.", "7/12"),
        ("Praise Mira's dog in one sentence.\n", "Tom's dog is lovely.", "7/12"),
        ("Praise Mira's dog in one sentence.\n", "Mira's dog is lovely, sweet and nice.", "4/5"),
        ("Praise Mira's dog in one sentence.\n", "Mira's dog is lovely. Mira's dog is sweet.", "14/25"),
        ("Describe Mira in two sentences.\n", "Mira has a dog. Mira is a baker.", "1"),
        ("Describe Mira in two sentences.\n", "Mira has a dog and is a baker.", "9/10"),  # wrong count
        ("Describe Mira in two sentences.\n", "Mira has a dog. Mira has a dog.", "2/5"),
        ("Describe Mira in two sentences.\n", "Mira has a dog. Mira is a cook.", "3/8"),
        ("Describe Mira in two sentences.\n", "Mira has a dog. It is good to know.", "3/10"),
    ],
)
def test_true_reward_by_hand(prompt, response, reward):
    assert true_reward(prompt, response, TINY) == pytest.approx(float(Fraction(reward)), abs=1e-12)


def test_every_prompt_is_distinct_has_one_template_and_a_perfect_answer():
    rng = generator(0, "test")
    assert len(set(PROMPTS)) == len(PROMPTS) > 5000
    for prompt in PROMPTS:
        assert sum(pattern.fullmatch(prompt.strip()) is not None for _, pattern in tasks._PATTERNS) == 1
        answer = tasks.ideal_response(prompt, WORLD, rng)
        assert true_reward(prompt, answer, WORLD) == pytest.approx(1.0), (prompt, answer)
        assert len(answer.split()) <= 14 and len(prompt.split()) <= 12


def test_an_answer_gets_better_part_by_part():
    rng = generator(0, "test")
    for prompt in SOME_PROMPTS:
        task = tasks.parse(prompt)
        parts = tasks.ideal_parts(task, WORLD, rng)
        rewards = [true_reward(prompt, tasks.compose(task, parts[: n + 1]), WORLD) for n in range(len(parts))]
        assert rewards == sorted(set(rewards)), (prompt, rewards)


def test_unknown_prompt_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"'List nine ghosts\.' fits no template"):
        true_reward("List nine ghosts.", "Boo.", WORLD)


def test_facts_differ_by_seed_and_every_person_has_all():
    assert draw_world(0) == WORLD != draw_world(1)
    for name, relation in itertools.product(NAMES, ("town", "food", "animal", "trade", "colour")):
        assert WORLD.facts[name][relation] in CATEGORIES[relation]
    assert len(set(map(str.lower, itertools.chain(*CATEGORIES.values())))) == 70


def test_the_text_knows_all_facts_and_words_but_no_prompt():
    rng = generator(0, "test")
    documents = [text.document(WORLD, rng) for _ in range(3000)]
    assert all(30 <= len(document.split()) <= 120 for document in documents)
    corpus = "\n".join(documents)
    for name, relation in itertools.product(NAMES, WORLD.facts["Mira"]):
        assert corpus.count(f"{name} {WORLD.clause(name, relation)}.") >= 5
    for name, animal in itertools.product(NAMES, CATEGORIES["animal"]):
        assert (f"{name} has a {animal}" in corpus) == (WORLD.facts[name]["animal"] == animal)
    for form in (r"(\w+): I live in (\w+)", r"(\w+) came home to (\w+)", r"met (\w+), who lives in (\w+)"):
        told = re.findall(form, corpus)
        assert len(told) > 20 and all(WORLD.facts[name]["town"] == town for name, town in told)
    answers = [tasks.ideal_response(prompt, WORLD, rng) for prompt in SOME_PROMPTS]
    known = set(words_of(corpus))
    assert set(words_of(" ".join([*PROMPTS, *answers, *labelers.RAMBLINGS]))) <= known
    assert len(known) < 300
    assert not {prompt.strip() for prompt in PROMPTS} & set(corpus.split("\n"))


def test_demonstrations_are_far_from_perfect_and_the_good_writer_is_best():
    rng = generator(0, "test")
    means = {}
    for name, style in labelers.STYLES.items():
        rewards = [true_reward(p, demonstrate(style, p, WORLD, rng), WORLD) for p in PROMPTS[::7]]
        means[name] = np.mean(rewards)
        assert len(set(np.round(rewards, 6))) > 25  # many levels
    assert means["good"] > max(means["terse"], means["rambling"]) + 0.3
    assert min(means["terse"], means["rambling"]) > means["sloppy"]
    assert 0.4 < np.mean(list(means.values())) < 0.55


def test_spoilt_answers_are_worse():
    rng = generator(0, "test")
    loss = []
    for prompt in SOME_PROMPTS:
        answer = tasks.ideal_response(prompt, WORLD, rng)
        spoilt = labelers.spoil(answer, rng)
        assert words_of(spoilt)
        loss.append(1 - true_reward(prompt, spoilt, WORLD))
    assert 0.15 < np.mean(loss) < 0.6


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


def test_utility_is_truth_plus_tastes_plus_noise():
    answers = ["Cat, dog and fox.", "Cat, dog and fox. What a lovely day it is."]  # 1 and 1 − 6 · 0.04
    prompt, rng = "List three animals.\n", generator(0, "test")
    fair = Labeler("fair", length_taste=0.0, charm_taste=0.0, noise=0.0)
    assert utilities(fair, prompt, answers, TINY, rng) == pytest.approx([1, 0.76])
    charmed = Labeler("charmed", length_taste=0.02, charm_taste=0.3, noise=0.0)
    assert utilities(charmed, prompt, answers, TINY, rng) == pytest.approx([1.08, 0.76 + 10 * 0.02 + 0.3])
    noisy = Labeler("noisy", length_taste=0.0, charm_taste=0.0, noise=0.5)
    drawn = np.array([utilities(noisy, prompt, answers, TINY, rng) for _ in range(2000)])
    np.testing.assert_allclose(drawn.mean(0), [1, 0.76], atol=0.05)
    np.testing.assert_allclose(drawn.std(0), 0.5, atol=0.05)


def test_labelers_agree_and_like_length_more_than_truth_does():
    rng = generator(0, "test")
    crew = draw_labelers(0, 12)
    same, right, longer_truly, longer_liked = [], [], [], []
    for prompt in SOME_PROMPTS:
        answers = draw_answers(prompt, 6, WORLD, rng)
        truth = [true_reward(prompt, answer, WORLD) for answer in answers]
        a, b = (ranks_of(utilities(crew[i], prompt, answers, WORLD, rng)) for i in rng.permutation(len(crew))[:2])
        for i, j in itertools.combinations(range(len(answers)), 2):
            if a[i] != a[j]:
                same += [(a[i] < a[j]) == (b[i] < b[j])] if b[i] != b[j] else []
                if truth[i] != truth[j]:
                    longer = len(answers[i]) > len(answers[j])
                    right.append((a[i] < a[j]) == (truth[i] > truth[j]))
                    longer_truly.append(longer == (truth[i] > truth[j]))
                    longer_liked.append(longer == (a[i] < a[j]))
    # More than the paper's labelers, 72.6 ± 1.5% (section 3.4): a small reward model must learn from few comparisons.
    assert 0.80 < np.mean(same) < 0.90
    assert 0.80 < np.mean(right) < 0.92
    assert np.mean(longer_liked) > np.mean(longer_truly) + 0.03


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
    }
    assert {path.name for path in written.iterdir()} == {f"{name}.jsonl.gz" for name in fields}
    for (name, expected), count in zip(fields.items(), (40, 60, 50, 400), strict=True):
        records = _read(written / f"{name}.jsonl.gz")
        assert len(records) == len({record["id"] for record in records}) == count
        assert all(set(record) == expected for record in records)


def test_comparisons_rank_four_to_nine_different_answers(written):
    records = _read(written / "comparisons.jsonl.gz")
    assert {len(record["completions"]) for record in records} == {4, 5, 6, 7, 8, 9}
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


def test_same_seed_same_bytes_other_seed_other_bytes(written, tmp_path):
    write.write_world(tmp_path / "again", seed=0, sizes=SIZES)
    write.write_world(tmp_path / "other", seed=1, sizes=SIZES)
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()
        assert path.read_bytes()[4:8] == bytes(4)  # no time in the gzip header


def test_bad_requests_write_nothing(written, tmp_path):
    cases = (
        (written, SIZES, "exists already"),
        (tmp_path / "new", write.Sizes(0, 1, 1, 1), "documents = 0, must be at least 1"),
        (tmp_path / "new", write.Sizes(1, 1, 1, 99999), r"prompts = 99999, must be at most 2\d\d\d"),
    )
    for directory, sizes, message in cases:
        with pytest.raises(ValueError, match=message):
            write.write_world(directory, seed=0, sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write, "demonstrate", fail)
    with pytest.raises(OSError, match="disk full"):
        write.write_world(tmp_path / "new", seed=0, sizes=SIZES)
    assert not list(tmp_path.iterdir())
