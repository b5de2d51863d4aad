"""The bigram check."""

from tests.support.simulated_tasks import WORLD, sample_tasks

from instructax.simulation.grammar import count_unknown_bigrams
from instructax.simulation.lexicon import FILLER_SENTENCES


def test_perfect_responses_have_no_unknown_bigram():
    dialect_words = frozenset(WORLD.dialect.values())
    for task in sample_tasks(300):
        assert count_unknown_bigrams(task.ideal, dialect_words) == 0, task.ideal
    for sentence in FILLER_SENTENCES:
        assert count_unknown_bigrams(sentence, dialect_words) == 0


def test_heaps_of_words_have_unknown_bigrams():
    # "Mira's dog" is fine.
    assert count_unknown_bigrams("Mira dog a has.", frozenset()) == 2
    # Bigrams do not cross the end of a sentence.
    assert count_unknown_bigrams("Mira has a dog. Cat a.", frozenset()) == 1
