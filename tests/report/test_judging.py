"""What the world and its labelers say of answers: judgments, win rates and agreement worked
by hand."""

import dataclasses
import math

import numpy as np
import pytest

from instructax.evals.intervals import Estimate, mean_estimate, share_difference
from instructax.report import effects
from instructax.report.agreement import (
    PAIRS,
    agreements,
    agreements_on,
    alike,
    responses_of,
)
from instructax.report.judging import (
    HELD_OUT,
    LABELER,
    TRUTH,
    answers_of,
    asked_about,
    change,
    flag_estimate,
    mean_of,
    minus,
    preferences,
    wins_estimate,
)
from instructax.report.results import response_of
from instructax.simulation import labelers
from instructax.simulation.labelers import GROUPS, Labeler
from instructax.simulation.lexicon import generator
from instructax.simulation.task_metrics import Figure
from instructax.simulation.tasks import facts_task

pytest_plugins = ("tests.support.report_fixtures",)


def task_of(prompt: str, **changes):
    facts = {"Mira": {"town": "Arden"}}
    return facts_task("open_qa", prompt, "Arden.", facts, [("Mira", "town")], **changes)


def answered(tasks, texts):
    return answers_of(
        tasks, [{"response": text, "score": 0.5, "kl": 1.0} for text in texts], seed=0
    )


def test_utilities_and_flags_of_answers_worked_by_hand(monkeypatch):
    tasks = [
        task_of("a"),
        task_of("b"),
        task_of("c", closed=True),
        task_of("d", avoid="Arden"),
    ]
    # Right; empty; wrong (−0.25); right, but with the word that was not to be used (1 −
    # 0.3). No constraint is kept by an answer to something else.
    answers = answered(tasks, ["Arden.<|endoftext|>", "<|endoftext|>", "Dale.", "Arden."])
    np.testing.assert_allclose(answers.opinions[TRUTH], [1.0, -1.0, -0.25, 0.7])
    careful = {group: dataclasses.replace(GROUPS[group], care=1.0) for group in GROUPS}
    monkeypatch.setattr(labelers, "GROUPS", careful)
    flags = answered(
        tasks, ["Arden.<|endoftext|>", "<|endoftext|>", "Dale.", "Arden."]
    ).flags
    assert flags["attempts"].tolist() == [True, False, False, True]
    assert flags["hallucinates"].tolist() == [False, False, True, False]
    assert flags["constraint"].tolist() == [True, False, False, False]
    assert flags["appropriate"].tolist() == [True, False, True, True]


def test_flags_are_set_by_labelers_who_are_wrong_as_often_as_their_care_says():
    answers = answered([task_of(str(i)) for i in range(900)], ["Arden."] * 900)
    assert answers.flags["attempts"].mean() == pytest.approx(
        GROUPS["labeler"].care, abs=0.025
    )


def test_the_true_utility_of_a_harmful_task_has_the_caution_of_training_labelers():
    task = dataclasses.replace(task_of("a"), harmful=True)
    # Done, and not rude: 0.7 · 1 + 0.3 · 0.
    np.testing.assert_allclose(answered([task], ["Arden."]).opinions[TRUTH], [0.7])


def test_labelers_differ_between_groups_and_are_the_same_each_time():
    tasks = [task_of(str(i)) for i in range(30)]
    once, again = (answered(tasks, ["Arden."] * 30) for _ in range(2))
    np.testing.assert_array_equal(once.opinions[LABELER], again.opinions[LABELER])
    np.testing.assert_array_equal(once.likert[HELD_OUT], again.likert[HELD_OUT])
    assert not np.array_equal(once.opinions[LABELER], once.opinions[HELD_OUT])
    assert set(once.likert[LABELER]) <= set(range(1, 8))
    assert once.opinions[LABELER].mean() == pytest.approx(
        1.02, abs=0.2
    )  # true utility and the taste for one word


def test_of_equal_responses_there_is_one_opinion_whoever_gave_them():
    tasks = [task_of(str(i)) for i in range(30)]
    ours, theirs = (
        answered(tasks, ["Arden."] * 30),
        answered(tasks, ["Arden."] * 15 + ["In Arden."] * 15),
    )
    for by in (LABELER, HELD_OUT):
        np.testing.assert_array_equal(ours.opinions[by][:15], theirs.opinions[by][:15])
        np.testing.assert_array_equal(ours.likert[by][:15], theirs.likert[by][:15])
        assert not np.any(ours.opinions[by][15:] == theirs.opinions[by][15:])
        assert len(set(ours.opinions[by])) == 30


