"""F1, exact match and ROUGE-L: worked numbers, reference scorers, identities and invalid
input.

rouge_score is the reference for ROUGE-L. The rules of SQuAD v2 and DROP are implemented a
second time below, differently and with exact fractions.
"""

import fractions
import itertools
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from tests.support.odd_texts import corrupt, examples, random_text, several_texts, texts

from instructax.evals.text_metrics import (
    bleu,
    drop_f1,
    exact_match,
    first_line,
    normalize_answer,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("completion", "line"),
    [
        (" Paris\nQ: Where", " Paris"),
        ("Paris", "Paris"),
        ("\nParis", ""),
        ("", ""),
        ("a\u2028b\x0bc\r\nd", "a\u2028b\x0bc\r"),
    ],
)
def test_first_line_ends_only_at_a_newline(completion, line):
    assert first_line(completion) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tan 'Apple' and a Pear!\n", "cat apple and pear"),
        # Articles are removed only as whole words.
        ("Theatre another banana", "theatre another banana"),
        ("U.S. well-known 3.5%", "us wellknown 35"),
        # Punctuation is removed first, and the rest of "a-" is an article.
        ("a.b the-end a-", "ab theend"),
        ("l’été ÉTÉ “x”", "l’été été “x”"),  # non-ASCII punctuation stays
        ("the a an", ""),
        ("a_b", "ab"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "f1"),
    [
        ("the Mercedes-Benz Superdome", ["Mercedes-Benz Superdome"], 1.0),
        ("It was in Paris.", ["Paris"], 2 / 5),  # precision 1/4, recall 1
        ("Paris", ["in Paris, France"], 1 / 2),  # precision 1, recall 1/3
        ("in 1066 or 1067", ["1066", "1066 or so", "1492"], 4 / 7),  # the best: 2/4 and 2/3
        ("no no no yes", ["no no maybe"], 4 / 7),  # "no" is shared twice: 2/4 and 2/3
        ("no", ["no no no"], 1 / 2),
        ("cat", ["dog"], 0.0),
        ("", ["dog"], 0.0),
        ("a dog", [""], 0.0),
        ("", [""], 1.0),
        ("The ...", ["", "the"], 1.0),  # no words are left in any of them
        ("", ["", "dog"], 0.0),  # one annotator answered, so there is an answer
        ("", [], 1.0),
        ("dog", [], 0.0),
        ("not in the background", ["Not in background."], 1.0),
        ("Été à Paris", ["été à paris"], 1.0),
    ],
)
def test_token_f1_by_hand(prediction, references, f1):
    assert token_f1(prediction, references) == pytest.approx(f1, abs=1e-15)
    assert exact_match(prediction, references) == (f1 == 1.0)


def test_exact_match_depends_on_word_order():
    assert token_f1("king Arthur", ["Arthur King"]) == 1.0
    assert not exact_match("king Arthur", ["Arthur King"])
    assert exact_match("An Arthur, king", ["x", "arthur KING"])


def squad_words(text: str) -> list[str]:
    """The words of SQuAD's rules, by characters rather than by regular expressions."""
    kept = ""
    for character in text.lower():
        is_ascii_sign = 33 <= ord(character) < 127 and not character.isalnum()
        if not is_ascii_sign:
            kept += character
    words = []
    # Split at every non-word character, so that the article in "l’a" is removed too.
    for word in re.split(r"(\W)", kept):
        words.append(" " if word in ("a", "an", "the") else word)
    return "".join(words).split()


def squad_f1(prediction: str, references: list[str]) -> fractions.Fraction:
    """SQuAD v2's F1 with exact fractions."""
    words = squad_words(prediction)
    answers = [squad_words(reference) for reference in references]
    answers = [answer for answer in answers if answer] or [[]]
    best = fractions.Fraction(0)
    for answer in answers:
        if not words or not answer:
            best = max(best, fractions.Fraction(words == answer))
            continue
        unmatched = list(answer)
        for word in words:
            if word in unmatched:
                unmatched.remove(word)
        shared = len(answer) - len(unmatched)
        best = max(best, fractions.Fraction(2 * shared, len(words) + len(answer)))
    return best


@hypothesis.given(prediction=texts, references=st.lists(texts, max_size=3))
@examples
def test_token_f1_equals_squads(prediction, references):
    assert normalize_answer(prediction) == " ".join(squad_words(prediction))
    assert token_f1(prediction, references) == pytest.approx(
        float(squad_f1(prediction, references)), abs=1e-12
    )


@hypothesis.given(one=texts, other=texts)
@examples
def test_token_f1_is_symmetric_and_between_0_and_1(one, other):
    assert token_f1(one, [other]) == token_f1(other, [one])
    assert 0.0 <= token_f1(one, [other]) <= 1.0
    assert token_f1(one, [one]) == 1.0 and exact_match(one, [one])


