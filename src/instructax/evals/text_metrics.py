"""Text metrics: F1, exact match, BLEU and ROUGE-L of completions against references.

The paper names the metric of each task but publishes no code (appendix D), so each function
follows the field's common scorer, which its docstring names. BLEU is from 0 to 100, all
others are from 0 to 1. (The paper's table 14 prints F1 times 100, and ROUGE-L as it is.)
"""

import collections
import math
import re
import string
from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from instructax.evals.intervals import Estimate

# Only ASCII punctuation, as in all of these scorers.
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

# BLEU counts n-grams of one to four words.
_MAX_NGRAM = 4


def first_line(completion: str) -> str:
    """The text before the first newline.

    The paper truncates completions sampled at temperature 0 there (appendix D).
    """
    return completion.partition("\n")[0]


def normalize_answer(text: str) -> str:
    """SQuAD's normalization: lower case, no punctuation, no articles, single spaces."""
    # Punctuation first: what is left of "a-" is an article.
    lowered = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Bag-of-words F1 against the best reference, by SQuAD v2's rules.

    Words are those of `normalize_answer`. References without a word are dropped. Without
    any left there is no answer, and the F1 is 1 if the prediction has no word either, else
    0. Tasks that expect "Not in background." in that case give it as the reference (paper,
    appendix D). QuAC's own scorer leaves out one reference in turn, to compare with people;
    this function does not.
    """
    # "No answer" is one reference without words, so the maximum is never empty.
    words = normalize_answer(prediction).split()
    return max(_bag_f1(words, answer.split()) for answer in _answers(references))


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` equals a reference after `normalize_answer`; see `token_f1`."""
    return normalize_answer(prediction) in _answers(references)


