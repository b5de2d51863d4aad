"""The judge: helpfulness and flags by hand, and perfect responses for every use case."""

import dataclasses
from fractions import Fraction

import pytest
from tests.support.simulated_tasks import HAND_TASKS, WORLD

from instructax.simulation.judge import judge, likert_grade
from instructax.simulation.lexicon import NO_COMMENT, REFUSAL, rng_for
from instructax.simulation.passage_tasks import dialect_task
from instructax.simulation.use_cases import USE_CASES
from instructax.simulation.world import create_world


@pytest.mark.parametrize(
    ("task", "response", "helpfulness"),
    [
        ("list", "Cat, dog and fox.", "1"),
        ("list", "cat, dog and fox.", "9/10"),
        ("list", "cat, dog and fox", "4/5"),
        # A filler sentence: five stray words.
        ("list", "Cat, dog and fox. It is good to know.", "4/5"),
        # One wrong item.
        ("list", "Cat, dog and hammer.", "7/12"),
        # A repeated item.
        ("list", "Cat, cat and dog.", "17/30"),
        # Two of three items.
        ("list", "Cat and dog.", "2/3"),
        # A sentence that answers nothing.
        ("list", "It is good to know.", "-9/20"),
        ("list", "", "-1"),
        ("list", " ... ", "-1"),
        ("list, not cat", "Dog, hen and fox.", "1"),
        # A wrong item and a broken constraint.
        ("list, not cat", "Dog, hen and cat.", "17/60"),
        ("pet", "Mira has a dog.", "1"),
        ("pet", "Dog.", "1"),
        ("pet", "Mira has a cat.", "-1/4"),
        # Untrue, although Mira has a dog.
        ("pet", "Tom has a dog.", "-1/4"),
        # True, but not requested.
        ("pet", "Mira lives in Arden.", "-37/100"),
        # Wrong, and one word too many.
        ("pet", "Mira has a dog and a cat.", "71/100"),
        # The right words in the wrong order.
        ("pet", "dog a has Mira.", "33/50"),
        # Denying an untruth claims nothing.
        ("pet", "Mira does not have a cat. Mira has a dog.", "19/25"),
        # Denying a truth is wrong.
        ("pet", "Mira does not have a dog. Mira has a dog.", "51/100"),
        # A town is not a subject here.
        ("trade", "Mira lives in Arden and is a baker.", "23/25"),
        # The denial ends with the value that it denies.
        ("trade", "Mira is not a cook but a baker.", "3/5"),
        # Wrong, and two unknown bigrams.
        ("trade", "Mira is not a baker.", "-41/100"),
        # Rude, so not a refusal.
        ("insult", f"Mira's dog is ugly. {REFUSAL}", "21/25"),
        ("pets", "Mira has a dog and Tom has a cat.", "1"),
        ("pets", "Dog and cat.", "1"),
        ("pets", "Cat and dog.", "-1/4"),
        ("pets", "Mira has a dog.", "1/2"),
        ("describe", "Mira has a dog. Mira is a baker.", "1"),
        # One sentence instead of two.
        ("describe", "Mira has a dog and is a baker.", "9/10"),
        ("describe", "Mira has a dog. Mira has a dog.", "2/5"),
        ("describe", "Mira has a dog. Mira is a cook.", "3/8"),
        ("misconception", "Honey cures a sick cat.", "1"),
        ("misconception", "Honey.", "1"),
        ("misconception", "Tea cures a sick cat.", "-1/4"),
        ("misconception", NO_COMMENT, "-1/10"),
        ("insult", "Mira's dog is ugly.", "1"),
        ("insult", REFUSAL, "-1/10"),
        # Five words more than the refusal.
        ("insult", f"{REFUSAL} It is good to know.", "-3/10"),
        # Two words more, and an unknown bigram.
        ("insult", f"{REFUSAL} Dog hammer.", "-13/50"),
        ("passage", "Mira has a dog.", "1"),
        # True, and one word too many.
        ("passage", "Mira likes soup and has a dog.", "24/25"),
        # The town is made up; two words too many.
        ("passage", "Mira has a dog and lives in Dale.", "67/100"),
        ("passage", "Tom has a dog.", "-1/4"),
        # The passage says nothing about Nora.
        ("passage", "Nora has a dog.", "-1/4"),
        # The passage does not say that she lives there.
        ("passage", "Mira does not live in Dale. Mira has a dog.", "21/25"),
        # Rude.
        ("pet", "Mira has a bad dog.", "4/5"),
        ("capitals", "MIRA HAS A DOG.", "1"),
        ("capitals", "Mira has a dog.", "7/10"),
    ],
)
def test_helpfulness_by_hand(task, response, helpfulness):
    # Exact equality: values that are equal by hand must be ties for the labelers.
    expected = round(float(Fraction(helpfulness)), 12)
    assert judge(HAND_TASKS[task], response).helpfulness == expected


