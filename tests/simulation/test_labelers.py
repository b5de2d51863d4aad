"""The people of the embedded world: how writers write, and how labelers like, rank and
agree."""

import dataclasses

import numpy as np
import pytest
from tests.support.small_world import TASKS, drawn

from instructax.report.agreement import LABELER_PAIRS, measure_agreement
from instructax.report.judging import HELD_OUT_GROUP, TRAINING_GROUP
from instructax.simulation import labelers
from instructax.simulation.judge import judge
from instructax.simulation.labelers import (
    Labeler,
    demonstrate,
    draw_labelers,
    draw_responses,
    ranks_of,
)
from instructax.simulation.lexicon import REFUSAL, generator


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
    responses = [
        "Cat, dog and fox.",
        "Cat, dog and fox. What a lovely day it is.",
    ]  # 1 and 1 − 6 · 0.04
    task, rng = TASKS["list"], generator(0, "test")
    fair = Labeler(
        "fair", length_taste=0.0, charm_taste=0.0, caution=0.5, noise=0.0, care=1.0
    )
    assert [fair.opinion(task, text, rng) for text in responses] == pytest.approx([1, 0.76])
    assert [
        fair.opinion(TASKS["insult"], text, rng)
        for text in ("Mira's dog is ugly.", REFUSAL)
    ] == pytest.approx([0.0, 0.45])
    charmed = dataclasses.replace(fair, length_taste=0.02, charm_taste=0.3)
    assert [charmed.opinion(task, text, rng) for text in responses] == pytest.approx(
        [1.08, 0.76 + 10 * 0.02 + 0.3]
    )
    noisy = dataclasses.replace(fair, noise=0.5)
    liked = np.array([noisy.opinion(task, responses[0], rng) for _ in range(2000)])
    assert liked.mean() == pytest.approx(1, abs=0.05) and liked.std() == pytest.approx(
        0.5, abs=0.05
    )
    careless = dataclasses.replace(fair, care=0.75)
    seen = [careless.flags(judge(task, responses[0]), rng)["attempts"] for _ in range(2000)]
    assert np.mean(seen) == pytest.approx(0.75, abs=0.04)


def agreements(crews: dict[str, list[Labeler]], seed: int) -> list[float]:
    """Of each of LABELER_PAIRS the share of pairs of responses by writers that two labelers
    order alike."""
    rng = generator(seed, "agreement")
    asked = [
        (task, draw_responses(task, int(rng.integers(4, 10)), rng))
        for task in drawn(700, seed)
    ]
    found = measure_agreement(asked, crews, rng)
    return [found[name].share.value for name in LABELER_PAIRS]


def test_labelers_agree_as_the_papers_do():
    """Section 3.4: 72.6 ± 1.5 % among training labelers, 77.3 ± 1.3 % among held-out ones."""
    crews = [
        {
            group: draw_labelers(seed, group, 12)
            for group in (TRAINING_GROUP, HELD_OUT_GROUP)
        }
        for seed in range(4)
    ]
    training, held_out, _ = np.mean(
        [agreements(crew, seed) for seed, crew in enumerate(crews)], axis=0
    )
    assert abs(training - 0.726) < 0.015, training
    assert abs(held_out - 0.773) < 0.013, held_out
    quiet = {
        group: [dataclasses.replace(labeler, noise=0.0) for labeler in crew]
        for group, crew in crews[0].items()
    }
    assert agreements(quiet, 0)[0] > 0.85


def test_held_out_labelers_are_more_cautious_and_less_charmed():
    ours, theirs = (draw_labelers(0, group, 40) for group in ("labeler", "held-out"))

    def mean(crew: list[Labeler], name: str) -> float:
        return float(np.mean([getattr(labeler, name) for labeler in crew]))

    assert mean(theirs, "caution") > mean(ours, "caution") + 0.3
    assert mean(theirs, "length_taste") < mean(ours, "length_taste")
