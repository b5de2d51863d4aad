"""Agreement between labelers, worked out by hand."""

import math

import numpy as np
import pytest
from tests.support.report_logs import open_question

from instructax.evals.intervals import Estimate
from instructax.report.agreement import (
    LABELER_PAIRS,
    Agreement,
    count_agreements,
    distinct_responses,
    labeler_agreement,
    measure_agreement,
)
from instructax.report.judging import HELD_OUT_GROUP, TRAINING_GROUP
from instructax.report.results import response_text
from instructax.simulation.labelers import Labeler
from instructax.simulation.lexicon import rng_for

pytest_plugins = ("tests.support.report_fixtures",)


def labeler(name: str, length_bias: float = 0.0) -> Labeler:
    """A labeler without noise who sees the true utility, plus a taste for length."""
    return Labeler(
        name,
        length_bias=length_bias,
        positivity_bias=0.0,
        caution=0.5,
        noise=0.0,
        flag_accuracy=1.0,
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 3)),
        ([1, 2, 3], [3, 2, 1], (0, 3)),
        ([1, 2, 3], [1, 3, 2], (2, 3)),
        ([1, 1, 2], [1, 2, 3], (2, 2)),  # the first pair is a tie in one ranking
        ([1, 1], [1, 2], (0, 0)),
        ([1, 2], [1, 1], (0, 0)),
        ([1], [1], (0, 0)),
    ],
)
def test_agreements_of_two_rankings_by_hand(first, second, expected):
    assert count_agreements(first, second) == expected


def test_agreement_on_three_prompts_by_hand():
    # True utilities are 1, −0.25 and −1. The wordy labeler adds half a point for each word:
    # 1 + 0.5, −0.25 + 2 (for "Mira lives in Dale.") and −1.
    responses = [
        # The two labelers order 2 of 3 pairs alike.
        (open_question("a"), ["Arden.", "Mira lives in Dale.", ""]),
        # 0 of 1.
        (open_question("b"), ["Arden.", "Mira lives in Dale."]),
        # 2 of 2: to the fair labeler the first two responses are a tie.
        (open_question("c"), ["Arden.", "Mira lives in Arden.", ""]),
    ]
    fair = labeler("fair")
    wordy = labeler("wordy", length_bias=0.5)
    labelers = {TRAINING_GROUP: [fair, fair], HELD_OUT_GROUP: [wordy, wordy]}
    agreements = measure_agreement(responses, labelers, rng_for(0, "test"))
    training, held_out, across = (agreements[name] for name in LABELER_PAIRS)
    assert training == Agreement(Estimate(1.0, 1.0, 1.0, 3), 6)
    assert held_out == Agreement(Estimate(1.0, 1.0, 1.0, 3), 7)

    # Residuals of the ratio 4/6: 2 − 2, 0 − 2/3, 2 − 4/3.
    half_width = 1.959964 * math.sqrt(3 / 2 * 2 * (2 / 3) ** 2) / 6
    assert across.pairs == 6
    assert across.share.count == 3
    np.testing.assert_allclose(
        [across.share.value, across.share.low, across.share.high],
        [2 / 3, 2 / 3 - half_width, 2 / 3 + half_width],
    )


def test_labelers_who_never_agree_and_labelers_with_nothing_to_compare():
    texts = ["Arden.", "Mira lives in Arden.", "Mira lives in the town of Arden."]
    responses = [(open_question(str(i)), texts) for i in range(9)]
    members = [labeler("brief", length_bias=-9.0), labeler("wordy", length_bias=9.0)]
    labelers = {TRAINING_GROUP: members, HELD_OUT_GROUP: members}
    agreements = measure_agreement(responses, labelers, rng_for(0, "test"))
    never = Agreement(Estimate(0.0, 0.0, 0.0, 9), 27)
    assert agreements["training labelers"] == never
    assert agreements["held-out labelers"] == never

    single = [(open_question("a"), ["Arden."])]
    agreements = measure_agreement(single, labelers, rng_for(0, "test"))
    for agreement in agreements.values():
        assert math.isnan(agreement.share.value)
        assert agreement.pairs == 0


def test_agreement_is_on_distinct_responses_of_the_largest_size(judged):
    results = judged.results
    all_responses = distinct_responses(results)
    for prompt, (task, responses) in zip(results.prompts, all_responses, strict=True):
        assert task is results.tasks[prompt]
        assert len(set(responses)) == len(responses) <= 7
    largest = results.sizes[-1].samples.values()
    assert set(all_responses[0][1]) == {response_text(records[0]) for records in largest}


def test_agreement_is_reproducible_and_plausible(judged):
    agreements = labeler_agreement(judged.results)
    assert agreements == labeler_agreement(judged.results)
    for agreement in agreements.values():
        assert 0.6 < agreement.share.value < 0.95
