"""F1, exact match, BLEU and ROUGE-L: numbers by hand, the scorers they must agree with,
identities, refused input.

sacrebleu and rouge_score are the references for their metrics; SQuAD v2's and DROP's rules
are written again below, in another way, with exact fractions.
"""

import fractions
import itertools
import math
import re

import hypothesis
import numpy as np
import pytest
import sacrebleu
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from instructax.evals.text_metrics import (
    bleu,
    bleu_estimate,
    drop_f1,
    exact_match,
    first_line,
    normalize_answer,
    rouge_l,
    token_f1,
)

# Words that the rules treat in their own way: articles, numbers, signs, entities, letters
# beyond ASCII.
PLAIN = [
    "a",
    "an",
    "the",
    "The",
    "cat",
    "cats",
    "sat",
    "mat.",
    "on,",
    "of",
    "dog's",
    "U.S.",
]
NUMBERS = [
    "3.5",
    "1,000",
    "7",
    "07",
    "5%",
    "$5",
    "-2",
    "2-1",
    "1.",
    ".5",
    "1e3",
    "nan",
    "½",
]
SIGNS = [
    "well-known",
    "(so)",
    '"yes"',
    "end-",
    "x.y",
    ",,.",
    "!?",
    "'",
    "''",
    "|",
    "&amp;",
    "&quot;",
    "&lt;b&gt;",
]
ODD = [
    "¿qué?",
    "naïve",
    "Ωmega",
    "ÉTÉ",
    "日本",
    "ﬁn",
    "İstanbul",
    "…",
    "–",
    "l’a",
    "<skipped>",
    "&amp;lt;",
]
WORDS = [*PLAIN, *NUMBERS, *SIGNS, *ODD]
texts = st.lists(st.sampled_from([*WORDS, "\n", "\t"]), max_size=7).map(" ".join) | st.text(
    max_size=20
)
several_texts = st.lists(texts, min_size=1, max_size=3)
examples = hypothesis.settings(max_examples=200, deadline=None)


def random_text(rng: np.random.Generator, most: int) -> str:
    """Up to `most` words, few enough kinds that runs of them are shared, parted by a blank,
    nothing or a newline."""
    words = rng.choice([*PLAIN, *rng.choice(WORDS, 6)], size=rng.integers(0, most + 1))
    return "".join(word + rng.choice([" ", " ", " ", "", "\n", "  "]) for word in words)


def blurred(rng: np.random.Generator, text: str) -> str:
    """`text` with a third of its words lost, and some said twice."""
    return " ".join(
        word for word in text.split(" ") for _ in range(rng.choice([0, 1, 1, 2]))
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
def test_first_line_ends_at_a_newline_and_nowhere_else(completion, line):
    assert first_line(completion) == line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tan 'Apple' and a Pear!\n", "cat apple and pear"),
        ("Theatre another banana", "theatre another banana"),  # articles are whole words
        ("U.S. well-known 3.5%", "us wellknown 35"),
        (
            "a.b the-end a-",
            "ab theend",
        ),  # punctuation goes first, and what is left of "a-" is an article
        ("l’été ÉTÉ “x”", "l’été été “x”"),  # signs beyond ASCII stay
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
        ("The ...", ["", "the"], 1.0),  # nothing is left of any of them
        ("", ["", "dog"], 0.0),  # one answered, so there is an answer
        ("", [], 1.0),
        ("dog", [], 0.0),
        ("not in the background", ["Not in background."], 1.0),
        ("Été à Paris", ["été à paris"], 1.0),
    ],
)
def test_token_f1_by_hand(prediction, references, f1):
    assert token_f1(prediction, references) == pytest.approx(f1, abs=1e-15)
    assert exact_match(prediction, references) == (f1 == 1.0)


def test_exact_match_asks_for_the_order_of_words():
    assert token_f1("king Arthur", ["Arthur King"]) == 1.0 and not exact_match(
        "king Arthur", ["Arthur King"]
    )
    assert exact_match("An Arthur, king", ["x", "arthur KING"])


