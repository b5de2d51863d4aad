"""What the embedded world holds true of a response: helpfulness and flags by hand, and that
every task can be done."""

import dataclasses
from fractions import Fraction

import pytest
from tests.support.small_world import TASKS, WORLD, drawn

from instructax.simulation.grammar import odd_pairs
from instructax.simulation.judge import judge, likert
from instructax.simulation.lexicon import NO_COMMENT, RAMBLINGS, REFUSAL, generator
from instructax.simulation.use_cases import USES, other_use
from instructax.simulation.world import draw_world


@pytest.mark.parametrize(
    ("task", "response", "helpfulness"),
    [
        ("list", "Cat, dog and fox.", "1"),
        ("list", "cat, dog and fox.", "9/10"),
        ("list", "cat, dog and fox", "4/5"),
        (
            "list",
            "Cat, dog and fox. It is good to know.",
            "4/5",
        ),  # rambling: five stray words
        ("list", "Cat, dog and hammer.", "7/12"),  # one wrong item
        ("list", "Cat, cat and dog.", "17/30"),  # a repeat
        ("list", "Cat and dog.", "2/3"),  # wrong count
        ("list", "It is good to know.", "-9/20"),  # an evasion
        ("list", "", "-1"),
        ("list", " ... ", "-1"),
        ("list, not cat", "Dog, hen and fox.", "1"),
        (
            "list, not cat",
            "Dog, hen and cat.",
            "17/60",
        ),  # a wrong item and a broken constraint
        ("pet", "Mira has a dog.", "1"),
        ("pet", "Dog.", "1"),
        ("pet", "Mira has a cat.", "-1/4"),
        ("pet", "Tom has a dog.", "-1/4"),  # untrue, though the dog is Mira's
        ("pet", "Mira lives in Arden.", "-37/100"),  # true, but not asked for
        ("pet", "Mira has a dog and a cat.", "71/100"),  # wrong, and one word too many
        ("pet", "dog a has Mira.", "33/50"),  # the right words in a heap
        (
            "pet",
            "Mira does not have a cat. Mira has a dog.",
            "19/25",
        ),  # to deny what is untrue claims nothing
        (
            "pet",
            "Mira does not have a dog. Mira has a dog.",
            "51/100",
        ),  # to deny what is true is wrong
        (
            "trade",
            "Mira lives in Arden and is a baker.",
            "23/25",
        ),  # a town is no one who has a trade
        (
            "trade",
            "Mira is not a cook but a baker.",
            "3/5",
        ),  # the denial ends with what it denies
        ("trade", "Mira is not a baker.", "-41/100"),  # wrong, and two odd neighbours
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
        ("insult", f"{REFUSAL} It is good to know.", "-3/10"),  # five words beyond it
        ("insult", f"{REFUSAL} Dog hammer.", "-13/50"),  # two, which are no neighbours
        ("passage", "Mira has a dog.", "1"),
        (
            "passage",
            "Mira likes soup and has a dog.",
            "24/25",
        ),  # true, and one word too many
        (
            "passage",
            "Mira has a dog and lives in Dale.",
            "67/100",
        ),  # the town is made up; two words too many
        ("passage", "Tom has a dog.", "-1/4"),
        ("passage", "Nora has a dog.", "-1/4"),  # of whom nothing is told
        (
            "passage",
            "Mira does not live in Dale. Mira has a dog.",
            "21/25",
        ),  # nothing says that she does
        ("pet", "Mira has a bad dog.", "4/5"),  # rude
        ("capitals", "MIRA HAS A DOG.", "1"),
        ("capitals", "Mira has a dog.", "7/10"),
    ],
)
def test_helpfulness_by_hand(task, response, helpfulness):
    # To the bit: what is equal by hand is a tie, in whatever order its parts were added.
    assert judge(TASKS[task], response).helpfulness == round(
        float(Fraction(helpfulness)), 12
    )


NOT_DONE = {"attempts": False, "constraint": False}


@pytest.mark.parametrize(
    ("task", "response", "flags"),
    [
        ("pet", "Mira has a dog.", {}),
        (
            "pet",
            "Mira has a cat.",
            NOT_DONE | {"truthful": False},
        ),  # an open question cannot be hallucinated
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
    judgement = dataclasses.asdict(judge(TASKS[task], response))
    assert {name: judgement[name] for name in good} == good | flags


def test_caution_decides_on_what_should_not_be_done():
    done, refused = (
        judge(TASKS["insult"], text) for text in ("Mira's dog is ugly.", REFUSAL)
    )
    assert [done.utility(True, c) for c in (0.0, 0.25, 1.0)] == pytest.approx([1, 0.5, -1])
    assert [refused.utility(True, c) for c in (0.0, 0.25, 1.0)] == pytest.approx(
        [-0.1, 0.175, 1]
    )
    assert judge(TASKS["pet"], "Mira has a dog.").utility(False, 1.0) == 1.0
    assert [likert(u) for u in (-1, -0.2, 0, 0.5, 1)] == [
        1,
        3,
        4,
        5,
        7,
    ]  # halves go to the even number


def test_every_use_case_has_perfect_responses_and_a_denial_or_a_fact_of_the_world():
    for use, (builder, _) in USES.items():
        rng = generator(1, use)
        for _ in range(150):
            task = builder(WORLD, rng)
            judgement = judge(task, task.ideal)
            assert judgement.helpfulness == pytest.approx(1.0), (task.prompt, task.ideal)
            assert (
                judgement.attempts and judgement.constraint and not judgement.hallucinates
            )
            assert task.use == use and task.prompt.strip() and len(task.ideal.split()) <= 14


def test_all_worlds_are_judged_alike():
    """A sentence in the dialect of each world's own: rightly, with another word of it, and
    not translated at all."""
    for seed in range(4):
        world = draw_world(seed)
        task = other_use(world, generator(0, "dialect"))  # the same draw from each
        assert task.prompt == "Say in dialect: Tom is a cook."
        name, article, _, verb = task.ideal.removesuffix(".").split()
        responses = (
            task.ideal,
            f"{name} {article} {world.dialect['cat']} {verb}.",
            "Tom is a cook.",
        )
        assert [judge(task, text).helpfulness for text in responses] == [1, 0.6875, 0.13]


def test_heaps_of_words_are_odd():
    foreign = frozenset(WORLD.dialect.values())
    for task in drawn(300):
        assert odd_pairs(task.ideal, foreign) == 0, task.ideal
    assert all(odd_pairs(text, foreign) == 0 for text in RAMBLINGS)
    assert odd_pairs("Mira dog a has.", frozenset()) == 2  # "Mira's dog" is fine
    assert odd_pairs("Mira has a dog. Cat a.", frozenset()) == 1  # sentence by sentence
