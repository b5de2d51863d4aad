"""Chunked log-probabilities against the full softmax, and a check that no program holds the
full logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support.programs import vocabulary_buffers
from tests.support.scoring import token_logprobs
from tests.support.stages import assert_trees_close
from tests.support.tiny_models import (
    compute,
    gpt_config,
    llama_config,
    ragged_prompts,
    random_params,
)

from instructax.masking import masked_mean
from instructax.models.config import ModelConfig
from instructax.models.logprobs import (
    compute_logits,
    loss_and_gradients,
    sequence_logprobs,
    sequence_logprobs_and_entropy,
)
from instructax.models.scoring import packed_logprobs
from instructax.models.transformer import Transformer
from instructax.types import Array, LmBatch, Params, Rollouts

BATCH = 2
LENGTH = 7
WIDTH = 5
VOCAB = 11
EVERY = np.ones((BATCH, LENGTH), bool)


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hidden f32[B, T, D], kernel f32[V, D], targets i32[B, T], and output weights f32[B,
    T]."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = rng.integers(VOCAB, size=(BATCH, LENGTH)).astype(np.int32)
    return hidden, kernel, targets, rng.normal(size=(BATCH, LENGTH)).astype(np.float32)


def softmax(hidden: np.ndarray, kernel: np.ndarray, temperature: float) -> np.ndarray:
    """The full distribution, f64[B, T, V]."""
    weights = np.exp(hidden.astype(np.float64) @ kernel.astype(np.float64).T / temperature)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_logprobs_equal_the_full_softmax(inputs, chunk):
    hidden, kernel, targets, weights = inputs

    @jax.jit
    def weighted(hidden: Array, kernel: Array, temperature: Array) -> tuple[Any, Any]:
        def total(hidden: Array, kernel: Array) -> tuple[Array, Array]:
            logprobs = sequence_logprobs(
                hidden,
                kernel,
                targets,
                EVERY,
                temperature=temperature,
                chunk=chunk,
                cap=0.0,
            )
            return jnp.sum(weights * logprobs), logprobs

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, kernel)

    for temperature in (0.7, 1.3):
        (_, logprobs), (by_hidden, by_kernel) = weighted(hidden, kernel, temperature)
        probabilities = softmax(hidden, kernel, temperature)
        chosen = np.eye(VOCAB)[targets]
        assert logprobs.dtype == jnp.float32
        np.testing.assert_allclose(
            logprobs, np.log((probabilities * chosen).sum(axis=-1)), rtol=1e-5, atol=1e-5
        )
        # ∂ log p(y) / ∂ logits = (1[y] − p) / temperature
        by_logits = weights[..., None] * (chosen - probabilities) / temperature
        np.testing.assert_allclose(by_hidden, by_logits @ kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            by_kernel, np.einsum("btv,btd->vd", by_logits, hidden), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("temperature", [1e-8, 1e-10, 1e-30, 1.2e-38])
def test_scores_at_a_tiny_temperature_are_finite(inputs, temperature):
    """The most likely token has log-probability 0, and all others a very low one."""
    hidden, kernel, _, _ = inputs
    best = np.argmax(hidden @ kernel.T, axis=-1).astype(np.int32)
    keywords = {"temperature": temperature, "chunk": 3, "cap": 0.0}
    logprobs, entropy = sequence_logprobs_and_entropy(
        hidden, kernel, best, EVERY, **keywords
    )
    np.testing.assert_allclose(logprobs, 0.0, atol=1e-6)
    np.testing.assert_allclose(entropy, 0.0, atol=1e-6)
    others = sequence_logprobs(hidden, kernel, (best + 1) % VOCAB, EVERY, **keywords)
    assert np.isfinite(others).all()
    assert (np.asarray(others) < -1e5).all()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_masked_positions_have_no_effect(inputs, chunk):
    hidden, kernel, targets, _ = inputs
    mask = np.array([[False, True, True, False, False, True, False], [False] * 6 + [True]])
    poisoned = np.where(mask[..., None], hidden, np.nan).astype(np.float32)
    whole = sequence_logprobs(
        hidden, kernel, targets, EVERY, temperature=0.7, chunk=chunk, cap=0.0
    )
    some = sequence_logprobs(
        poisoned, kernel, targets, mask, temperature=0.7, chunk=chunk, cap=0.0
    )
    np.testing.assert_allclose(some, np.where(mask, whole, 0.0), rtol=1e-5, atol=1e-6)
    nothing = sequence_logprobs(
        hidden, kernel, targets, ~EVERY, temperature=0.7, chunk=chunk, cap=0.0
    )
    assert not np.any(nothing)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_loss_and_gradients_equal_the_full_softmax(inputs, chunk):
    """A loss with one factor per token; the rows have three and four unmasked tokens."""
    hidden, kernel, targets, weights = inputs
    mask = np.array(
        [
            [False, True, True, False, False, True, False],
            [True, True, False, False, True, True, False],
        ]
    )

    def loss_of(logprobs, mask, factors):
        loss = masked_mean(factors * jnp.exp(logprobs), mask)
        return loss, {"mean": masked_mean(logprobs, mask)}

    def whole(hidden, kernel):
        logprobs = jax.nn.log_softmax(hidden @ kernel.T / 0.7, axis=-1)
        return loss_of(
            jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0],
            mask,
            weights,
        )

    settings = {"temperature": 0.7, "chunk": chunk, "cap": 0.0}
    found = jax.jit(partial(loss_and_gradients, loss_of, **settings))(
        hidden, kernel, targets, mask, weights
    )
    (loss, metrics), (by_hidden, by_kernel) = jax.value_and_grad(
        whole, argnums=(0, 1), has_aux=True
    )(hidden, kernel)
    for got, wanted in zip(found, (loss, metrics, by_hidden, by_kernel), strict=True):
        assert_trees_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 100])
def test_soft_caps_equal_the_full_softmax(inputs, chunk):
    """log softmax(1.5 · tanh(logits / 1.5) / 0.7), and its gradients through the caps."""
    hidden, kernel, targets, weights = inputs

    def whole(hidden, kernel):
        logprobs = jax.nn.log_softmax(
            1.5 * jnp.tanh(hidden @ kernel.T / 1.5) / 0.7, axis=-1
        )
        logprobs = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
        return masked_mean(weights * logprobs, EVERY), logprobs

    def loss_of(logprobs, mask, factors):
        return masked_mean(factors * logprobs, mask), {}

    (loss, logprobs), gradients = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(
        hidden, kernel
    )
    settings = {"temperature": 0.7, "chunk": chunk, "cap": 1.5}
    found = jax.jit(partial(loss_and_gradients, loss_of, **settings))(
        hidden, kernel, targets, EVERY, weights
    )
    np.testing.assert_allclose(found[0], loss, rtol=1e-5)
    assert_trees_close(found[2:], gradients, rtol=1e-4, atol=1e-6)
    for function in (
        sequence_logprobs,
        lambda *x, **y: sequence_logprobs_and_entropy(*x, **y)[0],
    ):
        np.testing.assert_allclose(
            function(hidden, kernel, targets, EVERY, **settings),
            logprobs,
            rtol=1e-5,
            atol=1e-6,
        )


def test_an_empty_mask_has_zero_loss_and_gradient(inputs):
    hidden, kernel, targets, _ = inputs

    def loss_of(logprobs, mask, _):
        return masked_mean(logprobs, mask), {}

    loss, _, *gradients = loss_and_gradients(
        loss_of, hidden, kernel, targets, ~EVERY, None, temperature=1.0, chunk=3, cap=0.0
    )
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("chunk", [3, 100])
def test_entropy(inputs, chunk):
    hidden, kernel, targets, _ = inputs
    for temperature in (0.7, 1.0):
        logprobs, entropy = sequence_logprobs_and_entropy(
            hidden, kernel, targets, EVERY, temperature=temperature, chunk=chunk, cap=0.0
        )
        probabilities = softmax(hidden, kernel, temperature)
        np.testing.assert_allclose(
            entropy, -(probabilities * np.log(probabilities)).sum(axis=-1), rtol=1e-5
        )
        same = sequence_logprobs(
            hidden, kernel, targets, EVERY, temperature=temperature, chunk=chunk, cap=0.0
        )
        np.testing.assert_allclose(logprobs, same, rtol=1e-5, atol=1e-6)


def test_entropy_of_known_distributions():
    """Equal logits give log V; one dominant logit gives 0."""
    kernel = jnp.zeros((8, 1)).at[3, 0].set(1.0)
    targets = jnp.array([[3, 3]])
    hidden = jnp.array([[[0.0], [200.0]]])
    logprobs, entropy = sequence_logprobs_and_entropy(
        hidden, kernel, targets, EVERY[:1, :2], temperature=1.0, chunk=1, cap=0.0
    )
    np.testing.assert_allclose(logprobs, [[-np.log(8), 0.0]], atol=1e-6)
    np.testing.assert_allclose(entropy, [[np.log(8), 0.0]], atol=1e-6)


def test_logits_are_summed_in_float32():
    """In bfloat16, 256 + 1 is 256, because its values are 2 apart there."""
    logits = compute_logits(jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256.0, 1.0]]), 0.0)
    assert logits.dtype == jnp.float32
    assert logits.tolist() == [[257.0]]


# Tokens per row, prompt tokens, and a vocabulary that divides no other size.
TEXT = 64
PROMPT = 8
PRIME = 97


def rows_score(config: ModelConfig, chunk: int) -> Callable[[Params], Array]:
    """Log-probabilities of all tokens of rows, and their gradient."""
    model = Transformer(config, compute(head_chunk=chunk), "tokens")
    ids = jnp.zeros((BATCH, TEXT), jnp.int32)
    batch = LmBatch(tokens=ids, segments=ids + 1, positions=ids, loss_mask=ids == 0)
    return lambda params: jnp.sum(packed_logprobs(model, params, batch, temperature=1.0))


def responses_score(config: ModelConfig, chunk: int) -> Callable[[Params], Array]:
    """Log-probabilities of responses, and their gradient."""
    model = Transformer(config, compute(head_chunk=chunk), "tokens")
    ids = jnp.zeros((BATCH, TEXT), jnp.int32)
    prompts = ragged_prompts((3, 8), columns=PROMPT)
    zeros = jnp.zeros(ids.shape)
    rollouts = Rollouts(
        prompts=prompts,
        responses=ids,
        mask=ids == 0,
        logprobs=zeros,
        ended=jnp.ones((BATCH,), bool),
    )
    return lambda params: jnp.sum(token_logprobs(model, params, rollouts, temperature=1.0))


def largest_buffer(score: Callable[..., Any], config: ModelConfig, chunk: int) -> int:
    """Size of the largest array with a vocabulary axis in a score's value and gradient."""
    params = jax.eval_shape(lambda: random_params(Transformer(config, compute(), "tokens")))
    compiled = jax.jit(jax.value_and_grad(score(config, chunk))).lower(params).compile()
    return max(vocabulary_buffers(compiled.as_text() or "", PRIME))


@pytest.mark.parametrize(
    ("score", "family"), [(rows_score, gpt_config), (responses_score, llama_config)]
)
def test_no_buffer_spans_positions_and_vocabulary(score, family):
    config = family(vocab_size=PRIME, max_length=TEXT + PROMPT, num_layers=1)
    # A chunk's logits, or the kernel itself if that is larger.
    assert largest_buffer(score, config, 4) == max(
        BATCH * 4 * PRIME, PRIME * config.embed_dim
    )


def test_a_full_softmax_would_be_detected():
    config = gpt_config(vocab_size=PRIME, max_length=TEXT + PROMPT, num_layers=1)
    assert largest_buffer(responses_score, config, TEXT) == BATCH * TEXT * PRIME