@pytest.mark.parametrize(
    ("prediction", "references", "f1"),
    [
        ("5.0 yards", [["5"]], 0.67),  # {5.0, yards} and {5.0}: precision 1/2, recall 1
        # One span for two: half of the F1 of 1/4 and 1.
        ("about 5% and 1,000", [["5", "1000"]], 0.2),
        ("4 yards", [["5 yards"]], 0.0),  # they share a word but no number
        ("five yards", [["5 yards"]], 0.0),
        ("5 feet", [["5 yards"]], 0.5),
        ("5 yards", [["yards"]], 0.67),  # the reference has no number
        ("3.5", [["35"]], 0.0),
        ("1e3", [["1000"]], 1.0),
        ("no no yes", [["yes no"]], 1.0),  # sets: repetitions do not count
        ("Mid-Atlantic", [["mid atlantic"]], 1.0),
        (["Leach", "Brown"], [["Kris Brown", "Vonta Leach"]], 0.67),
        ("Kris Brown", [["Kris Brown", "Vonta Leach"]], 0.5),
        (["Brown", "Leach", "Russell"], [["Brown"]], 0.33),
        # (1/2 + 1/2) / 2; the best single pair, 2/3, would leave 0 for the other.
        (["x y", "x w v"], [["y z", "x"]], 0.5),
        # (1 + 2/3) / 2; in the given order it would be (2/3 + 0) / 2.
        (["x", "y"], [["x y", "x"]], 0.83),
        ("Leach", [["Brown"], ["Vonta Leach"]], 0.67),
        ("", [["Brown"]], 0.0),
        ([], [["Brown"]], 0.0),
        ("the", [["a"]], 1.0),
        ("", [[" ", "Brown"]], 0.0),  # such an answer is ignored
        ("x", [["x b c d e f g h i j k l m n o"]], 0.12),  # 2/16, rounded to even
    ],
)
def test_drop_f1_by_hand(prediction, references, f1):
    assert drop_f1(prediction, references) == f1


def drop_words(span: str) -> set[str]:
    """DROP's normalized words, for example "5%" → "5.0" and "Mid-Atlantic" → two words."""
    words = set()
    for word in span.replace("-", " ").split(" "):
        without_signs = ""
        for character in word.lower():
            if ord(character) > 126 or character.isalnum() or character <= " ":
                without_signs += character
        for form in (word.lower(), without_signs):
            try:
                words.add(str(float(form)))
                break
            except ValueError:
                pass
        else:
            words.update(squad_words(word))
    return words


def drop_span_f1(ours: set[str], theirs: set[str]) -> fractions.Fraction:
    numbers = set()
    for word in theirs:
        if re.fullmatch(r"[\d.e+]*\d|nan|inf(inity)?", word):
            numbers.add(word)
    if numbers and not numbers & ours:
        return fractions.Fraction(0)
    if not ours and not theirs:
        return fractions.Fraction(1)
    return fractions.Fraction(2 * len(ours & theirs), len(ours) + len(theirs))


def drop_reference(predicted: list[str], gold: list[str]) -> fractions.Fraction:
    """The best of all pairings, tried one by one, before rounding."""
    ours = [drop_words(span) for span in predicted]
    theirs = [drop_words(span) for span in gold]
    size = max(len(ours), len(theirs))
    best = fractions.Fraction(0)
    for order in itertools.permutations(range(size)):
        total = fractions.Fraction(0)
        for i, j in enumerate(order):
            if i < len(ours) and j < len(theirs):
                total += drop_span_f1(ours[i], theirs[j])
        best = max(best, total)
    return best / size


@hypothesis.given(
    predicted=several_texts, references=st.lists(several_texts, min_size=1, max_size=2)
)
@examples
def test_drop_f1_is_the_best_of_all_pairings(predicted, references):
    exact = max(
        (drop_reference(predicted, spans) for spans in references if spans[0].strip()),
        default=0,
    )
    assert abs(drop_f1(predicted, references) - exact) <= 0.005 + 1e-9
    assert drop_f1(predicted, references) == round(drop_f1(predicted, references), 2)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # Lin (2004), section 3.1.
        ("police killed the gunman", ["police kill the gunman"], 3 / 4),
        ("the gunman kill police", ["police kill the gunman"], 1 / 2),
        ("a b c x", ["a x b y c z"], 6 / 10),  # gaps are allowed: a, b, c of 4 and of 6
        ("b a b a", ["a b a b"], 3 / 4),
        ("the cat", ["the cat sat on the mat"], 1 / 2),  # precision 1, recall 1/3
        ("Dog's", ["dog s"], 1.0),
        ("running", ["run"], 0.0),  # unstemmed
        ("x y", ["x", "x y z", "q"], 4 / 5),
        ("a\nb", ["a b"], 1.0),
        ("", ["cat"], 0.0),
        ("cat", ["..."], 0.0),
        ("", [""], 0.0),
        ("été", ["t"], 1.0),  # letters beyond a–z separate words
    ],
)
def test_rouge_l_by_hand(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-15)


ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def test_rouge_l_equals_rouge_score_on_random_texts():
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(300):
        references = []
        for _ in range(rng.integers(1, 4)):
            references.append(random_text(rng, rng.choice([3, 8, 40])))
        prediction = corrupt(rng, rng.choice(references))
        score = rouge_l(prediction, references)
        assert score == ROUGE.score_multi(references, prediction)["rougeL"].fmeasure
        scores.append(score)
    assert sum(0.1 < score < 0.9 for score in scores) > 150


@hypothesis.given(prediction=texts, references=several_texts)
@examples
def test_rouge_l_equals_rouge_score(prediction, references):
    expected = ROUGE.score_multi(references, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, references) == expected
    assert rouge_l(prediction, [references[0]]) == rouge_l(references[0], [prediction])


@pytest.mark.parametrize(
    "call",
    [
        lambda: token_f1("Paris", "Paris"),
        lambda: exact_match("Paris", "Paris"),
        lambda: rouge_l("Paris", "Paris"),
        lambda: drop_f1("Paris", "Paris"),
        lambda: drop_f1("Paris", ["Paris"]),
        lambda: bleu(["Paris"], ["Paris"]),
    ],
)
def test_a_string_is_not_a_list_of_references(call):
    with pytest.raises(
        TypeError, match="must be a list of texts, not the text 'Paris': put it into a list"
    ):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: rouge_l("x", []),
        lambda: drop_f1("x", []),
        lambda: drop_f1("x", [[]]),
        lambda: bleu(["x"], [[]]),
    ],
)
def test_a_list_of_references_must_not_be_empty(call):
    with pytest.raises(ValueError, match="give at least one reference"):
        call()
