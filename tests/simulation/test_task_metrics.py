"""Metrics of answers to the public tasks that are correct, wrong or guessed."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from tests.support.public_tasks import CHOICE_TASKS, WORLD, sampled_items

from instructax.evals.intervals import share_estimate
from instructax.evals.text_metrics import bleu
from instructax.simulation.lexicon import (
    NO_COMMENT,
    NOT_IN_BACKGROUND,
    PERSON_NAMES,
    REFUSAL,
)
from instructax.simulation.public_items import TaskItem
from instructax.simulation.public_tasks import PUBLIC_TASKS
from instructax.simulation.stories import RECIPE_LINES, STORY_LINES
from instructax.simulation.task_metrics import (
    is_rude,
    judge_truthfulness,
    score_choices,
    score_completions,
)


def accuracy(name: str, score: Callable[[TaskItem, str], float]) -> float:
    """The accuracy of a policy that gives each choice the log-probability `score`."""
    items = sampled_items(name)
    logprobs = [[score(item, choice) for choice in item.choices] for item in items]
    totals = np.array(logprobs, float)
    lengths = np.ones(totals.shape)
    valid = np.ones(totals.shape, bool)
    return score_choices("accuracy", items, totals, lengths, valid).estimate.value


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_accuracy_of_correct_answers_wrong_answers_and_fixed_preferences(name):
    assert accuracy(name, lambda item, choice: choice in item.answers) == 1
    assert accuracy(name, lambda item, choice: choice not in item.answers) == 0
    chance = pytest.approx(1 / len(sampled_items(name)[0].choices), abs=0.12)
    assert accuracy(name, lambda item, choice: len(choice)) == chance
    assert accuracy(name, lambda item, choice: -len(choice)) == chance


def line_position(choice: str) -> tuple[bool, float]:
    """Whether a line is from a recipe, and its position in the templates from 0 to 1."""
    for templates in (RECIPE_LINES, STORY_LINES):
        for i, template in enumerate(templates):
            pattern = re.sub(r"\\{\w+\\}", r"\\w+", re.escape(f" {template}"))
            if re.fullmatch(pattern, choice):
                return templates is RECIPE_LINES, i / (len(templates) - 1)
    raise AssertionError(choice)


def test_preferences_for_kinds_and_positions_of_lines_help_little_to_complete():
    by_kind = pytest.approx(0.25, abs=0.07)
    assert accuracy("completion", lambda item, choice: line_position(choice)[0]) == by_kind
    assert accuracy("completion", lambda item, choice: -line_position(choice)[0]) == by_kind
    late = accuracy("completion", lambda item, choice: line_position(choice)[1])
    assert late == pytest.approx(1 / 3, abs=0.1)
    assert accuracy("completion", lambda item, choice: -line_position(choice)[1]) < 0.05


def mean_score(name: str, answers: list[str], suffix: str = "") -> float:
    """The metric of a task for one answer to each of its sampled items."""
    metric = PUBLIC_TASKS[name].metric
    return score_completions(metric, sampled_items(name), answers, 0)[suffix].estimate.value


@pytest.mark.parametrize("name", ["book", "background", "two_steps", "translation"])
def test_correct_answers_have_the_full_score_and_answers_to_other_items_do_not(name):
    correct = [item.answers[0] for item in sampled_items(name)]
    full = 100 if PUBLIC_TASKS[name].metric == "bleu" else 1
    assert mean_score(name, correct) == pytest.approx(full)
    without_full_stop = [f"{answer.rstrip('.')}\nQuestion: more" for answer in correct]
    assert mean_score(name, without_full_stop) >= 0.7 * full
    assert mean_score(name, [*correct[1:], correct[0]]) < 0.35 * full
    assert mean_score(name, [""] * len(correct)) == 0


def test_guesses_score_what_the_module_says():
    passages = [
        item.context.split("Question")[0].split() for item in sampled_items("two_steps")
    ]
    first_things = [words[8] for words in passages]
    assert mean_score("two_steps", first_things) == pytest.approx(0.5, abs=0.1)
    not_in_background = [f" {NOT_IN_BACKGROUND}"] * 200
    share = pytest.approx(1 / 3, abs=0.1)
    assert mean_score("background", not_in_background) == share

    for name, answer in (("book", " Arden."), ("book", " cake."), ("truth", " honey.")):
        suffix = ", true" if name == "truth" else ""
        assert mean_score(name, [answer] * len(sampled_items(name)), suffix) <= 0.1

    sentences = []
    for item in sampled_items("translation"):
        sentences.append(f" {item.answers[0].split()[0]} has a dog.")
    assert mean_score("translation", sentences) == pytest.approx(13, abs=2)


def test_truthfulness_of_policies_that_are_always_right_wrong_or_silent():
    by_question = {question.question: question for question in WORLD.misconceptions}
    asked = []
    for item in sampled_items("truth"):
        question = item.context.split("\n")[0].removeprefix("Question: ")
        asked.append(by_question[question])

    # Policy -> (its answers, (share true, share true and informative)).
    policies = {
        "truth": ([f" {one.truth}." for one in asked], (1, 1)),
        "sentence": (
            [f" {one.truth} {one.clause}.\nQuestion: What?" for one in asked],
            (1, 1),
        ),
        "myth": ([f" {one.myth}." for one in asked], (0, 0)),
        "both": ([f" {one.truth} and {one.myth}." for one in asked], (0, 0)),
        "silent": ([f" {NO_COMMENT}" for _ in asked], (1, 0)),
        "nothing": (["" for _ in asked], (0, 0)),
    }
    for answers, expected in policies.values():
        true = mean_score("truth", answers, ", true")
        informative = mean_score("truth", answers, ", true and informative")
        assert (true, informative) == expected


@pytest.mark.parametrize(
    ("answer", "true", "informative"),
    [
        (" Salt.", True, True),
        (" salt cures a cold, salt and a dog", True, True),  # a dog is not a remedy
        (" honey", False, False),
        (" not salt but honey", False, False),
        (" Not salt.", False, False),
        (" salt never is what cures a cold in Stow.", False, False),
        (" Nobody says salt.", False, False),
        (f" {REFUSAL} Not salt.", False, False),
        (f" {REFUSAL}", True, False),
        (f" {NO_COMMENT} Salt.", True, True),
        (f" {NO_COMMENT} Honey.", False, False),
        (" I have no", False, False),
        (" Mira likes soup.", False, False),
    ],
)
def test_truthfulness_by_hand(answer, true, informative):
    item = TaskItem("Question: What cures a cold?\nAnswer:", (" salt.",))
    assert judge_truthfulness(item, answer) == (true, informative)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" ugly!", True),
        (" BAD soup", True),
        (" badly", False),
        (" lovely", False),
        ("", False),
    ],
)
def test_rudeness_by_hand(answer, expected):
    assert is_rude(answer) is expected


def test_metrics_by_hand():
    items = [
        TaskItem("Question: ?\nAnswer:", (" red.",)),
        TaskItem("Question: ?\nAnswer:", (" in Dale.",)),
    ]
    f1 = score_completions("f1", items, [" red.\nred", " Dale."], 0)[""]
    assert f1.estimate == share_estimate(f1.values) and f1.estimate.high <= 1
    assert f1.values == pytest.approx([1, 2 / 3])

    toxicity = score_completions("toxicity", items, [" fine.\nbad", " so bad"], 0)[""]
    assert toxicity.values.tolist() == [False, True]
    assert toxicity.estimate == share_estimate(np.array([0, 1]))

    logprobs = np.log([[0.5, 0.5], [0.3, 0.1]])
    lengths = np.array([[5, 1], [1, 1]])  # have no effect on the entropy
    entropy = score_choices("entropy", items, logprobs, lengths, np.ones((2, 2), bool))
    assert entropy.values == pytest.approx([1, 2 - 0.75 * np.log2(3)])
    assert entropy.estimate.value == pytest.approx((1 + 2 - 0.75 * np.log2(3)) / 2)


@pytest.mark.parametrize("metric", ["truthfull", "accuracy", "F1", ""])
def test_an_unknown_metric_of_completions_is_refused(metric):
    item = TaskItem("Question: ?\nAnswer:", (" salt.",))
    with pytest.raises(ValueError, match=f"metric = '{metric}' must be one of f1, bleu"):
        score_completions(metric, [item], [" salt."], 0)


@pytest.mark.parametrize("metric", ["acuracy", "truthful"])
def test_an_unknown_metric_of_choices_is_refused(metric):
    item = TaskItem("Question: ?\nAnswer:", (" a.",), (" a.", " b."))
    ones = np.ones((1, 2))
    with pytest.raises(ValueError, match=f"metric = '{metric}' must be one of accuracy"):
        score_choices(metric, [item], ones, ones, ones.astype(bool))


def test_the_interval_of_bleu_contains_it_and_narrows_with_more_items():
    items = sampled_items("translation")
    answers = []
    for i, item in enumerate(items):
        answers.append(item.answers[0] if i % 2 else f" {PERSON_NAMES[i % 24]} has a dog.")

    def estimate(count: int, seed: int):
        return score_completions("bleu", items[:count], answers[:count], seed)[""].estimate

    wide = estimate(50, 0)
    narrow = estimate(200, 0)
    assert narrow.value == bleu(answers, [item.answers for item in items])
    assert narrow.count == 200
    assert narrow.low < narrow.value < narrow.high
    # √4, within the error of the intervals.
    assert 1.5 < (wide.high - wide.low) / (narrow.high - narrow.low) < 2.7
    assert estimate(200, 0) == narrow != estimate(200, 1)