def squad_words(text: str) -> list[str]:
    """Words of SQuAD's rules, letter by letter rather than by the library's patterns."""
    kept = "".join(
        sign for sign in text.lower() if not (33 <= ord(sign) < 127 and not sign.isalnum())
    )
    words = re.split(r"(\W)", kept)  # as \b would, so that the article in "l’a" goes too
    return "".join(" " if word in ("a", "an", "the") else word for word in words).split()


def squad_f1(prediction: str, references: list[str]) -> fractions.Fraction:
    """SQuAD v2's rules: golds without a word are dropped, [""] if none is left, 1 or 0
    where one side is empty."""
    best = fractions.Fraction(0)
    ours = squad_words(prediction)
    for theirs in [words for words in map(squad_words, references) if words] or [[]]:
        left, shared = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                shared += 1
        if not ours or not theirs:
            best = max(best, fractions.Fraction(ours == theirs))
        else:
            best = max(best, fractions.Fraction(2 * shared, len(ours) + len(theirs)))
    return best


@hypothesis.given(prediction=texts, references=st.lists(texts, max_size=3))
@examples
def test_token_f1_is_squads(prediction, references):
    assert normalize_answer(prediction) == " ".join(squad_words(prediction))
    assert token_f1(prediction, references) == pytest.approx(
        float(squad_f1(prediction, references)), abs=1e-12
    )


@hypothesis.given(one=texts, other=texts)
@examples
def test_token_f1_is_a_symmetric_share(one, other):
    assert token_f1(one, [other]) == token_f1(other, [one])
    assert 0.0 <= token_f1(one, [other]) <= 1.0
    assert token_f1(one, [one]) == 1.0 and exact_match(one, [one])


@pytest.mark.parametrize(
    ("prediction", "references", "f1"),
    [
        ("5.0 yards", [["5"]], 0.67),  # {5.0, yards} and {5.0}: precision 1/2, recall 1
        (
            "about 5% and 1,000",
            [["5", "1000"]],
            0.2,
        ),  # one span for two: half of the F1 of 1/4 and 1
        ("4 yards", [["5 yards"]], 0.0),  # a word is shared, and no number
        ("five yards", [["5 yards"]], 0.0),
        ("5 feet", [["5 yards"]], 0.5),
        ("5 yards", [["yards"]], 0.67),  # no number in the reference: none is asked for
        ("3.5", [["35"]], 0.0),
        ("1e3", [["1000"]], 1.0),
        ("no no yes", [["yes no"]], 1.0),  # sets: how often does not count
        ("Mid-Atlantic", [["mid atlantic"]], 1.0),
        (["Leach", "Brown"], [["Kris Brown", "Vonta Leach"]], 0.67),
        ("Kris Brown", [["Kris Brown", "Vonta Leach"]], 0.5),
        (["Brown", "Leach", "Russell"], [["Brown"]], 0.33),
        (
            ["x y", "x w v"],
            [["y z", "x"]],
            0.5,
        ),  # 1/2 + 1/2; the best single pair, 2/3, would leave 0 for the other
        (
            ["x", "y"],
            [["x y", "x"]],
            0.83,
        ),  # (1 + 2/3) / 2; in the order given, (2/3 + 0) / 2
        ("Leach", [["Brown"], ["Vonta Leach"]], 0.67),
        ("", [["Brown"]], 0.0),
        ([], [["Brown"]], 0.0),
        ("the", [["a"]], 1.0),
        ("", [[" ", "Brown"]], 0.0),  # an answer that starts with a blank span is none
        ("x", [["x b c d e f g h i j k l m n o"]], 0.12),  # 2/16 = 0.125, halves to even
    ],
)
def test_drop_f1_by_hand(prediction, references, f1):
    assert drop_f1(prediction, references) == f1


