"""Completions and candidate scores of contexts of different lengths equal a plain
computation."""

import math
from functools import cache

import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.config import ConfigError
from instructax.evals.completions import Completer
from instructax.models.transformer import Transformer

CONTEXT_TOKENS = 9
ANSWER_TOKENS = 6
FAMILIES = {"gpt": tiny_models.gpt_config(), "llama": tiny_models.llama_config()}
VOCAB_SIZE = tiny_models.VOCAB_SIZE
RANDOM = np.random.default_rng(0)


def random_text(length):
    return RANDOM.integers(VOCAB_SIZE, size=length).astype(np.int32)


# 11 contexts, so that batches of 4 are not all full; each with 1 to 4 candidates.
CONTEXTS = [random_text(1 + i % CONTEXT_TOKENS) for i in range(11)]
QUESTIONS = []
for i, context in enumerate(CONTEXTS):
    candidates = [random_text(1 + (i + k) % ANSWER_TOKENS) for k in range(1 + i % 4)]
    QUESTIONS.append((context, candidates))

on_meshes = pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)


@cache
def network(family: str):
    model = Transformer(FAMILIES[family], tiny_models.compute(), "tokens")
    return model, tiny_models.random_params(model)


def make_completer(
    family: str,
    mesh: tuple[int, int, int] = (1, 1, 1),
    *,
    batch_size: int = 4,
    eos_id: int = 0,
    stop_id: int = -1,
) -> Completer:
    return Completer(
        network(family)[0],
        stages.mesh_of(*mesh),
        context_tokens=CONTEXT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
        batch_size=batch_size,
        eos_id=eos_id,
        stop_token_mask=np.arange(VOCAB_SIZE) == stop_id,
    )


@cache
def plain_completions(family: str) -> list[list[int]]:
    """The ANSWER_TOKENS most likely next tokens of each context, without an end."""
    model, params = network(family)
    texts = CONTEXTS
    for _ in range(ANSWER_TOKENS):
        logits = stages.plain_outputs(model, params, texts)
        longer = []
        for i, text in enumerate(texts):
            longer.append(np.append(text, logits[i, len(text) - 1].argmax()))
        texts = longer
    return [text[-ANSWER_TOKENS:].tolist() for text in texts]


def before(completion: list[int], token: int) -> list[int]:
    """The part of `completion` before `token`."""
    return completion[: completion.index(token)] if token in completion else completion


@on_meshes
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_greedy_and_stop_before_the_end_token(family, mesh):
    plain = plain_completions(family)
    eos_id = plain[3][2]  # ends at least one completion early
    expected = [before(completion, eos_id) for completion in plain]
    assert {0 < len(completion) < ANSWER_TOKENS for completion in expected} == {True, False}
    completer = make_completer(family, mesh, eos_id=eos_id)
    found = completer.complete(network(family)[1], CONTEXTS)
    assert [completion.tolist() for completion in found] == expected


def test_a_completion_ends_with_its_first_stop_token():
    plain = plain_completions("gpt")

    # The stop token occurs before the end of a completion, and in as few as possible.
    inner = [token for completion in plain for token in completion[:-1]]
    stop_id = min(inner, key=lambda token: sum(token in answer for answer in plain))
    expected = []
    for completion in plain:
        ending = [stop_id] if stop_id in completion else []
        expected.append([*before(completion, stop_id), *ending])
    assert {len(completion) < ANSWER_TOKENS for completion in expected} == {True, False}

    sampled = {token for completion in plain for token in completion}
    unused = min(set(range(VOCAB_SIZE)) - sampled)
    completer = make_completer("gpt", eos_id=unused, stop_id=stop_id)
    found = completer.complete(network("gpt")[1], CONTEXTS)
    assert [completion.tolist() for completion in found] == expected