def drop_f1(prediction: str | Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """DROP's F1 of one or several spans against the best reference, as allennlp's drop.py.

    Spans are paired so that the sum of their F1 is largest. The result is that sum over the
    larger number of spans, rounded to two decimals. The F1 of two spans is that of their
    sets of words, but 0 if the reference has numbers and the prediction has none of them.
    Words are split at spaces and hyphens and normalized one by one, numbers by value: "5",
    "5.0" and "5%" are equal, and "3.5" keeps its point.

    The caller turns DROP's JSON into spans ("day month year" for a date) and splits
    completions into spans.

    Args:
      prediction: a span or several spans.
      references: the spans of each annotator's answer.
    """
    spans = [prediction] if isinstance(prediction, str) else prediction
    predicted = [_drop_words(span) for span in spans]
    best = 0.0
    for answer in _check_references(references):
        _check_references(answer)
        # allennlp ignores an answer that starts with a blank span.
        if answer[0].strip():
            gold = [_drop_words(span) for span in answer]
            best = max(best, _aligned_f1(predicted, gold))
    return best


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU from 0 to 100 (Papineni et al., 2002), as sacrebleu's default.

    BLEU = 100 · exp(min(0, 1 − r / c)) · (p₁ p₂ p₃ p₄)^¼

    pₙ is the share of the predictions' n-grams that occur in a reference, each counted at
    most as often as there. c is the number of words of all predictions, r that of the
    references nearest in length. Where nothing matches, pₙ is 1 / 2ⁱ of one n-gram for the
    i-th such n ("exp" smoothing). BLEU is 0 if no word matches or no prediction has four
    words, and NaN without predictions. Text is case-sensitive and tokenized by "13a" (Post,
    2018).

    Args:
      predictions: translations.
      references: the reference translations of each prediction.
    """
    counts = _bleu_counts(predictions, references)
    if not len(counts):
        return math.nan
    return _bleu_of(counts.sum(axis=0))


def bleu_estimate(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """`bleu` with a 95% bootstrap interval (Koehn, 2004), because BLEU is not a mean.

    The interval is from the 2.5% to the 97.5% quantile of `resamples` corpora of the same
    size, drawn with replacement. It is reproducible for a seed.
    """
    counts = _bleu_counts(predictions, references)
    if not len(counts):
        return Estimate(math.nan, -math.inf, math.inf, 0)
    # Counts are sums over sentences, so a resampled corpus needs no new n-grams.
    generator = np.random.default_rng(seed)
    # Row indices [resamples, n].
    resampled = generator.integers(len(counts), size=(resamples, len(counts)))
    scores = [_bleu_of(counts[rows].sum(axis=0)) for rows in resampled]
    low, high = np.quantile(scores, [0.025, 0.975])
    return Estimate(_bleu_of(counts.sum(axis=0)), float(low), float(high), len(counts))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, against the best reference.

    Equals rougeL of the package rouge_score with use_stemmer=False (Lin, 2004): words are
    runs of a–z and 0–9 in lower case, and newlines have no meaning. It is 0 where either
    side has no word.
    """
    words = _rouge_words(prediction)
    scores = []
    for reference in _check_references(references):
        scores.append(_rouge_f1(words, _rouge_words(reference)))
    return max(scores)


def _check_references(texts: Sequence) -> Sequence:
    """Returns `texts`, unless it is a single string or empty."""
    # A string would pass for a list of letters.
    if isinstance(texts, str):
        raise TypeError(
            f"references must be a list of texts, not the text {texts[:60]!r}: "
            "put it into a list"
        )
    if not texts:
        raise ValueError("a list of references is empty: give at least one reference")
    return texts


def _answers(references: Sequence[str]) -> list[str]:
    """Normalized references that have a word, or the empty answer if none has."""
    if not references:
        return [""]
    normalized = [normalize_answer(text) for text in _check_references(references)]
    return [answer for answer in normalized if answer] or [""]


def _f1(num_shared: int, num_ours: int, num_theirs: int) -> float:
    """Harmonic mean of precision and recall."""
    if not num_shared:
        return 0.0
    precision = num_shared / num_ours
    recall = num_shared / num_theirs
    return 2.0 * precision * recall / (precision + recall)


def _bag_f1(ours: Collection[str], theirs: Collection[str]) -> float:
    """F1 of two bags of words; 1 if both are empty."""
    if not ours and not theirs:
        return 1.0
    # The intersection of bags: each word as often as in both.
    shared = collections.Counter(ours) & collections.Counter(theirs)
    return _f1(shared.total(), len(ours), len(theirs))


def _drop_words(span: str) -> set[str]:
    words = set()
    for word in re.split("[ -]", span.lower()):
        # "3.5" is a number already; "5%" and "1,000" become one without their punctuation.
        if not _is_number(word):
            word = word.translate(_NO_PUNCTUATION)
        if _is_number(word):
            word = str(float(word))
        words.update(_ARTICLES.sub(" ", word).split())
    return words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _aligned_f1(predicted: Sequence[set[str]], gold: Sequence[set[str]]) -> float:
    """Mean F1 of the best pairing of spans over the larger number of spans."""
    scores = np.zeros((len(gold), len(predicted)))
    for i, theirs in enumerate(gold):
        # Without one of its numbers a span cannot match.
        numbers = {word for word in theirs if _is_number(word)}
        for j, ours in enumerate(predicted):
            if not numbers or numbers & ours:
                scores[i, j] = _bag_f1(ours, theirs)
    # Spans without a partner count as 0.
    total = scores[linear_sum_assignment(scores, maximize=True)].sum()
    return float(np.round(total / max(scores.shape), 2))


# mteval-v13a's tokenization of western languages, in this order.
_RULES_13A = (
    # ASCII punctuation and symbols except ' , - .
    (re.compile(r"([ -&(-+/:-@\[-`{-~])"), r" \1 "),
    # Period and comma, unless a digit precedes …
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    # … or follows.
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    # A dash after a digit.
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def _words_13a(text: str) -> list[str]:
    # The order of the replacements is that of mteval.
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    # Spaces give the first and the last character a neighbor, which the rules need.
    text = f" {text} "
    for pattern, replacement in _RULES_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(words: Sequence[str]) -> collections.Counter[tuple[str, ...]]:
    """Counts of all n-grams of one to four words."""
    counts = collections.Counter[tuple[str, ...]]()
    for n in range(1, _MAX_NGRAM + 1):
        for start in range(len(words) - n + 1):
            counts[tuple(words[start : start + n])] += 1
    return counts


def _bleu_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """The counts that BLEU sums over a corpus, i64[n, 10].

    Columns: matching n-grams for n = 1 … 4, all n-grams for n = 1 … 4, words, and words of
    the reference nearest in length.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references: "
            "give one list for each prediction"
        )
    counts = np.zeros((len(predictions), 2 * _MAX_NGRAM + 2), np.int64)
    for row, prediction, texts in zip(counts, predictions, references, strict=True):
        ours = _words_13a(prediction)
        theirs = [_words_13a(text) for text in _check_references(texts)]
        row[8] = len(ours)
        # The nearest length, the shorter one of a tie.
        row[9] = min((abs(len(words) - len(ours)), len(words)) for words in theirs)[1]

        # An n-gram counts as often as in the reference that has it most often.
        allowed = collections.Counter[tuple[str, ...]]()
        for words in theirs:
            allowed |= _ngrams(words)
        # Columns n − 1 (matching) and n + 3 (all), for n = len(ngram).
        for ngram, count in _ngrams(ours).items():
            row[len(ngram) - 1] += min(count, allowed[ngram])
            row[len(ngram) + 3] += count
    return counts


def _bleu_of(counts: np.ndarray) -> float:
    """BLEU from the sums of `_bleu_counts`, i64[10]."""
    matched = counts[:4].tolist()
    total = counts[4:8].tolist()
    length, reference_length = counts[8:].tolist()
    if not matched[0] or not total[3]:
        return 0.0
    # Predictions shorter than the references are penalized; longer ones are by precision.
    log_brevity_penalty = min(0.0, 1.0 - reference_length / length)
    return 100.0 * math.exp(log_brevity_penalty + _mean_log_precision(matched, total))


def _mean_log_precision(matched: Sequence[int], total: Sequence[int]) -> float:
    """Mean over n of log pₙ, with "exp" smoothing."""
    credit = 1.0
    logs = []
    for num_matched, num_ngrams in zip(matched, total, strict=True):
        # 1/2 of one n-gram for the first n without a match, 1/4 for the second.
        if not num_matched:
            credit /= 2.0
        logs.append(math.log((num_matched or credit) / num_ngrams))
    return sum(logs) / len(logs)


def _rouge_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _rouge_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    # longest[j]: length of the longest common subsequence of the words of `ours` so far and
    # the first j words of `theirs`.
    longest = [0] * (len(theirs) + 1)
    # Two rows of the dynamic program are enough: time O(n · m), memory O(m).
    for our_word in ours:
        before = longest
        longest = [0]
        for j, their_word in enumerate(theirs):
            if our_word == their_word:
                longest.append(before[j] + 1)
            else:
                longest.append(max(before[j + 1], longest[j]))
    return _f1(longest[-1], len(ours), len(theirs))
