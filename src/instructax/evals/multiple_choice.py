"""Multiple choice by log-probability: which candidate a model picks, and how undecided it
is between them.

Arrays are [N, K]: N questions of up to K candidates. `total_logprobs` f[N, K] is the sum of
the log-probabilities of a candidate's tokens at temperature 1, in nats; `valid` b[N, K]
marks the candidates that exist, and what stands in the other cells has no influence. All is
computed in float64 on the host.
"""

import numpy as np


def predicted_choices(
    total_logprobs: np.ndarray, lengths: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """The candidate with the highest average log-probability per token, the first of equals
    (paper, appendix D).

    `lengths` i[N, K] in tokens → i64[N]. Raises ValueError for shapes that differ, a
    candidate without a token or with a log-probability of NaN or +inf, and a question
    without a candidate that is possible.
    """
    scores, valid, lengths = (
        _scores(total_logprobs, valid),
        np.asarray(valid, bool),
        np.asarray(lengths),
    )
    if lengths.shape != valid.shape:
        raise ValueError(
            f"lengths {lengths.shape} and valid {valid.shape} must have one shape [N, K]"
        )
    _refuse(
        valid & ~(lengths >= 1), lengths, "must have a token at least, and its length is"
    )
    return np.argmax(scores / np.where(valid, lengths, 1), axis=1)


def correct_choices(
    total_logprobs: np.ndarray, lengths: np.ndarray, valid: np.ndarray, answers: np.ndarray
) -> np.ndarray:
    """Whether `predicted_choices` picks the right candidate, b[N]; `answers` i[N] count
    from 0. Accuracy is its mean.

    Raises ValueError as `predicted_choices`, and for an answer that is not one of the
    question's candidates.
    """
    chosen, answers = predicted_choices(total_logprobs, lengths, valid), np.asarray(answers)
    if answers.shape != chosen.shape:
        raise ValueError(
            f"answers {answers.shape} must be one for each of {len(chosen)} questions"
        )
    for question, (answer, row) in enumerate(zip(answers, valid, strict=True)):
        candidates = np.flatnonzero(row)
        if answer not in candidates:
            raise ValueError(
                f"answer {answer} of question {question} is not of its candidates {candidates.tolist()}"
            )
    return chosen == answers


def choice_entropy_bits(total_logprobs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Entropy of the choice, in bits: H = −Σ P_i log₂ P_i, with P_i ∝ exp(total_logprobs_i)
    over the candidates.

    → f64[N], from 0 to log₂ of the number of candidates. Winogender and CrowS-Pairs average
    it over pairs of sentences (paper, appendix D). Raises ValueError for shapes that
    differ, a log-probability of NaN or +inf, and a question without a candidate that is
    possible.
    """
    scores = _scores(total_logprobs, valid)
    # Down from the best one: exp(−800) is 0 in float64, and a sentence's sum of
    # log-probabilities gets there.
    logs = scores - scores.max(axis=1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    # A probability of 0 adds 0, the limit of p log p, where 0 · −inf would be NaN.
    return -(np.exp(logs) * np.where(np.isneginf(logs), 0.0, logs)).sum(axis=1) / np.log(
        2.0
    )


def _scores(total_logprobs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """f64[N, K], −inf where there is no candidate; every row has a finite one, or
    ValueError."""
    total_logprobs, valid = np.asarray(total_logprobs, np.float64), np.asarray(valid, bool)
    if total_logprobs.ndim != 2 or total_logprobs.shape != valid.shape:
        raise ValueError(
            f"total_logprobs {total_logprobs.shape} and valid {valid.shape} must have one shape [N, K]"
        )
    _refuse(
        valid & ~(total_logprobs < np.inf),
        total_logprobs,
        "cannot have the log-probability",
    )
    scores = np.where(valid, total_logprobs, -np.inf)
    for question in np.flatnonzero(~np.isfinite(scores).any(axis=1)):
        raise ValueError(
            f"question {question} has no candidate of a probability above 0: leave it out"
        )
    return scores


def _refuse(bad: np.ndarray, values: np.ndarray, reason: str) -> None:
    """Raises ValueError for the first cell that `bad` marks."""
    for question, candidate in np.argwhere(bad):
        raise ValueError(
            f"candidate {candidate} of question {question} {reason} {values[question, candidate]}"
        )
