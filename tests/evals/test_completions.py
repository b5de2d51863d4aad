"""Continuations and candidates of ragged contexts against a plain computation of each, one
by one."""

import math
from functools import cache

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.evals.completions import Completer
from instructax.models import Transformer

pytest_plugins = ("tests.support.pipeline_fixture",)

CONTEXT, ANSWER = 9, 6  # tokens
FAMILIES = {"gpt": tiny_models.gpt_config(), "llama": tiny_models.llama_config()}
RNG = np.random.default_rng(0)
CONTEXTS = [
    RNG.integers(tiny_models.VOCAB_SIZE, size=1 + i % CONTEXT).astype(np.int32)
    for i in range(11)
]
QUESTIONS = [
    (
        context,
        [
            RNG.integers(tiny_models.VOCAB_SIZE, size=1 + (i + k) % ANSWER).astype(np.int32)
            for k in range(1 + i % 4)
        ],
    )
    for i, context in enumerate(CONTEXTS)
]
MESHES = pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)


@cache
def network(family: str):
    model = Transformer(FAMILIES[family], tiny_models.compute(), "tokens")
    return model, tiny_models.random_params(model)


def completer(
    family: str,
    mesh: tuple[int, int, int] = (1, 1, 1),
    *,
    batch_size: int = 4,
    eos_id: int = 0,
    stop: int = -1,
) -> Completer:
    lengths = {"context_tokens": CONTEXT, "answer_tokens": ANSWER}
    ends = {"eos_id": eos_id, "stops": np.arange(tiny_models.VOCAB_SIZE) == stop}
    return Completer(
        network(family)[0], stages.mesh_of(*mesh), batch_size=batch_size, **ends, **lengths
    )


def plain_completions(family: str) -> list[np.ndarray]:
    """The likeliest token after each context, ANSWER times over."""
    model, params = network(family)
    documents = CONTEXTS
    for _ in range(ANSWER):
        logits = stages.plain_outputs(model, params, documents)
        documents = [
            np.append(text, logits[i, len(text) - 1].argmax())
            for i, text in enumerate(documents)
        ]
    return [text[-ANSWER:] for text in documents]


def until(answer: np.ndarray, eos_id: int) -> list[int]:
    return (
        answer.tolist()[: answer.tolist().index(eos_id)]
        if eos_id in answer
        else answer.tolist()
    )


@MESHES
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_the_likeliest_tokens_up_to_the_end(family, mesh):
    plain = plain_completions(family)
    eos_id = int(
        plain[3][2]
    )  # ends one answer at least, where it is no longer likeliest alone
    wanted = [until(answer, eos_id) for answer in plain]
    assert {0 < len(answer) < ANSWER for answer in wanted} == {True, False}
    got = completer(family, mesh, eos_id=eos_id).complete(network(family)[1], CONTEXTS)
    assert [answer.tolist() for answer in got] == wanted


def test_a_completion_ends_with_the_first_stop():
    plain = plain_completions("gpt")
    inner = [token for answer in plain for token in answer[:-1].tolist()]
    stop = min(inner, key=lambda token: sum(token in answer for answer in plain))
    wanted = [
        [*until(answer, stop), *([stop] if stop in answer else [])] for answer in plain
    ]
    assert {len(answer) < ANSWER for answer in wanted} == {True, False}
    unused = next(
        token
        for token in range(tiny_models.VOCAB_SIZE)
        if not any(token in answer for answer in plain)
    )
    got = completer("gpt", eos_id=unused, stop=stop).complete(network("gpt")[1], CONTEXTS)
    assert [answer.tolist() for answer in got] == wanted


@MESHES
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_have_the_log_probabilities_of_a_plain_computation(family, mesh):
    model, params = network(family)
    totals, lengths, valid = completer(family, mesh).candidate_logprobs(params, QUESTIONS)
    assert valid.tolist() == [
        [k < len(candidates) for k in range(4)] for _, candidates in QUESTIONS
    ]
    assert (totals[~valid] == 0).all() and (lengths[~valid] == 0).all()
    pairs = [
        (context, candidate)
        for context, candidates in QUESTIONS
        for candidate in candidates
    ]
    assert lengths[valid].tolist() == [len(candidate) for _, candidate in pairs]
    logprobs = stages.plain_logprobs(
        model, params, [np.concatenate(pair) for pair in pairs]
    )
    wanted = [
        row[-len(candidate) :].sum()
        for row, (_, candidate) in zip(logprobs, pairs, strict=True)
    ]
    np.testing.assert_allclose(totals[valid], wanted, rtol=1e-4, atol=1e-4)


def test_next_tokens_share_a_probability_of_one_and_the_likeliest_is_taken():
    params, tokens = network("gpt")[1], np.arange(tiny_models.VOCAB_SIZE, dtype=np.int32)
    questions = [(context, list(tokens[:, None])) for context in CONTEXTS]
    totals, _, valid = completer("gpt", batch_size=8).candidate_logprobs(params, questions)
    assert valid.all()
    np.testing.assert_allclose(np.exp(totals).sum(axis=1), 1.0, rtol=1e-5)
    answers = completer("gpt", eos_id=int(totals[0].argmax())).complete(params, CONTEXTS)
    assert len(answers[0]) == 0  # its first token is the end
    assert all(
        answer[0] == best
        for answer, best in zip(answers, totals.argmax(axis=1), strict=True)
        if len(answer)
    )


def test_a_total_is_a_chain_of_its_parts():
    params, measure = network("llama")[1], completer("llama")
    context, whole = (
        CONTEXTS[4],
        RNG.integers(tiny_models.VOCAB_SIZE, size=5).astype(np.int32),
    )
    steps = [
        (
            np.append(context, whole[:cut]).astype(np.int32)[-CONTEXT:],
            [whole[cut : cut + 1]],
        )
        for cut in range(4)
    ]
    (total, *_), *_ = measure.candidate_logprobs(params, [(context, [whole[:4]])])[
        0
    ].tolist()
    assert math.isclose(
        total, measure.candidate_logprobs(params, steps)[0].sum(), rel_tol=1e-4
    )


def test_of_nothing_comes_nothing():
    params = network("gpt")[1]
    assert completer("gpt").complete(params, []) == []
    assert [x.shape for x in completer("gpt").candidate_logprobs(params, [])] == [
        (0, 0)
    ] * 3


@pytest.mark.parametrize(
    ("context", "candidate", "message"),
    [
        (
            CONTEXT + 1,
            1,
            "a context has 10 tokens; between 1 and 9 are possible: change it, or context_tokens",
        ),
        (0, 1, "a context has 0 tokens"),
        (
            1,
            ANSWER + 1,
            "a candidate has 7 tokens; between 1 and 6 are possible: change it, or answer_tokens",
        ),
        (1, 0, "a candidate has 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(context, candidate, message):
    texts = np.zeros(context, np.int32), np.zeros(candidate, np.int32)
    with pytest.raises(ValueError, match=message):
        completer("gpt").candidate_logprobs(
            {}, [(CONTEXTS[0], [CONTEXTS[0][:1]]), (texts[0], [texts[1]])]
        )
    if candidate == 1:
        with pytest.raises(ValueError, match=message):
            completer("gpt").complete({}, [CONTEXTS[0], texts[0]])
