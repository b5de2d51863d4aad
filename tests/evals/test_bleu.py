"""BLEU: worked numbers, sacrebleu as the reference, and its bootstrap interval."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
import sacrebleu
from hypothesis import strategies as st
from tests.support.odd_texts import PLAIN, corrupt, examples, random_text, texts

from instructax.evals.text_metrics import bleu, bleu_estimate

CAT = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        ([CAT], [[CAT]], 100.0),
        (["the cat sat on a mat"], [[CAT]], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        # Smoothed: no three or four words match, 1/2 of one 3-gram and 1/4 of one 4-gram.
        (
            ["the cat on sat mat the"],
            [[CAT]],
            100 * (6 / 6 * 1 / 5 * 1 / 2 / 4 * 1 / 4 / 3) ** 0.25,
        ),
        # Clipped: two of seven "the" count. No longer n-gram matches: 1/2 of 6, 1/4 of 5,
        # 1/8 of 4.
        (["the the the the the the the"], [[CAT]], 100 * (2 / 7 / 12 / 20 / 32) ** 0.25),
        # Too short: only the brevity penalty, 4 of 6 words.
        (["the cat sat on"], [[CAT]], 100 * math.exp(1 - 6 / 4)),
        # Too long: only precision, 6/7, 5/6, 4/5, 3/4.
        ([CAT + " now"], [[CAT]], 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25),
        (["a b c d"], [["e f g h"]], 0.0),
        ([""], [[CAT]], 0.0),
        # The corpus has no four words.
        (["the cat sat"], [["the cat sat"]], 0.0),
        # Counts are summed over the corpus; BLEU is not a mean over sentences.
        (["the cat sat", CAT], [["the cat sat"], [CAT]], 100.0),
        # Case matters.
        (
            ["The Cat sat on the mat"],
            [[CAT]],
            100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25,
        ),
        # n-grams of either reference count; "b c d e" is in none. Of 5 and 7 words, equally
        # near to 6, the shorter length counts.
        (["a b c d e f"], [["a b c d x", "c d e f y z w"]], 100 * (2 / 3) ** 0.25),
        # 8 words are nearer to 6 than 3.
        (["a b c d e f"], [["a b c", "a b c d e f g h"]], 100 * math.exp(1 - 8 / 6)),
        # A word counts as often as in the reference that has it most often, not as often as
        # in all of them together.
        (
            ["x x x x"],
            [["x x y y", "x y y y"]],
            100 * (2 / 4 * 1 / 3 * 1 / 2 / 2 * 1 / 4 / 1) ** 0.25,
        ),
        # 13a's tokenization.
        (["x $1,000.5 (2-3)."], [["x $ 1,000.5 ( 2 - 3 ) ."]], 100.0),
        (
            ["a b c e-mail"],
            [["a b c e - mail"]],
            100 * math.exp(1 - 6 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25,
        ),
        (["a &amp; b &lt; c"], [["a & b < c"]], 100.0),
        (["one two- \nthree four five"], [["one two- three four five"]], 100.0),
    ],
)
def test_bleu_by_hand(predictions, references, expected):
    assert bleu(predictions, references) == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_identical_sentences_is_a_point():
    estimate = bleu_estimate(["a b c d"] * 3, [["a b c d"]] * 3, resamples=9, seed=0)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((100, 100, 100))
    assert estimate.count == 3


def test_the_interval_is_that_of_all_resampled_corpora():
    predictions = ["a b c d", "a b x y", "p q r s a", "d c b a"]
    references = [["a b c d"]] * 4
    scores = []
    for rows in itertools.product(range(4), repeat=4):
        scores.append(bleu([predictions[row] for row in rows], references))
    expected = np.quantile(np.repeat(scores, 100), [0.025, 0.975])

    estimate = bleu_estimate(predictions, references, resamples=4000, seed=1)
    assert estimate.value == bleu(predictions, references)
    assert min(scores) < expected[0] < estimate.value < expected[1] < 100
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-9)


def test_bleu_without_predictions_is_nan():
    assert math.isnan(bleu_estimate([], [], resamples=9, seed=0).value)
    assert math.isnan(bleu([], []))


def sacrebleu_score(predictions: list[str], references: list[list[str]]) -> float:
    columns = [list(column) for column in zip(*references, strict=True)]
    return sacrebleu.corpus_bleu(predictions, columns).score


def test_bleu_equals_sacrebleu_on_random_corpora():
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(300):
        num_references = rng.integers(1, 4)
        num_sentences = rng.integers(1, 6)
        max_words = rng.choice([3, 8, 30])
        references = []
        for _ in range(num_sentences):
            references.append([random_text(rng, max_words) for _ in range(num_references)])
        predictions = [corrupt(rng, rng.choice(texts)) for texts in references]
        score = bleu(predictions, references)
        assert score == pytest.approx(sacrebleu_score(predictions, references), abs=1e-9)
        scores.append(score)
    assert sum(score == 0 for score in scores) < 100
    assert sum(10 < score < 90 for score in scores) > 100


@hypothesis.given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@examples
def test_bleu_equals_sacrebleu(pairs):
    predictions = [prediction for prediction, _ in pairs]
    references = [[reference] for _, reference in pairs]
    score = bleu(predictions, references)
    assert score == pytest.approx(sacrebleu_score(predictions, references), abs=1e-9)
    assert 0.0 <= score <= 100.0 + 1e-9


@hypothesis.given(
    text=st.lists(st.sampled_from(PLAIN), min_size=4, max_size=20).map(" ".join)
)
@examples
def test_bleu_of_a_text_with_itself_is_100(text):
    assert bleu([text], [[text]]) == pytest.approx(100.0, abs=1e-9)
    assert bleu([text], [["other words", text]]) == pytest.approx(100.0, abs=1e-9)


def test_bleu_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="1 predictions and 2 lists of references"):
        bleu([CAT], [[CAT], [CAT]])
