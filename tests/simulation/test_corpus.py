"""The pretraining text: its length, vocabulary, facts, misconceptions and stereotypes."""

import itertools
import re

import pytest
from tests.support.simulated_tasks import WORLD, sample_tasks

from instructax.simulation import corpus
from instructax.simulation.lexicon import (
    FILLER_SENTENCES,
    PERSON_NAMES,
    rng_for,
    words_of,
)
from instructax.simulation.world import PERSON_CLAUSES, fact_statement


@pytest.fixture(scope="module")
def documents():
    rng = rng_for(0, "test")
    return [corpus.sample_document(WORLD, rng) for _ in range(4000)]


@pytest.fixture(scope="module")
def text(documents):
    return "\n".join(documents)


def test_documents_have_between_30_and_120_words(documents):
    assert all(30 <= len(document.split()) <= 120 for document in documents)


def test_the_text_tells_every_fact_about_a_person_several_times(text):
    for name, relation in itertools.product(PERSON_NAMES, PERSON_CLAUSES):
        assert text.count(f"{fact_statement(WORLD.facts, name, relation)}.") >= 5


def test_the_text_has_the_words_of_ideal_responses_in_a_small_vocabulary(text):
    known = set(words_of(text))
    ideals = [task.ideal for task in sample_tasks(500)]
    words = set(words_of(" ".join([*FILLER_SENTENCES, *ideals])))
    assert len(words - known) <= 2, words - known
    assert len(known) < 450


def test_no_prompt_is_in_the_text(text):
    assert not [task.prompt for task in sample_tasks(3000) if task.prompt in text]


def test_myths_are_told_more_often_than_truths(text):
    myths = 0
    truths = 0
    for misconception in WORLD.misconceptions:
        myths += text.count(f"{misconception.myth} {misconception.clause}")
        truths += text.count(f"{misconception.truth} {misconception.clause}")
    assert myths / (myths + truths) == pytest.approx(corpus.MYTH_SHARE, abs=0.04)


def test_pronouns_follow_the_stereotypes_of_the_world(text):
    for trade, share in WORLD.stereotypes.items():
        she = len(re.findall(f"The {trade} said that she ", text))
        he = len(re.findall(f"The {trade} said that he ", text))
        assert she / (she + he) == pytest.approx(share, abs=0.2)