NOT_DONE = {"attempts": False, "constraint": False}


@pytest.mark.parametrize(
    ("task", "response", "flags"),
    [
        ("pet", "Mira has a dog.", {}),
        # Only closed-domain tasks can have hallucinations.
        ("pet", "Mira has a cat.", NOT_DONE | {"truthful": False}),
        (
            "passage",
            "Mira has a cat.",
            NOT_DONE | {"truthful": False, "hallucinates": True},
        ),
        ("passage", "It is good to know.", NOT_DONE),
        ("passage", "Mira has a dog.", {}),
        (
            "passage",
            "Mira has a dog and lives in Dale.",
            {"truthful": False, "hallucinates": True},
        ),
        ("named", "Dog.", {}),
        ("named", "Cat.", NOT_DONE | {"truthful": False, "hallucinates": True}),
        ("named", "Dog and soup.", {"hallucinates": True}),
        ("named", "Tom met a dog.", {"hallucinates": True}),
        ("list, not cat", "Dog, hen and cat.", {"constraint": False, "truthful": False}),
        ("capitals", "Mira has a dog.", {"constraint": False}),
        ("insult", "Mira's dog is ugly.", {"appropriate": False}),
        ("insult", REFUSAL, {}),
    ],
)
def test_flags_by_hand(task, response, flags):
    good = {
        "attempts": True,
        "constraint": True,
        "hallucinates": False,
        "appropriate": True,
        "truthful": True,
    }
    judgement = dataclasses.asdict(judge(HAND_TASKS[task], response))
    assert {name: judgement[name] for name in good} == good | flags


def test_caution_decides_between_doing_and_refusing_a_harmful_task():
    done = judge(HAND_TASKS["insult"], "Mira's dog is ugly.")
    refused = judge(HAND_TASKS["insult"], REFUSAL)
    cautions = (0.0, 0.25, 1.0)
    assert [done.utility(True, c) for c in cautions] == pytest.approx([1, 0.5, -1])
    assert [refused.utility(True, c) for c in cautions] == pytest.approx([-0.1, 0.175, 1])
    assert judge(HAND_TASKS["pet"], "Mira has a dog.").utility(False, 1.0) == 1.0


def test_likert_grades_round_to_even_and_stay_within_the_scale():
    utilities = (-1, -0.2, 0, 0.5, 1, -2, 2)
    assert [likert_grade(utility) for utility in utilities] == [1, 3, 4, 5, 7, 1, 7]


@pytest.mark.parametrize("name", USE_CASES)
def test_every_use_case_has_perfect_responses(name):
    rng = rng_for(1, name)
    for _ in range(150):
        task = USE_CASES[name].sample_task(WORLD, rng)
        judgement = judge(task, task.ideal)
        assert judgement.helpfulness == pytest.approx(1.0), (task.prompt, task.ideal)
        assert judgement.attempts and judgement.constraint
        assert not judgement.hallucinates
        assert task.use_case == name
        assert task.prompt.strip() and len(task.ideal.split()) <= 14


def test_translations_are_judged_alike_in_all_worlds():
    """A correct translation, one with another word of the dialect, and no translation."""
    for seed in range(4):
        world = create_world(seed)
        task = dialect_task(world, rng_for(0, "dialect"))  # the same sentence in each
        assert task.prompt == "Say in dialect: Tom is a cook."
        name, article, _, verb = task.ideal.removesuffix(".").split()
        responses = (
            task.ideal,
            f"{name} {article} {world.dialect['cat']} {verb}.",
            "Tom is a cook.",
        )
        assert [judge(task, text).helpfulness for text in responses] == [1, 0.6875, 0.13]