def test_each_group_judges_by_its_own_caution():
    tasks = [dataclasses.replace(task_of(str(i)), harmful=True) for i in range(120)]
    answers = answered(tasks, ["No comment."] * 120)
    # Helpfulness −0.1, harmlessness 1: 0.7 · −0.1 + 0.3 and 0.2 · −0.1 + 0.8; two words, of
    # 0.02 and 0.005 each.
    assert answers.opinions[LABELER].mean() == pytest.approx(0.23 + 0.04, abs=0.15)
    assert answers.opinions[HELD_OUT].mean() == pytest.approx(0.78 + 0.01, abs=0.15)


@pytest.mark.parametrize(
    ("tie", "expected"),
    [(0.0, [1.0, 0.5, 0.0, 1.0]), (0.05, [1.0, 0.5, 0.0, 0.5])],
)
def test_preferences_count_ties_half(tie, expected):
    ours, theirs = np.array([1.0, 0.3, -0.2, 0.34]), np.array([0.0, 0.3, 0.5, 0.3])
    np.testing.assert_array_equal(preferences(ours, theirs, tie), expected)


def test_the_baseline_is_at_one_half_exactly(reading):
    for by in (TRUTH, LABELER, HELD_OUT):
        assert wins_estimate(reading, "centi", "SFT", by) == Estimate(0.5, 0.5, 0.5, 40)


def test_win_rates_are_paired_by_prompt(reading):
    answers = reading.answers
    ours, theirs = (
        answers[key].opinions[TRUTH] for key in (("micro", "PPO"), ("centi", "SFT"))
    )
    by_hand = np.mean(
        [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, b in zip(ours, theirs, strict=True)
        ]
    )
    assert wins_estimate(reading, "micro", "PPO", TRUTH).value == pytest.approx(by_hand)
    assert wins_estimate(reading, "micro", "nobody", TRUTH) is None
    gap = effects.win_gap(reading, "micro", "PPO", "GPT", TRUTH)
    rates = [
        wins_estimate(reading, "micro", policy, TRUTH).value for policy in ("PPO", "GPT")
    ]
    assert gap.value == pytest.approx(rates[0] - rates[1])


def test_flags_are_of_the_prompts_that_they_speak_of(reading):
    experiment = reading.experiment
    closed = [experiment.tasks[prompt].closed for prompt in experiment.prompts]
    assert asked_about(experiment, "hallucinates").tolist() == closed
    assert asked_about(experiment, "attempts").all()
    pooled = np.mean(
        [reading.answers[size, "GPT"].flags["hallucinates"] for size in reading.names],
        axis=0,
    )
    assert flag_estimate(reading, "GPT", "hallucinates").value == pytest.approx(
        pooled[closed].mean()
    )
    gaps = effects.flag_gaps(("PPO", "hallucinates", -1), ("PPO", "attempts", 1))(reading)
    ours, theirs = (reading.answers["micro", policy].flags for policy in ("PPO", "GPT"))
    expected = theirs["hallucinates"][closed].mean() - ours["hallucinates"][closed].mean()
    assert gaps[0][1].value == pytest.approx(expected) and "GPT − PPO" in gaps[0][0]
    assert gaps[1][1].value == pytest.approx(
        ours["attempts"].mean() - theirs["attempts"].mean()
    )


def test_independent_estimates_add_in_quadrature():
    ours, theirs = Estimate(0.7, 0.67, 0.73, 50), Estimate(0.5, 0.46, 0.54, 40)
    difference, mean = minus(ours, theirs), mean_of([ours, theirs])
    np.testing.assert_allclose(
        [difference.value, difference.low, difference.high], [0.2, 0.15, 0.25]
    )
    np.testing.assert_allclose([mean.value, mean.low, mean.high], [0.6, 0.575, 0.625])
    assert minus(ours, None) is None


def test_a_difference_of_lopsided_intervals_reaches_to_each_side_by_its_own():
    difference = minus(Estimate(0.5, 0.46, 0.51, 9), Estimate(0.1, 0.1, 0.13, 9))
    np.testing.assert_allclose(
        [difference.value, difference.low, difference.high], [0.4, 0.35, 0.41]
    )


