"""How near a completion is to its references: F1, exact match, BLEU and ROUGE-L, on plain
text.

The paper names the metric of each task and gives no code (appendix D), so each is what the
field's common scorer computes, named in its docstring. BLEU is from 0 to 100, everything
else a share from 0 to 1: the paper's table 14 prints F1 times 100, and ROUGE-L as it is.
"""

import collections
import math
import re
import string
from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from instructax.evals.intervals import Estimate

_NO_PUNCTUATION = str.maketrans(
    "", "", string.punctuation
)  # ASCII alone, as in all of these scorers
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def first_line(completion: str) -> str:
    """What stands before the first newline, where the paper cuts completions sampled at
    temperature 0 (appendix D)."""
    return completion.partition("\n")[0]


def normalize_answer(text: str) -> str:
    """SQuAD's rules: lower case, no punctuation, no articles, words parted by one blank, in
    this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bag of words of `prediction` against that of the best reference.

    SQuAD v2's rules: words are those of `normalize_answer`; references without a word are
    dropped, and where none is left there is no answer: 1 if the prediction is without a
    word too, else 0. Tasks that want "Not in background." for this give that text as the
    reference (paper, appendix D). QuAC's own scorer leaves one reference out in turn, to
    compare with people; that is not done here.
    """
    ours = normalize_answer(prediction).split()
    return max(_bag_f1(ours, answer.split()) for answer in _answers(references))


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` is one of the references after `normalize_answer`; no answer as
    in `token_f1`."""
    return normalize_answer(prediction) in _answers(references)


def drop_f1(prediction: str | Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """DROP's F1 of one or several spans against the best of the references, each the spans
    of one person's answer.

    Spans are paired off so that the sum of their F1 is largest; the figure is that sum over
    the larger number of spans, rounded to two places. The F1 of two spans is that of their
    sets of words, and 0 if the reference has numbers and the prediction none of them. Words
    are parted at blanks and hyphens and normalised one by one, numbers by value: "5", "5.0"
    and "5%" are equal, "3.5" keeps its point. All as in allennlp's drop.py; what turns
    DROP's JSON into spans ("day month year" of a date) and cuts a completion into spans is
    the caller's.
    """
    predicted = [
        _drop_words(span)
        for span in ([prediction] if isinstance(prediction, str) else prediction)
    ]
    answers = [_listed(spans) for spans in _listed(references)]
    # allennlp takes an answer that starts with a blank span as none, and gives it no
    # credit.
    scores = [
        _aligned_f1(predicted, [_drop_words(span) for span in spans])
        for spans in answers
        if spans[0].strip()
    ]
    return max(scores, default=0.0)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in 0 … 100: `references[i]` are the translations that `predictions[i]` is
    held against.

    BLEU = 100 · exp(min(0, 1 − r / c)) · (p₁ p₂ p₃ p₄)^¼

    pₙ is the share of the predictions' n-grams that a reference has, each counted at most
    as often as it has it; c the words of all predictions, r those of the references nearest
    in length. Where nothing matches, pₙ is 1 / 2ⁱ of one n-gram for the i-th such n ("exp"
    smoothing); if no word matches or no prediction has four words BLEU is 0, and NaN for no
    predictions. sacrebleu's default: mixed case, tokenisation 13a (Papineni et al., 2002;
    Post, 2018).
    """
    counts = _bleu_counts(predictions, references)
    return _bleu_of(counts.sum(axis=0)) if len(counts) else math.nan


def bleu_estimate(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """`bleu` with a 95% interval: BLEU is no mean, so it is that of `resamples` draws of as
    many predictions with replacement, between the 2.5% and the 97.5% quantile (Koehn,
    2004). The same for the same `seed`."""
    counts = _bleu_counts(predictions, references)
    if not len(counts):
        return Estimate(math.nan, -math.inf, math.inf, 0)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    low, high = np.quantile(
        [_bleu_of(counts[rows].sum(axis=0)) for rows in drawn], [0.025, 0.975]
    )
    return Estimate(_bleu_of(counts.sum(axis=0)), float(low), float(high), len(counts))


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, against the best reference; 0 where
    either side has no word.

    Words are runs of a–z and 0–9 in lower case, unstemmed, and newlines have no meaning:
    rougeL of the package rouge_score with use_stemmer=False (Lin, 2004).
    """
    ours = _words_of_rouge(prediction)
    return max(
        _rouge_f1(ours, _words_of_rouge(reference)) for reference in _listed(references)
    )


def _listed(texts: Sequence) -> Sequence:
    """Returns `texts`; raises TypeError for one text, which would pass for a list of
    letters, ValueError for none."""
    if isinstance(texts, str):
        raise TypeError(
            f"references must be a list of texts, not the text {texts[:60]!r}: put it into a list"
        )
    if not texts:
        raise ValueError("a list of references is empty: give one reference at least")
    return texts


def _answers(references: Sequence[str]) -> list[str]:
    """The references after `normalize_answer` that have a word, or the empty answer if none
    has."""
    return [
        answer for text in _listed(references or [""]) if (answer := normalize_answer(text))
    ] or [""]


def _f1(shared: int, ours: int, theirs: int) -> float:
    """Harmonic mean of shared / ours and shared / theirs."""
    if not shared:
        return 0.0
    precision, recall = shared / ours, shared / theirs
    return 2.0 * precision * recall / (precision + recall)


def _bag_f1(ours: Collection[str], theirs: Collection[str]) -> float:
    """F1 of two bags of words; of two empty ones 1."""
    if not ours and not theirs:
        return 1.0
    return _f1(
        (collections.Counter(ours) & collections.Counter(theirs)).total(),
        len(ours),
        len(theirs),
    )


def _drop_words(span: str) -> set[str]:
    words = set()
    for word in re.split("[ -]", span.lower()):
        # "3.5" is a number as it stands; "5%" and "1,000" become one without their signs.
        word = word if _is_number(word) else word.translate(_NO_PUNCTUATION)
        word = str(float(word)) if _is_number(word) else word
        words.update(_ARTICLES.sub(" ", word).split())
    return words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _aligned_f1(predicted: Sequence[set[str]], gold: Sequence[set[str]]) -> float:
    """Mean F1 of the best pairing of spans, over the larger number of spans, rounded to two
    places."""
    scores = np.zeros((len(gold), len(predicted)))
    for i, theirs in enumerate(gold):
        numbers = {word for word in theirs if _is_number(word)}
        for j, ours in enumerate(predicted):
            if not numbers or numbers & ours:
                scores[i, j] = _bag_f1(ours, theirs)
    total = scores[linear_sum_assignment(scores, maximize=True)].sum()
    return float(np.round(total / max(scores.shape), 2))


# mteval-v13a's rules for western languages: what is replaced, by what, in this order.
_RULES_13A = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"([ -&(-+/:-@\[-`{-~])",
            r" \1 ",
        ),  # ASCII punctuation and symbols but for ' , - .
        (r"([^0-9])([.,])", r"\1 \2 "),  # point and comma, unless a digit stands before
        (r"([.,])([^0-9])", r" \1 \2"),  # … or after
        (r"([0-9])(-)", r"\1 \2 "),  # dash after a digit
    )
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def _words_13a(text: str) -> list[str]:
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES:
        text = text.replace(entity, sign)
    text = f" {text} "  # so that the first and the last sign have a neighbour
    for pattern, replacement in _RULES_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(words: Sequence[str]) -> collections.Counter[tuple[str, ...]]:
    """How often each run of one to four words comes."""
    return collections.Counter(
        tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1)
    )


