"""Multiple choice: worked numbers, a plain reference, identities and refused input."""

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

TOTALS = np.array([[-4.2, -5.1, -9.0], [-1.3, -2.4, -3.3], [-7.0, -7.0, 0.0]])
LENGTHS = np.array([[2, 3, 3], [1, 2, 3], [2, 2, 0]])
VALID = np.array([[True, True, True], [True, True, True], [True, True, False]])
# Means −2.1, −1.7*, −3.0; −1.3, −1.2, −1.1*; −3.5*, −3.5. Totals alone choose 0, 0, 0.
CHOSEN = [1, 2, 0]


def random_case(
    seed: int, questions: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random totals, lengths and valid marks; one to five candidates in any columns."""
    random = np.random.default_rng(seed)
    valid = random.permuted(np.arange(5) < random.integers(1, 6, (questions, 1)), axis=1)
    lengths = random.integers(1, 9, valid.shape)
    return lengths * random.normal(-2.0, 1.0, valid.shape), lengths, valid


def test_predicted_choices_by_hand():
    np.testing.assert_array_equal(predicted_choices(TOTALS, LENGTHS, VALID), CHOSEN)


def test_correct_choices_by_hand():
    correct = correct_choices(TOTALS, LENGTHS, VALID, np.array([1, 0, 0]))
    assert correct.tolist() == [True, False, True]
    assert correct_choices(TOTALS, LENGTHS, VALID, np.array(CHOSEN)).all()


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [
        ([0.5, 0.5], 1.0),
        ([0.2, 0.2, 0.2, 0.2], 2.0),  # probabilities are normalized over the candidates
        ([0.3, 0.1], 2 - 0.75 * math.log2(3)),  # ¾ log₂ 4/3 + ¼ log₂ 4
        ([0.1, 0.05, 0.05], 1.5),  # ½ · 1 + 2 · ¼ · 2
        ([0.7], 0.0),
        ([0.7, 0.0], 0.0),
        ([0.25, 0.0, 0.25], 1.0),
    ],
)
def test_entropy_by_hand(probabilities, bits):
    with np.errstate(divide="ignore"):
        totals = np.log([probabilities])
    found = choice_entropy_bits(totals, np.ones_like(totals, bool))
    np.testing.assert_allclose(found, [bits], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_results_equal_a_plain_reference(seed):
    totals, lengths, valid = random_case(seed)
    chosen = []
    entropies = []
    answers = []
    for row, tokens, exists in zip(totals, lengths, valid, strict=True):
        candidates = [i for i in range(5) if exists[i]]
        means = {i: row[i] / tokens[i] for i in candidates}
        chosen.append(max(candidates, key=means.get))
        weights = [math.exp(row[i]) for i in candidates]
        shares = [weight / sum(weights) for weight in weights]
        entropies.append(-sum(p * math.log2(p) for p in shares))
        answers.append(candidates[0])
    np.testing.assert_array_equal(predicted_choices(totals, lengths, valid), chosen)
    found = choice_entropy_bits(totals, valid)
    np.testing.assert_allclose(found, entropies, rtol=1e-10, atol=1e-12)
    correct = correct_choices(totals, lengths, valid, np.array(answers))
    np.testing.assert_array_equal(correct, np.array(chosen) == np.array(answers))


@pytest.mark.parametrize("garbage", [1e30, -1e30, np.nan, np.inf, -np.inf])
def test_entries_without_a_candidate_do_not_matter(garbage):
    totals, lengths, valid = random_case(seed=7)
    dirty = np.where(valid, totals, garbage)
    expected = predicted_choices(totals, lengths, valid)
    for length in (0, -3, 10**9):
        found = predicted_choices(dirty, np.where(valid, lengths, length), valid)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        choice_entropy_bits(dirty, valid), choice_entropy_bits(totals, valid)
    )


def test_masked_candidates_equal_removed_candidates():
    totals, lengths, valid = random_case(seed=8)
    for row in range(len(totals)):
        exists = valid[row]
        removed = totals[row : row + 1, exists]
        all_valid = np.ones(removed.shape, bool)
        alone = predicted_choices(removed, lengths[row : row + 1, exists], all_valid)

        one_row = slice(row, row + 1)
        masked = predicted_choices(totals[one_row], lengths[one_row], valid[one_row])
        assert np.flatnonzero(exists)[alone[0]] == masked[0]
        np.testing.assert_allclose(
            choice_entropy_bits(removed, all_valid),
            choice_entropy_bits(totals[one_row], valid[one_row]),
            atol=1e-12,
        )


log_probability = st.floats(-2000, 0)


@hypothesis.given(
    totals=st.lists(log_probability, min_size=1, max_size=6),
    shift=log_probability,
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_entropy_is_bounded_and_ignores_shift_and_order(totals, shift, seed):
    row = np.array([totals])
    valid = np.ones(row.shape, bool)
    bits = choice_entropy_bits(row, valid)
    assert -1e-12 <= bits[0] <= math.log2(len(totals)) + 1e-12
    np.testing.assert_allclose(choice_entropy_bits(row + shift, valid), bits, atol=1e-9)
    shuffled = np.random.default_rng(seed).permutation(row, axis=1)
    np.testing.assert_allclose(choice_entropy_bits(shuffled, valid), bits, atol=1e-12)


@pytest.mark.parametrize("base", [0.0, -500.0, -1e5, -1e30])
def test_entropy_of_improbable_sentences(base):
    """exp(−500) underflows in float32 and exp(−1e5) in float64; only their ratio counts."""
    totals = np.array([[base, base], [base, 3 * base - 50.0]])
    bits = choice_entropy_bits(totals, np.ones((2, 2), bool))
    np.testing.assert_allclose(bits, [1.0, 0.0], atol=1e-12)


def test_float32_input_is_computed_in_float64():
    totals, _, valid = random_case(seed=9)
    totals = totals.astype(np.float32)
    bits = choice_entropy_bits(totals, valid)
    assert bits.dtype == np.float64
    np.testing.assert_array_equal(
        bits, choice_entropy_bits(totals.astype(np.float64), valid)
    )


def test_a_candidate_with_probability_zero_is_not_chosen():
    totals = np.array([[-np.inf, -9.0]])
    valid = np.ones((1, 2), bool)
    np.testing.assert_array_equal(predicted_choices(totals, valid.astype(int), valid), [1])
    np.testing.assert_array_equal(choice_entropy_bits(totals, valid), [0.0])


def predict_with_length_one(totals, valid):
    return predicted_choices(totals, np.ones(valid.shape, int), valid)


@pytest.mark.parametrize("function", [predict_with_length_one, choice_entropy_bits])
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
            "question 1 has no candidate with a positive probability",
        ),
        (
            [[-np.inf, 0.0]],
            [[True, False]],
            "question 0 has no candidate with a positive probability",
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
def test_invalid_questions_are_refused(function, totals, valid, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(totals), np.array(valid))


@pytest.mark.parametrize(
    ("lengths", "valid", "message"),
    [
        (
            LENGTHS,
            np.ones((3, 3), bool),
            "candidate 2 of question 2 must have at least one token, but has 0",
        ),
        (LENGTHS[0], VALID, r"lengths \(3,\) and valid \(3, 3\) must have one shape"),
    ],
)
def test_invalid_lengths_are_refused(lengths, valid, message):
    with pytest.raises(ValueError, match=message):
        predicted_choices(TOTALS, lengths, valid)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([1, 2, 2], r"answer 2 of question 2 is not one of its candidates \[0, 1\]"),
        ([3, 2, 2], r"answer 3 of question 0 is not one of its candidates \[0, 1, 2\]"),
        ([[1], [2], [2]], r"answers \(3, 1\) must have one entry for each of 3 questions"),
    ],
)
def test_invalid_answers_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        correct_choices(TOTALS, LENGTHS, VALID, np.array(answers))