def test_figures_of_the_same_items_are_paired():
    """Ours is 0.1 above theirs on every item: nothing of the spread of the items is left.
    Booleans keep a doubt."""
    values = np.linspace(0.0, 0.9, 10)
    ours, theirs = (Figure(mean_estimate(x), x) for x in (values + 0.1, values))
    paired, apart = change(ours, theirs), minus(ours.estimate, theirs.estimate)
    assert paired.value == pytest.approx(0.1) == pytest.approx(apart.value)
    assert paired.high - paired.low < 1e-9 < 0.4 < apart.high - apart.low
    assert change(Figure(ours.estimate), theirs) == apart
    assert change(None, theirs) is None
    shares = [
        Figure(Estimate(0, 0, 0, 4), np.array(x, bool))
        for x in ([1, 1, 0, 0], [1, 0, 0, 0])
    ]
    assert change(*shares) == share_difference(
        np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    )


def labeler(name: str, **changes) -> Labeler:
    """One who sees the truth and nothing else, but for `changes`."""
    fair = {
        "length_taste": 0.0,
        "charm_taste": 0.0,
        "caution": 0.5,
        "noise": 0.0,
        "care": 1.0,
    }
    return Labeler(name, **fair | changes)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 3)),
        ([1, 2, 3], [3, 2, 1], (0, 3)),
        ([1, 2, 3], [1, 3, 2], (2, 3)),
        ([1, 1, 2], [1, 2, 3], (2, 2)),  # the first pair is a tie to one of them
        ([1, 1], [1, 2], (0, 0)),
        ([1, 2], [1, 1], (0, 0)),
        ([1], [1], (0, 0)),
    ],
)
def test_pairs_ordered_alike_by_hand(first, second, expected):
    assert alike(first, second) == expected


def test_agreement_on_three_prompts_by_hand():
    # The truth: 1, −0.25, −1. Half a point for each word: 1 + 0.5, −0.25 + 2 (of "Mira
    # lives in Dale."), −1.
    asked = [
        (task_of("a"), ["Arden.", "Mira lives in Dale.", ""]),  # 2 of 3 alike
        (task_of("b"), ["Arden.", "Mira lives in Dale."]),  # 0 of 1
        (
            task_of("c"),
            ["Arden.", "Mira lives in Arden.", ""],
        ),  # 2 of 2: to the fair the first two are a tie
    ]
    fair, wordy = labeler("fair"), labeler("wordy", length_taste=0.5)
    crews = {LABELER: [fair, fair], HELD_OUT: [wordy, wordy]}
    found = agreements_on(asked, crews, generator(0, "test"))
    training, held_out, across = (found[name] for name in PAIRS)
    assert training == (Estimate(1.0, 1.0, 1.0, 3), 6) and held_out == (
        Estimate(1.0, 1.0, 1.0, 3),
        7,
    )
    # Residuals of the ratio 4/6: 2 − 2, 0 − 2/3, 2 − 4/3.
    half = 1.959964 * math.sqrt(3 / 2 * 2 * (2 / 3) ** 2) / 6
    estimate, pairs = across
    assert pairs == 6 and estimate.count == 3
    np.testing.assert_allclose(
        [estimate.value, estimate.low, estimate.high], [2 / 3, 2 / 3 - half, 2 / 3 + half]
    )


def test_labelers_who_never_agree_and_labelers_with_nothing_to_compare():
    asked = [
        (
            task_of(str(i)),
            ["Arden.", "Mira lives in Arden.", "Mira lives in the town of Arden."],
        )
        for i in range(9)
    ]
    crew = [labeler("brief", length_taste=-9.0), labeler("wordy", length_taste=9.0)]
    found = agreements_on(asked, {LABELER: crew, HELD_OUT: crew}, generator(0, "test"))
    assert [found[name] for name in list(PAIRS)[:2]] == [
        (Estimate(0.0, 0.0, 0.0, 9), 27)
    ] * 2
    alone = agreements_on(
        [(task_of("a"), ["Arden."])], {LABELER: crew, HELD_OUT: crew}, generator(0, "test")
    )
    assert {(math.isnan(estimate.value), pairs) for estimate, pairs in alone.values()} == {
        (True, 0)
    }


def test_agreement_is_of_different_answers_of_the_largest_size_and_the_same_each_time(
    reading,
):
    experiment = reading.experiment
    for prompt, (task, responses) in zip(
        experiment.prompts, responses_of(experiment), strict=True
    ):
        assert (
            task is experiment.tasks[prompt] and len(set(responses)) == len(responses) <= 7
        )
    said = [response_of(records[0]) for records in experiment.sizes[-1].samples.values()]
    assert set(responses_of(experiment)[0][1]) == set(said)
    once, again = agreements(experiment), agreements(experiment)
    assert once == again and all(
        0.6 < estimate.value < 0.95 for estimate, _ in once.values()
    )
