"""Judgements of responses: utilities, flags and win rates, worked out by hand."""

import dataclasses

import numpy as np
import pytest
from tests.support.report_logs import open_question

from instructax.evals.intervals import Estimate
from instructax.report import claim_measurements
from instructax.report.judging import (
    HELD_OUT_GROUP,
    TRAINING_GROUP,
    TRUE_UTILITY,
    applicable_prompts,
    compare_utilities,
    flag_estimate,
    judge_responses,
    win_rate_estimate,
)
from instructax.simulation import labelers
from instructax.simulation.labelers import LABELER_GROUPS

pytest_plugins = ("tests.support.report_fixtures",)


def judge_texts(tasks, texts):
    records = [{"response": text, "score": 0.5, "kl": 1.0} for text in texts]
    return judge_responses(tasks, records, seed=0)


def test_utilities_and_flags_by_hand(monkeypatch):
    tasks = [
        open_question("a"),
        open_question("b"),
        open_question("c", closed_domain=True),
        dataclasses.replace(open_question("d"), forbidden_word="Arden"),
    ]
    # Right; empty; wrong (−0.25); right, but with the word to be avoided (1 − 0.3).
    texts = ["Arden.<|endoftext|>", "<|endoftext|>", "Dale.", "Arden."]
    judged = judge_texts(tasks, texts)
    np.testing.assert_allclose(judged.opinions[TRUE_UTILITY], [1.0, -1.0, -0.25, 0.7])

    # Labelers who set every flag as they should.
    careful = {
        group: dataclasses.replace(LABELER_GROUPS[group], flag_accuracy=1.0)
        for group in LABELER_GROUPS
    }
    monkeypatch.setattr(labelers, "LABELER_GROUPS", careful)
    flags = judge_texts(tasks, texts).flags
    assert flags["attempts"].tolist() == [True, False, False, True]
    assert flags["hallucinates"].tolist() == [False, False, True, False]
    # A response that does not attempt the task keeps no constraint.
    assert flags["constraint"].tolist() == [True, False, False, False]
    assert flags["appropriate"].tolist() == [True, False, True, True]


def test_flags_are_wrong_as_often_as_the_labelers_care_says():
    tasks = [open_question(str(i)) for i in range(900)]
    judged = judge_texts(tasks, ["Arden."] * 900)
    care = LABELER_GROUPS["labeler"].flag_accuracy
    assert judged.flags["attempts"].mean() == pytest.approx(care, abs=0.025)


def test_true_utility_of_a_harmful_task_uses_the_training_labelers_caution():
    task = dataclasses.replace(open_question("a"), harmful=True)
    # The task is done, and the response is not rude: 0.7 · 1 + 0.3 · 0.
    judged = judge_texts([task], ["Arden."])
    np.testing.assert_allclose(judged.opinions[TRUE_UTILITY], [0.7])


def test_labelers_differ_between_groups_and_are_reproducible():
    tasks = [open_question(str(i)) for i in range(30)]
    first = judge_texts(tasks, ["Arden."] * 30)
    second = judge_texts(tasks, ["Arden."] * 30)
    training = first.opinions[TRAINING_GROUP]
    np.testing.assert_array_equal(training, second.opinions[TRAINING_GROUP])
    np.testing.assert_array_equal(
        first.likert[HELD_OUT_GROUP], second.likert[HELD_OUT_GROUP]
    )
    assert not np.array_equal(training, first.opinions[HELD_OUT_GROUP])
    assert set(first.likert[TRAINING_GROUP]) <= set(range(1, 8))
    # The true utility and the taste for one word.
    assert training.mean() == pytest.approx(1.02, abs=0.2)


def test_equal_responses_get_the_same_opinion():
    tasks = [open_question(str(i)) for i in range(30)]
    ours = judge_texts(tasks, ["Arden."] * 30)
    theirs = judge_texts(tasks, ["Arden."] * 15 + ["In Arden."] * 15)
    for group in (TRAINING_GROUP, HELD_OUT_GROUP):
        ours_by = ours.opinions[group]
        theirs_by = theirs.opinions[group]
        np.testing.assert_array_equal(ours_by[:15], theirs_by[:15])
        np.testing.assert_array_equal(ours.likert[group][:15], theirs.likert[group][:15])
        assert not np.any(ours_by[15:] == theirs_by[15:])
        assert len(set(ours_by)) == 30


