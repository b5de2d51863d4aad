"""Multiple choice: numbers by hand, plain references, identities, cells that must not
matter, refused input."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from instructax.evals.multiple_choice import (
    choice_entropy_bits,
    correct_choices,
    predicted_choices,
)

GARBAGE = [1e30, -1e30, np.nan, np.inf, -np.inf]
every_garbage = pytest.mark.parametrize("garbage", GARBAGE)

TOTALS = np.array([[-4.2, -5.1, -9.0], [-1.3, -2.4, -3.3], [-7.0, -7.0, 0.0]])
LENGTHS = np.array([[2, 3, 3], [1, 2, 3], [2, 2, 0]])
VALID = np.array([[True, True, True], [True, True, True], [True, True, False]])
# Averages -2.1, -1.7*, -3.0; -1.3, -1.2, -1.1*; -3.5* and the same again. By totals alone
# it would be 0, 0, 0.
CHOSEN = [1, 2, 0]


def case(seed: int, questions: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random totals, lengths and candidates, one to five a question, anywhere in the row."""
    rng = np.random.default_rng(seed)
    valid = rng.permuted(np.arange(5) < rng.integers(1, 6, (questions, 1)), axis=1)
    lengths = rng.integers(1, 9, valid.shape)
    return lengths * rng.normal(-2.0, 1.0, valid.shape), lengths, valid


def test_choose_by_hand():
    np.testing.assert_array_equal(predicted_choices(TOTALS, LENGTHS, VALID), CHOSEN)


