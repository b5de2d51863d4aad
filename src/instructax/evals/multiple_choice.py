"""Multiple choice by log-probability: the chosen candidate, and the entropy of the choice.

Arrays are [N, K]: N questions with up to K candidates. `total_logprobs` f[N, K] is the sum
of the log-probabilities of a candidate's tokens at temperature 1, in nats. `valid` b[N, K]
marks the candidates that exist; the other entries are ignored. Everything is computed in
float64 on the host.
"""

import numpy as np


def predicted_choices(
    total_logprobs: np.ndarray, lengths: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """The candidate with the highest mean log-probability per token (paper, appendix D).

    Args:
      total_logprobs: log-probability of each candidate, f[N, K].
      lengths: number of tokens of each candidate, i[N, K].
      valid: candidates that exist, b[N, K].

    Returns:
      Index of the chosen candidate, i64[N]; the first one of a tie.

    Raises:
      ValueError: the shapes differ, a candidate has no token or a log-probability of NaN
        or +inf, or a question has no candidate with a positive probability.
    """
    # The mean per token keeps long candidates comparable to short ones.
    scores = _masked_scores(total_logprobs, valid)
    valid = np.asarray(valid, bool)
    lengths = np.asarray(lengths)
    if lengths.shape != valid.shape:
        raise ValueError(
            f"lengths {lengths.shape} and valid {valid.shape} must have one shape [N, K]"
        )
    _refuse(valid & ~(lengths >= 1), lengths, "must have at least one token, but has")
    # Entries without a candidate are −inf and stay −inf.
    return np.argmax(scores / np.where(valid, lengths, 1), axis=1)


def correct_choices(
    total_logprobs: np.ndarray, lengths: np.ndarray, valid: np.ndarray, answers: np.ndarray
) -> np.ndarray:
    """Whether `predicted_choices` chooses the correct candidate; accuracy is the mean.

    Args:
      total_logprobs: log-probability of each candidate, f[N, K].
      lengths: number of tokens of each candidate, i[N, K].
      valid: candidates that exist, b[N, K].
      answers: index of the correct candidate, i[N], counted from 0.

    Returns:
      b[N].

    Raises:
      ValueError: as `predicted_choices`, or an answer is not a candidate.
    """
    # i64[N]; also checks the shapes and values of all arguments but `answers`.
    chosen = predicted_choices(total_logprobs, lengths, valid)
    answers = np.asarray(answers)
    if answers.shape != chosen.shape:
        raise ValueError(
            f"answers {answers.shape} must have one entry for each of {len(chosen)} "
            "questions"
        )
    # A wrong index would silently lower the accuracy.
    for question, (answer, row) in enumerate(zip(answers, valid, strict=True)):
        candidates = np.flatnonzero(row)
        if answer not in candidates:
            raise ValueError(
                f"answer {answer} of question {question} is not one of its candidates "
                f"{candidates.tolist()}"
            )
    return chosen == answers


def choice_entropy_bits(total_logprobs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Entropy of the choice in bits: H = −Σ P_i log₂ P_i with P_i ∝ exp(total_logprobs_i).

    Winogender and CrowS-Pairs average it over pairs of sentences (paper, appendix D).

    Args:
      total_logprobs: log-probability of each candidate, f[N, K].
      valid: candidates that exist, b[N, K].

    Returns:
      f64[N], from 0 to log₂ of the number of candidates.

    Raises:
      ValueError: the shapes differ, a log-probability is NaN or +inf, or a question has
        no candidate with a positive probability.
    """
    scores = _masked_scores(total_logprobs, valid)
    # Subtract the best score first: sums of a sentence's log-probabilities reach −800,
    # where exp underflows in float64.
    logs = scores - scores.max(axis=1, keepdims=True)
    # Log of the normalized probabilities.
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    # The limit of p log p at p = 0 is 0, but 0 · −inf would be NaN.
    finite_logs = np.where(np.isneginf(logs), 0.0, logs)
    return -(np.exp(logs) * finite_logs).sum(axis=1) / np.log(2.0)


def _masked_scores(total_logprobs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """f64[N, K] with −inf where there is no candidate; checks the values."""
    total_logprobs = np.asarray(total_logprobs, np.float64)
    valid = np.asarray(valid, bool)
    if total_logprobs.ndim != 2 or total_logprobs.shape != valid.shape:
        raise ValueError(
            f"total_logprobs {total_logprobs.shape} and valid {valid.shape} must have "
            "one shape [N, K]"
        )
    # NaN compares false, so this catches NaN as well as +inf.
    bad = valid & ~(total_logprobs < np.inf)
    _refuse(bad, total_logprobs, "cannot have the log-probability")

    # A question needs one finite score, or its maximum and entropy are undefined.
    scores = np.where(valid, total_logprobs, -np.inf)
    for question in np.flatnonzero(~np.isfinite(scores).any(axis=1)):
        raise ValueError(
            f"question {question} has no candidate with a positive probability: "
            "leave it out"
        )
    return scores


def _refuse(bad: np.ndarray, values: np.ndarray, reason: str) -> None:
    """Raises ValueError about the first entry that `bad` marks."""
    for question, candidate in np.argwhere(bad):
        value = values[question, candidate]
        raise ValueError(f"candidate {candidate} of question {question} {reason} {value}")
