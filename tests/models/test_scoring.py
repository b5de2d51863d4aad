"""Scoring against the plain NumPy network, row by row."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import reference_model
from tests.support.scoring import sequence_scores, token_logprobs, token_values
from tests.support.tiny_models import (
    VOCAB_SIZE,
    compute,
    gpt_config,
    llama_config,
    ragged_prompts,
    random_params,
)

from instructax.models.config import ModelConfig
from instructax.models.scoring import (
    packed_logprobs,
    packed_logprobs_and_entropy,
    rollout_sequences,
)
from instructax.models.transformer import Transformer
from instructax.types import Array, Comparisons, LmBatch, Params, Prompts, Rollouts

FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}


@dataclasses.dataclass(frozen=True)
class Policy:
    config: ModelConfig
    model: Transformer
    params: Params
    # (rollouts, temperature) → (log-probabilities, entropy).
    score: Callable[..., tuple[Array, Array]]


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    config = FAMILIES[request.param]
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)

    @jax.jit
    def score(rollouts: Rollouts, temperature: Array) -> tuple[Array, Array]:
        found = packed_logprobs_and_entropy(
            model, params, rollout_sequences(rollouts), temperature=temperature
        )
        start = rollouts.prompts.tokens.shape[1]
        return found[0][:, start:], found[1][:, start:]

    return Policy(config, model, params, score)


def text_of(prompts: Prompts, row: int) -> list[int]:
    return np.asarray(prompts.tokens)[row, np.asarray(prompts.mask)[row]].tolist()


RESPONSE_LENGTHS = (4, 0, 2, 1)


def hand_made(seed: int = 0) -> Rollouts:
    """Four answers of 4, 0, 2 and 1 tokens to prompts of 3, 2, 1 and 5 tokens. Masked
    positions hold random ids."""
    responses = np.random.default_rng(seed).integers(VOCAB_SIZE, size=(4, 4))
    mask = np.arange(4)[None, :] < np.array(RESPONSE_LENGTHS)[:, None]
    return Rollouts(
        prompts=ragged_prompts((3, 2, 1, 5), columns=5),
        responses=jnp.asarray(responses, jnp.int32),
        mask=jnp.asarray(mask),
        logprobs=jnp.zeros((4, 4)),
        ended=jnp.zeros((4,), bool),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request: pytest.FixtureRequest) -> tuple[Transformer, Params]:
    model = Transformer(FAMILIES[request.param], compute(), "scalar")
    return model, random_params(model)


def test_values_precede_tokens_and_scores_are_at_the_last_token(scorer):
    model, params = scorer
    rollouts = hand_made()
    values, scores = jax.jit(
        lambda r: (token_values(model, params, r), sequence_scores(model, params, r))
    )(rollouts)
    responses = np.asarray(rollouts.responses)
    assert values.shape == (4, 4)
    assert scores.shape == (4,)
    for row, length in enumerate(RESPONSE_LENGTHS):
        prompt = text_of(rollouts.prompts, row)
        text = prompt + responses[row, :length].tolist()
        outputs = reference_model.scalars(model.config, params, text)
        # The value before token t depends on the prompt and t tokens. An empty answer is
        # scored at the end of its prompt.
        expected = [*outputs[len(prompt) - 1 : len(text) - 1], *[0.0] * (4 - length)]
        np.testing.assert_allclose(values[row], expected, rtol=1e-5, atol=1e-5)
        assert float(scores[row]) == pytest.approx(outputs[-1], rel=1e-5, abs=1e-5)


ANSWER_LENGTHS = np.array([[4, 1, 0], [2, 3, 4]])  # three responses to each of two prompts


def some_comparisons() -> Comparisons:
    return Comparisons(
        prompts=ragged_prompts((2, 4), columns=5, seed=1),
        responses=jnp.asarray(
            np.random.default_rng(2).integers(VOCAB_SIZE, size=(2, 3, 4)), jnp.int32
        ),
        mask=jnp.asarray(np.arange(4) < ANSWER_LENGTHS[..., None]),
        ranks=jnp.zeros((2, 3), jnp.int32),
        valid=jnp.ones((2, 3), bool),
        labeler=jnp.zeros((2,), jnp.int32),
    )


def test_shared_prompts_score_like_separate_rows(scorer):
    model, params = scorer
    comparisons = some_comparisons()
    scores = jax.jit(lambda c: sequence_scores(model, params, c))(comparisons)
    assert scores.shape == (2, 3)
    responses = np.asarray(comparisons.responses)
    for row, answer in np.ndindex(2, 3):
        text = (
            text_of(comparisons.prompts, row)
            + responses[row, answer, : ANSWER_LENGTHS[row, answer]].tolist()
        )
        expected = reference_model.scalars(model.config, params, text)[-1]
        assert float(scores[row, answer]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_gradients_with_a_shared_prompt_equal_those_of_separate_rows(scorer):
    model, params = scorer
    comparisons = some_comparisons()
    weights = jnp.array([0.7, -1.3, 0.4, 1.1, -0.2, 0.9])
    rows = Rollouts(
        prompts=jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), comparisons.prompts),
        responses=comparisons.responses.reshape(6, 4),
        mask=comparisons.mask.reshape(6, 4),
        logprobs=jnp.zeros((6, 4)),
        ended=jnp.zeros((6,), bool),
    )
    shared, apart = (
        jax.jit(
            jax.grad(
                lambda p, x=x: jnp.sum(weights * sequence_scores(model, p, x).reshape(-1))
            )
        )(params)
        for x in (comparisons, rows)
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(apart)) > 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), shared, apart
    )


def test_entropy_and_logprobs_match_the_reference_network(policy):
    rollouts = hand_made()
    logprobs, entropy = jax.device_get(policy.score(rollouts, 0.7))
    alone = jax.jit(
        lambda r: token_logprobs(policy.model, policy.params, r, temperature=0.7)
    )(rollouts)
    np.testing.assert_allclose(alone, logprobs, atol=1e-5)
    responses = np.asarray(rollouts.responses)
    for row, length in enumerate(RESPONSE_LENGTHS):
        prompt = text_of(rollouts.prompts, row)
        response = responses[row, :length].tolist()
        expected = reference_model.logprobs(
            policy.config, policy.params, prompt + response, 0.7
        )
        expected = expected[len(prompt) - 1 : len(prompt) - 1 + length]
        chosen = [expected[t, token] for t, token in enumerate(response)]
        np.testing.assert_allclose(
            logprobs[row], [*chosen, *[0.0] * (4 - length)], atol=1e-5
        )
        entropies = -(np.exp(expected) * expected).sum(axis=-1)
        np.testing.assert_allclose(
            entropy[row], [*entropies, *[0.0] * (4 - length)], atol=1e-5
        )


def test_packed_logprobs_equal_token_logprobs(policy):
    """A row of two documents, each a prompt of one token and its response."""
    tokens = np.random.default_rng(4).integers(VOCAB_SIZE, size=(1, 9)).astype(np.int32)
    batch = LmBatch(
        tokens=jnp.asarray(tokens),
        segments=jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        positions=jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0]]),
        loss_mask=jnp.asarray([[False, True, True, True, True, False, True, True, False]]),
    )
    logprobs = jax.jit(
        lambda b: packed_logprobs(policy.model, policy.params, b, temperature=1.0)
    )(batch)
    assert logprobs.shape == (1, 9)
    assert float(logprobs[0, 0]) == 0.0
    documents = [tokens[0, :5], tokens[0, 5:8]]
    responses = np.array([documents[0][1:], [*documents[1][1:], 0, 0]], np.int32)
    mask = jnp.asarray([[True] * 4, [True, True, False, False]])
    rollouts = Rollouts(
        prompts=Prompts(
            tokens=jnp.asarray([[d[0]] for d in documents]), mask=jnp.ones((2, 1), bool)
        ),
        responses=jnp.asarray(responses),
        mask=mask,
        logprobs=jnp.zeros((2, 4)),
        ended=jnp.zeros((2,), bool),
    )
    expected = jax.jit(
        lambda r: token_logprobs(policy.model, policy.params, r, temperature=1.0)
    )(rollouts)
    np.testing.assert_allclose(logprobs[batch.loss_mask], expected[mask], atol=1e-5)
