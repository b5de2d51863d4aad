"""Few-shot prefixes: what they contain, and where they are inserted."""

import numpy as np

from instructax.data.schema import Demonstration
from instructax.data.tokenizer import load_tokenizer
from instructax.evals.few_shot import prepend_prefix, random_prefixes
from instructax.types import Prompts


def test_a_prefix_is_right_before_each_prompt():
    prompts = Prompts(
        tokens=np.array([[0, 5, 6], [7, 8, 9], [0, 0, 0]]),
        mask=np.array([[False, True, True], [True] * 3, [False] * 3]),
    )
    prefixed = prepend_prefix(np.array([1, 2]), prompts, 3)
    assert prefixed.tokens.tolist() == [
        [0, 0, 1, 2, 5, 6],
        [0, 1, 2, 7, 8, 9],
        [0, 0, 0, 0, 0, 0],
    ]
    assert prefixed.mask.tolist() == [
        [False, False, True, True, True, True],
        [False, True, True, True, True, True],
        [False] * 6,
    ]


def test_random_prefixes_fit_and_hold_different_examples():
    examples = []
    for i in range(6):
        examples.append(
            Demonstration(
                id=str(i),
                prompt=f"Question {i}?",
                format="plain",
                completion=f"Answer {i}.",
                source=None,
                labeler=None,
            )
        )
    tokenizer = load_tokenizer("bytes")
    prefixes = list(
        random_prefixes(examples, tokenizer, shots=2, count=4, max_tokens=60, seed=0)
    )
    assert len(prefixes) == 4
    for text, tokens in prefixes:
        assert len(tokens) <= 60
        assert tokenizer.decode(tokens) == text
        assert text.count("Question") == 2 and text.endswith(".\n\n")
        first, second = text.split("Answer ")[1:]
        assert first[0] != second[0]
    assert not list(
        random_prefixes(examples, tokenizer, shots=2, count=4, max_tokens=9, seed=0)
    )