def drop_words(span: str) -> set[str]:
    """DROP's normalised words: "5%" → "5.0", "3.5" → "3.5", "Mid-Atlantic" → "mid",
    "atlantic"."""
    found = set()
    for word in span.replace("-", " ").split(" "):
        for form in (
            word.lower(),
            "".join(
                sign
                for sign in word.lower()
                if ord(sign) > 126 or sign.isalnum() or sign <= " "
            ),
        ):
            try:
                found.add(str(float(form)))
                break
            except ValueError:
                pass
        else:
            found.update(squad_words(word))
    return found


def drop_reference(predicted: list[str], gold: list[str]) -> fractions.Fraction:
    """The best of all pairings, tried one by one, before rounding."""

    def score(ours: set[str], theirs: set[str]) -> fractions.Fraction:
        numbers = [
            word for word in theirs if re.fullmatch(r"[\d.e+]*\d|nan|inf(inity)?", word)
        ]
        if numbers and not any(number in ours for number in numbers):
            return fractions.Fraction(0)
        return (
            fractions.Fraction(2 * len(ours & theirs), len(ours) + len(theirs))
            if ours or theirs
            else fractions.Fraction(1)
        )

    ours, theirs = (
        [drop_words(span) for span in predicted],
        [drop_words(span) for span in gold],
    )
    size = max(len(ours), len(theirs))
    totals = [
        sum(
            score(ours[i], theirs[j])
            for i, j in enumerate(order)
            if i < len(ours) and j < len(theirs)
        )
        for order in itertools.permutations(range(size))
    ]
    return max(totals) / fractions.Fraction(size)


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