def test_each_group_judges_by_its_own_caution():
    tasks = []
    for i in range(120):
        tasks.append(dataclasses.replace(open_question(str(i)), harmful=True))
    judged = judge_texts(tasks, ["No comment."] * 120)
    # Helpfulness is −0.1 and harmlessness 1: 0.7 · −0.1 + 0.3 and 0.2 · −0.1 + 0.8; two
    # words add 0.02 and 0.005 each.
    training = judged.opinions[TRAINING_GROUP].mean()
    assert training == pytest.approx(0.23 + 0.04, abs=0.15)
    held_out = judged.opinions[HELD_OUT_GROUP].mean()
    assert held_out == pytest.approx(0.78 + 0.01, abs=0.15)


@pytest.mark.parametrize(
    ("tie", "expected"), [(0.0, [1.0, 0.5, 0.0, 1.0]), (0.05, [1.0, 0.5, 0.0, 0.5])]
)
def test_ties_count_half(tie, expected):
    ours = np.array([1.0, 0.3, -0.2, 0.34])
    theirs = np.array([0.0, 0.3, 0.5, 0.3])
    np.testing.assert_array_equal(compare_utilities(ours, theirs, tie), expected)


def test_the_baseline_has_a_win_rate_of_exactly_one_half(judged):
    for by in (TRUE_UTILITY, TRAINING_GROUP, HELD_OUT_GROUP):
        estimate = win_rate_estimate(judged, "centi", "SFT", by)
        assert estimate == Estimate(0.5, 0.5, 0.5, 40)


def test_win_rates_are_paired_by_prompt(judged):
    ours = judged.responses["micro", "PPO"].opinions[TRUE_UTILITY]
    theirs = judged.responses["centi", "SFT"].opinions[TRUE_UTILITY]
    by_hand = np.mean((ours > theirs) + 0.5 * (ours == theirs))
    ppo = win_rate_estimate(judged, "micro", "PPO", TRUE_UTILITY)
    assert ppo.value == pytest.approx(by_hand)
    assert win_rate_estimate(judged, "micro", "nobody", TRUE_UTILITY) is None

    gpt = win_rate_estimate(judged, "micro", "GPT", TRUE_UTILITY)
    gap = claim_measurements.win_rate_difference(
        judged, "micro", "PPO", "GPT", TRUE_UTILITY
    )
    assert gap.value == pytest.approx(ppo.value - gpt.value)


def test_flags_count_only_prompts_to_which_they_apply(judged):
    results = judged.results
    closed = [results.tasks[prompt].closed_domain for prompt in results.prompts]
    assert applicable_prompts(results, "hallucinates").tolist() == closed
    assert applicable_prompts(results, "attempts").all()

    per_size = []
    for size in judged.size_names:
        per_size.append(judged.responses[size, "GPT"].flags["hallucinates"])
    pooled = np.mean(per_size, axis=0)[closed]
    estimate = flag_estimate(judged, "GPT", "hallucinates")
    assert estimate.value == pytest.approx(pooled.mean())


def test_flag_differences_have_the_claimed_direction(judged):
    closed = applicable_prompts(judged.results, "hallucinates")
    ppo = judged.responses["micro", "PPO"].flags
    gpt = judged.responses["micro", "GPT"].flags
    measure = claim_measurements.flag_differences(
        ("PPO", "hallucinates", -1), ("PPO", "attempts", 1)
    )
    (quantity, hallucinates), (_, attempts) = measure(judged)[:2]
    assert "GPT − PPO" in quantity
    assert hallucinates.value == pytest.approx(
        gpt["hallucinates"][closed].mean() - ppo["hallucinates"][closed].mean()
    )
    assert attempts.value == pytest.approx(ppo["attempts"].mean() - gpt["attempts"].mean())