def _bleu_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """What BLEU adds up, i64[n, 10]: n-grams that match, n-grams, words, words of the
    reference nearest in length."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references: give one list each"
        )
    counts = np.zeros((len(predictions), 10), np.int64)
    for row, prediction, texts in zip(counts, predictions, references, strict=True):
        ours, theirs = _words_13a(prediction), [_words_13a(text) for text in _listed(texts)]
        # The nearest length, the shorter of two that are equally near.
        row[8:] = (
            len(ours),
            min((abs(len(words) - len(ours)), len(words)) for words in theirs)[1],
        )
        allowed = collections.Counter[tuple[str, ...]]()
        for words in theirs:
            allowed |= _ngrams(words)
        for ngram, count in _ngrams(ours).items():
            row[len(ngram) - 1] += min(count, allowed[ngram])
            row[len(ngram) + 3] += count
    return counts


def _bleu_of(counts: np.ndarray) -> float:
    """BLEU from the sums of `_bleu_counts`."""
    *_, length, reference_length = counts.tolist()
    matched, total = counts[:4].tolist(), counts[4:8].tolist()
    if not matched[0] or not total[3]:
        return 0.0
    return 100.0 * math.exp(
        min(0.0, 1.0 - reference_length / length) + _mean_log_precision(matched, total)
    )


def _mean_log_precision(matched: Sequence[int], total: Sequence[int]) -> float:
    """Mean over n of log pₙ, with "exp" smoothing."""
    credit, logs = 1.0, []
    for hits, ngrams in zip(matched, total, strict=True):
        credit = credit if hits else credit / 2.0
        logs.append(math.log((hits or credit) / ngrams))
    return sum(logs) / len(logs)


def _words_of_rouge(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _rouge_f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Returns the F1 of the longest common subsequence, whose length is grown word by word
    of `ours`."""
    longest = [0] * (len(theirs) + 1)  # longest[j]: with the first j words of theirs
    for our_word in ours:
        before, longest = longest, [0]
        for j, their_word in enumerate(theirs):
            longest.append(
                before[j] + 1 if our_word == their_word else max(before[j + 1], longest[j])
            )
    return _f1(longest[-1], len(ours), len(theirs))