@on_meshes
@pytest.mark.parametrize("family", FAMILIES)
def test_candidate_logprobs_equal_a_plain_computation(family, mesh):
    model, params = network(family)
    completer = make_completer(family, mesh)
    totals, lengths, valid = completer.candidate_logprobs(params, QUESTIONS)

    num_candidates = np.array([len(candidates) for _, candidates in QUESTIONS])
    np.testing.assert_array_equal(valid, np.arange(4) < num_candidates[:, None])
    assert (totals[~valid] == 0).all() and (lengths[~valid] == 0).all()

    texts = []
    candidate_lengths = []
    for context, candidates in QUESTIONS:
        for candidate in candidates:
            texts.append(np.concatenate([context, candidate]))
            candidate_lengths.append(len(candidate))
    assert lengths[valid].tolist() == candidate_lengths
    logprobs = stages.plain_logprobs(model, params, texts)
    expected = []
    for row, length in zip(logprobs, candidate_lengths, strict=True):
        expected.append(row[-length:].sum())
    np.testing.assert_allclose(totals[valid], expected, rtol=1e-4, atol=1e-4)


def test_next_token_probabilities_sum_to_one_and_completions_take_the_best():
    params = network("gpt")[1]
    tokens = np.arange(VOCAB_SIZE, dtype=np.int32)
    questions = [(context, list(tokens[:, None])) for context in CONTEXTS]
    totals, _, valid = make_completer("gpt", batch_size=8).candidate_logprobs(
        params, questions
    )
    assert valid.all()
    np.testing.assert_allclose(np.exp(totals).sum(axis=1), 1.0, rtol=1e-5)

    eos_id = int(totals[0].argmax())
    completions = make_completer("gpt", eos_id=eos_id).complete(params, CONTEXTS)
    assert len(completions[0]) == 0  # its first token is the end token
    for completion, best in zip(completions, totals.argmax(axis=1), strict=True):
        assert len(completion) == 0 or completion[0] == best


def test_the_logprob_of_a_candidate_is_the_sum_of_its_steps():
    params = network("llama")[1]
    completer = make_completer("llama")
    context = CONTEXTS[4]
    candidate = random_text(4)
    steps = []
    for cut in range(4):
        longer = np.append(context, candidate[:cut]).astype(np.int32)
        steps.append((longer[-CONTEXT_TOKENS:], [candidate[cut : cut + 1]]))
    whole = completer.candidate_logprobs(params, [(context, [candidate])])[0]
    step_logprobs = completer.candidate_logprobs(params, steps)[0]
    assert math.isclose(whole.item(), step_logprobs.sum(), rel_tol=1e-4)


def test_empty_lists_are_allowed():
    params = network("gpt")[1]
    completer = make_completer("gpt")
    assert completer.complete(params, []) == []
    for array in completer.candidate_logprobs(params, []):
        assert array.shape == (0, 0)


@pytest.mark.parametrize(
    ("context_tokens", "candidate_tokens", "message"),
    [
        (
            CONTEXT_TOKENS + 1,
            1,
            "a context has 10 tokens; between 1 and 9 are possible: change it, or context_",
        ),
        (0, 1, "a context has 0 tokens"),
        (
            1,
            ANSWER_TOKENS + 1,
            "a candidate has 7 tokens; between 1 and 6 are possible: change it, or answer_",
        ),
        (1, 0, "a candidate has 0 tokens"),
    ],
)
def test_texts_that_do_not_fit_are_refused(context_tokens, candidate_tokens, message):
    completer = make_completer("gpt")
    context = np.zeros(context_tokens, np.int32)
    candidate = np.zeros(candidate_tokens, np.int32)
    fitting = (CONTEXTS[0], [CONTEXTS[0][:1]])
    with pytest.raises(ConfigError, match=message):
        completer.candidate_logprobs({}, [fitting, (context, [candidate])])
    if candidate_tokens == 1:
        with pytest.raises(ConfigError, match=message):
            completer.complete({}, [CONTEXTS[0], context])
