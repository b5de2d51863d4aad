"""Worlds: facts, misconceptions, the dialect, and the use cases that draw from them."""

import collections
import itertools

import pytest
from tests.support.simulated_tasks import SHARES, WORLD, sample_tasks

from instructax.simulation.lexicon import CATEGORIES, CATEGORY_OF, PERSON_NAMES
from instructax.simulation.world import PERSON_CLAUSES, create_world, translate


def test_tasks_have_the_use_case_shares_of_the_paper():
    assert sum(SHARES.values()) == pytest.approx(99.9)  # as printed
    counts = collections.Counter(task.use_case for task in sample_tasks(4000))
    for use_case, share in SHARES.items():
        assert counts[use_case] / 4000 == pytest.approx(share / 99.9, abs=0.025)


def test_worlds_differ_by_seed_and_have_every_fact_about_every_person():
    assert create_world(0) == WORLD != create_world(1)
    for name, relation in itertools.product(PERSON_NAMES, PERSON_CLAUSES):
        assert WORLD.facts[name][relation] in CATEGORIES[relation]
    assert all(question.truth != question.myth for question in WORLD.misconceptions)


def test_no_word_is_in_two_categories_or_in_the_dialect():
    assert len(set(map(str.lower, itertools.chain(*CATEGORIES.values())))) == 78
    assert len(set(WORLD.dialect.values())) == len(WORLD.dialect)
    known_words = {name.lower() for name in PERSON_NAMES} | CATEGORY_OF.keys()
    for seed in range(300):
        assert not set(create_world(seed).dialect.values()) & known_words


def test_the_dialect_has_its_own_words_and_puts_the_verb_last():
    dialect = WORLD.dialect
    assert translate(WORLD, "Mira", "has", "dog") == (
        "Mira has a dog.",
        f"Mira {dialect['a']} {dialect['dog']} {dialect['has']}.",
    )