def test_accuracy_by_hand():
    assert correct_choices(TOTALS, LENGTHS, VALID, np.array([1, 0, 0])).tolist() == [
        True,
        False,
        True,
    ]
    assert correct_choices(TOTALS, LENGTHS, VALID, np.array(CHOSEN)).all()


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [
        ([0.5, 0.5], 1.0),
        ([0.2, 0.2, 0.2, 0.2], 2.0),  # what they leave to other texts is divided out
        ([0.3, 0.1], 2 - 0.75 * math.log2(3)),  # ¾ log₂ 4/3 + ¼ log₂ 4
        ([0.1, 0.05, 0.05], 1.5),  # ½ · 1 + 2 · ¼ · 2
        ([0.7], 0.0),
        ([0.7, 0.0], 0.0),
        ([0.25, 0.0, 0.25], 1.0),
    ],
)
def test_entropy_by_hand(probabilities, bits):
    totals = np.array([[math.log(p) if p else -math.inf for p in probabilities]])
    np.testing.assert_allclose(
        choice_entropy_bits(totals, np.ones_like(totals, bool)), [bits], atol=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_plain_reference(seed):
    totals, lengths, valid = case(seed)
    chosen, entropies = [], []
    for row, tokens, there in zip(totals, lengths, valid, strict=True):
        candidates = [i for i in range(5) if there[i]]
        chosen.append(max(candidates, key=lambda i: row[i] / tokens[i]))
        weights = [math.exp(row[i]) for i in candidates]
        shares = [weight / sum(weights) for weight in weights]
        entropies.append(-sum(p * math.log2(p) for p in shares))
    np.testing.assert_array_equal(predicted_choices(totals, lengths, valid), chosen)
    np.testing.assert_allclose(
        choice_entropy_bits(totals, valid), entropies, rtol=1e-10, atol=1e-12
    )
    answers = [np.flatnonzero(there)[0] for there in valid]
    share = sum(pick == answer for pick, answer in zip(chosen, answers, strict=True)) / len(
        chosen
    )
    assert correct_choices(
        totals, lengths, valid, np.array(answers)
    ).mean() == pytest.approx(share)


@every_garbage
def test_cells_without_a_candidate_do_not_matter(garbage):
    totals, lengths, valid = case(seed=7)
    dirty = np.where(valid, totals, garbage)
    for length in (0, -3, 10**9):
        np.testing.assert_array_equal(
            predicted_choices(dirty, np.where(valid, lengths, length), valid),
            predicted_choices(totals, lengths, valid),
        )
    np.testing.assert_array_equal(
        choice_entropy_bits(dirty, valid), choice_entropy_bits(totals, valid)
    )


def test_masked_is_removed():
    totals, lengths, valid = case(seed=8)
    for row, tokens, there in zip(totals, lengths, valid, strict=True):
        every = np.ones((1, there.sum()), bool)
        alone = predicted_choices(row[None, there], tokens[None, there], every)
        assert (
            np.flatnonzero(there)[alone[0]]
            == predicted_choices(row[None], tokens[None], there[None])[0]
        )
        np.testing.assert_allclose(
            choice_entropy_bits(row[None, there], every),
            choice_entropy_bits(row[None], there[None]),
            atol=1e-12,
        )


log_probability = st.floats(-2000, 0)


@hypothesis.given(
    totals=st.lists(log_probability, min_size=1, max_size=6),
    shift=log_probability,
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_entropy_lies_between_certainty_and_a_fair_die(totals, shift, seed):
    row = np.array([totals])
    every = np.ones(row.shape, bool)
    bits = choice_entropy_bits(row, every)
    assert -1e-12 <= bits[0] <= math.log2(len(totals)) + 1e-12
    np.testing.assert_allclose(choice_entropy_bits(row + shift, every), bits, atol=1e-9)
    mixed = np.random.default_rng(seed).permutation(row, axis=1)
    np.testing.assert_allclose(choice_entropy_bits(mixed, every), bits, atol=1e-12)


@pytest.mark.parametrize("base", [0.0, -500.0, -1e5, -1e30])
def test_entropy_of_improbable_sentences(base):
    """exp(-500) is 0 in float32 and exp(-1e5) in float64, and their ratio is what counts."""
    row = np.array([[base, base], [base, 3 * base - 50.0]])
    np.testing.assert_allclose(
        choice_entropy_bits(row, np.ones((2, 2), bool)), [1.0, 0.0], atol=1e-12
    )


def test_float32_is_computed_in_float64():
    totals, _, valid = case(seed=9)
    bits = choice_entropy_bits(totals.astype(np.float32), valid)
    assert bits.dtype == np.float64
    np.testing.assert_array_equal(
        bits, choice_entropy_bits(totals.astype(np.float32).astype(np.float64), valid)
    )


def test_an_impossible_candidate_is_not_picked():
    totals, every = np.array([[-np.inf, -9.0]]), np.ones((1, 2), bool)
    np.testing.assert_array_equal(predicted_choices(totals, np.array([[1, 1]]), every), [1])
    np.testing.assert_array_equal(choice_entropy_bits(totals, every), [0.0])


@pytest.mark.parametrize(
    "function",
    [lambda x, v: predicted_choices(x, np.ones(v.shape, int), v), choice_entropy_bits],
)
@pytest.mark.parametrize(
    ("totals", "valid", "message"),
    [
        (
            [[-1.0], [np.nan]],
            [[True], [True]],
            "candidate 0 of question 1 cannot have the log-probability nan",
        ),
        (
            [[-1.0, np.inf]],
            [[True, True]],
            "candidate 1 of question 0 cannot have the log-probability inf",
        ),
        (
            [[-1.0], [-2.0]],
            [[True], [False]],
            "question 1 has no candidate of a probability above 0",
        ),
        (
            [[-np.inf, 0.0]],
            [[True, False]],
            "question 0 has no candidate of a probability above 0",
        ),
        (
            [-1.0, -2.0],
            [True, True],
            r"total_logprobs \(2,\) and valid \(2,\) must have one shape \[N, K\]",
        ),
        (
            [[-1.0, -2.0]],
            [[True]],
            r"total_logprobs \(1, 2\) and valid \(1, 1\) must have one shape",
        ),
    ],
)
def test_what_is_no_choice_is_refused(function, totals, valid, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(totals), np.array(valid))


def test_lengths_and_answers_are_checked():
    with pytest.raises(
        ValueError,
        match="candidate 2 of question 2 must have a token at least, and its length is 0",
    ):
        predicted_choices(TOTALS, LENGTHS, np.ones((3, 3), bool))
    with pytest.raises(
        ValueError, match=r"lengths \(3,\) and valid \(3, 3\) must have one shape"
    ):
        predicted_choices(TOTALS, LENGTHS[0], VALID)
    with pytest.raises(
        ValueError, match=r"answer 2 of question 2 is not of its candidates \[0, 1\]"
    ):
        correct_choices(TOTALS, LENGTHS, VALID, np.array([1, 2, 2]))
    with pytest.raises(
        ValueError, match=r"answer 3 of question 0 is not of its candidates \[0, 1, 2\]"
    ):
        correct_choices(TOTALS, LENGTHS, VALID, np.array([3, 2, 2]))
    with pytest.raises(
        ValueError, match=r"answers \(3, 1\) must be one for each of 3 questions"
    ):
        correct_choices(TOTALS, LENGTHS, VALID, np.array([[1], [2], [2]]))