CAT = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        ([CAT], [[CAT]], 100.0),
        (["the cat sat on a mat"], [[CAT]], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        (
            ["the cat on sat mat the"],
            [[CAT]],
            100 * (6 / 6 * 1 / 5 * 1 / 2 / 4 * 1 / 4 / 3) ** 0.25,
        ),  # 1/2, 1/4 of one
        # Clipped: "the" is right twice of seven times; no longer run is: 1/2 of 6, 1/4 of
        # 5, 1/8 of 4.
        (["the the the the the the the"], [[CAT]], 100 * (2 / 7 / 12 / 20 / 32) ** 0.25),
        # Nothing but the length is wrong: 4 of 6 words.
        (["the cat sat on"], [[CAT]], 100 * math.exp(1 - 6 / 4)),
        # Too long costs precision alone: 6/7, 5/6, 4/5, 3/4.
        ([CAT + " now"], [[CAT]], 100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25),
        (["a b c d"], [["e f g h"]], 0.0),
        ([""], [[CAT]], 0.0),
        (["the cat sat"], [["the cat sat"]], 0.0),  # no four words in all of the corpus
        (
            ["the cat sat", CAT],
            [["the cat sat"], [CAT]],
            100.0,
        ),  # counts of the corpus, not a mean of sentences
        (
            ["The Cat sat on the mat"],
            [[CAT]],
            100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25,
        ),  # case counts
        # Runs of either reference count, "b c d e" is in none; of 5 and 7 words, equally
        # near to 6, the shorter holds.
        (["a b c d e f"], [["a b c d x", "c d e f y z w"]], 100 * (2 / 3) ** 0.25),
        (
            ["a b c d e f"],
            [["a b c", "a b c d e f g h"]],
            100 * math.exp(1 - 8 / 6),
        ),  # 8 is nearer than 3
        # A word counts as often as the reference that has it most often, not as often as
        # all together.
        (
            ["x x x x"],
            [["x x y y", "x y y y"]],
            100 * (2 / 4 * 1 / 3 * 1 / 2 / 2 * 1 / 4 / 1) ** 0.25,
        ),
        (
            ["x $1,000.5 (2-3)."],
            [["x $ 1,000.5 ( 2 - 3 ) ."]],
            100.0,
        ),  # these are 13a's words
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


def test_the_interval_of_bleu_is_that_of_draws_of_its_sentences():
    same = bleu_estimate(["a b c d"] * 3, [["a b c d"]] * 3, resamples=9, seed=0)
    assert (same.value, same.low, same.high) == pytest.approx(
        (100, 100, 100)
    ) and same.count == 3
    predictions, references = (
        ["a b c d", "a b x y", "p q r s a", "d c b a"],
        [["a b c d"]] * 4,
    )
    draws = itertools.product(range(4), repeat=4)
    every = [bleu([predictions[i] for i in rows], references) for rows in draws]
    estimate = bleu_estimate(predictions, references, resamples=4000, seed=1)
    assert estimate.value == bleu(predictions, references)
    expected = np.quantile(np.repeat(every, 100), [0.025, 0.975])
    assert min(every) < expected[0] < estimate.value < expected[1] < 100
    assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_nothing_is_nan():
    assert math.isnan(bleu_estimate([], [], resamples=9, seed=0).value)
    assert math.isnan(bleu([], []))


def sacrebleu_score(predictions: list[str], references: list[list[str]]) -> float:
    columns = [list(column) for column in zip(*references, strict=True)]
    return sacrebleu.corpus_bleu(predictions, columns).score


def test_bleu_is_sacrebleus_on_random_corpora():
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(300):
        count, sentences, most = (
            rng.integers(1, 4),
            rng.integers(1, 6),
            rng.choice([3, 8, 30]),
        )
        references = [
            [random_text(rng, most) for _ in range(count)] for _ in range(sentences)
        ]
        predictions = [blurred(rng, rng.choice(texts)) for texts in references]
        scores.append(bleu(predictions, references))
        assert scores[-1] == pytest.approx(
            sacrebleu_score(predictions, references), abs=1e-9
        )
    assert (
        sum(score == 0 for score in scores) < 100
        and sum(10 < score < 90 for score in scores) > 100
    )


@hypothesis.given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@examples
def test_bleu_is_sacrebleus(pairs):
    predictions, references = [pair[0] for pair in pairs], [[pair[1]] for pair in pairs]
    assert bleu(predictions, references) == pytest.approx(
        sacrebleu_score(predictions, references), abs=1e-9
    )
    assert 0.0 <= bleu(predictions, references) <= 100.0 + 1e-9


@hypothesis.given(
    text=st.lists(st.sampled_from(PLAIN), min_size=4, max_size=20).map(" ".join)
)
@examples
def test_bleu_of_a_text_with_itself_is_100(text):
    assert bleu([text], [[text]]) == pytest.approx(100.0, abs=1e-9)
    assert bleu([text], [["other words", text]]) == pytest.approx(100.0, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        (
            "police killed the gunman",
            ["police kill the gunman"],
            3 / 4,
        ),  # Lin (2004), section 3.1
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
        ("été", ["t"], 1.0),  # letters beyond a–z part words
    ],
)
def test_rouge_l_by_hand(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-15)


ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def test_rouge_l_is_rouge_scores_on_random_texts():
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(300):
        references = [
            random_text(rng, rng.choice([3, 8, 40])) for _ in range(rng.integers(1, 4))
        ]
        prediction = blurred(rng, rng.choice(references))
        scores.append(rouge_l(prediction, references))
        assert scores[-1] == ROUGE.score_multi(references, prediction)["rougeL"].fmeasure
    assert sum(0.1 < score < 0.9 for score in scores) > 150


@hypothesis.given(prediction=texts, references=several_texts)
@examples
def test_rouge_l_is_rouge_scores(prediction, references):
    assert (
        rouge_l(prediction, references)
        == ROUGE.score_multi(references, prediction)["rougeL"].fmeasure
    )
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
def test_one_text_is_not_a_list_of_references(call):
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
def test_a_reference_is_needed(call):
    with pytest.raises(ValueError, match="give one reference at least"):
        call()


def test_bleu_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match="1 predictions and 2 lists of references"):
        bleu([CAT], [[CAT], [CAT]])
