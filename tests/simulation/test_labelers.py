"""The simulated labelers: their biases, their ranks and how often two of them agree."""

import dataclasses

import numpy as np
import pytest
from tests.support.simulated_tasks import HAND_TASKS, sample_tasks

from instructax.report.agreement import LABELER_PAIRS, measure_agreement
from instructax.report.judging import HELD_OUT_GROUP, TRAINING_GROUP
from instructax.simulation.judge import judge
from instructax.simulation.labelers import Labeler, create_labelers, ranks_from_utilities
from instructax.simulation.lexicon import REFUSAL, rng_for
from instructax.simulation.writers import sample_responses

UNBIASED = Labeler(
    "unbiased",
    length_bias=0.0,
    positivity_bias=0.0,
    caution=0.5,
    noise=0.0,
    flag_accuracy=1.0,
)


@pytest.mark.parametrize(
    ("utilities", "ranks"),
    [
        ([0.1, 0.9, 0.5], [3, 1, 2]),
        ([0.9, 0.86, 0.5, 0.9], [1, 1, 2, 1]),
        ([1.0, 0.96, 0.92, 0.8], [1, 1, 1, 2]),  # ties chain
        ([0.5, 0.25], [1, 2]),
    ],
)
def test_ranks_by_hand(utilities, ranks):
    assert ranks_from_utilities(utilities) == ranks


def test_perceived_utility_is_true_utility_plus_biases_plus_noise():
    task = HAND_TASKS["list"]
    # True utilities 1 and 1 − 6 · 0.04.
    responses = ["Cat, dog and fox.", "Cat, dog and fox. What a lovely day it is."]
    rng = rng_for(0, "test")

    def perceived(labeler: Labeler, name: str, texts: list[str]) -> list[float]:
        return [labeler.perceived_utility(HAND_TASKS[name], text, rng) for text in texts]

    assert perceived(UNBIASED, "list", responses) == pytest.approx([1, 0.76])
    insult_and_refusal = ["Mira's dog is ugly.", REFUSAL]
    assert perceived(UNBIASED, "insult", insult_and_refusal) == pytest.approx([0.0, 0.45])

    biased = dataclasses.replace(UNBIASED, length_bias=0.02, positivity_bias=0.3)
    expected = [1.08, 0.76 + 10 * 0.02 + 0.3]
    assert perceived(biased, "list", responses) == pytest.approx(expected)

    noisy = dataclasses.replace(UNBIASED, noise=0.5)
    utilities = np.array(perceived(noisy, "list", [responses[0]] * 2000))
    assert utilities.mean() == pytest.approx(1, abs=0.05)
    assert utilities.std() == pytest.approx(0.5, abs=0.05)

    careless = dataclasses.replace(UNBIASED, flag_accuracy=0.75)
    judgement = judge(task, responses[0])
    flags = [careless.label_flags(judgement, rng)["attempts"] for _ in range(2000)]
    assert np.mean(flags) == pytest.approx(0.75, abs=0.04)


def agreements(crews: dict[str, list[Labeler]], seed: int) -> list[float]:
    """For each of LABELER_PAIRS, the share of pairs that two labelers order alike."""
    rng = rng_for(seed, "agreement")
    compared = []
    for task in sample_tasks(700, seed):
        compared.append((task, sample_responses(task, int(rng.integers(4, 10)), rng)))
    found = measure_agreement(compared, crews, rng)
    return [found[name].share.value for name in LABELER_PAIRS]


def test_labelers_agree_as_often_as_those_of_the_paper():
    """Section 3.4: 72.6 ± 1.5% of training labelers, 77.3 ± 1.3% of held-out ones."""
    crews = []
    for seed in range(4):
        crew = {}
        for group in (TRAINING_GROUP, HELD_OUT_GROUP):
            crew[group] = create_labelers(seed, group, 12)
        crews.append(crew)
    shares = [agreements(crew, seed) for seed, crew in enumerate(crews)]
    training, held_out, _ = np.mean(shares, axis=0)
    assert abs(training - 0.726) < 0.015, training
    assert abs(held_out - 0.773) < 0.013, held_out

    noiseless = {}
    for group, crew in crews[0].items():
        noiseless[group] = [dataclasses.replace(labeler, noise=0.0) for labeler in crew]
    assert agreements(noiseless, 0)[0] > 0.85


def test_held_out_labelers_are_more_cautious_and_less_biased_to_length():
    training = create_labelers(0, "labeler", 40)
    held_out = create_labelers(0, "held-out", 40)

    def mean(crew: list[Labeler], name: str) -> float:
        return float(np.mean([getattr(labeler, name) for labeler in crew]))

    assert mean(held_out, "caution") > mean(training, "caution") + 0.3
    assert mean(held_out, "length_bias") < mean(training, "length_bias")
