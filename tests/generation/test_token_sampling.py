"""Drawing one token: frequencies, and tokens that must never be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.generation.token_sampling import float32_temperature, sample_token


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_token_frequencies_match_the_probabilities(temperature):
    """χ² of 20,000 draws of six possible tokens, summed over ten keys: 50 degrees of
    freedom, p = 0.0001 at 93."""
    draws = 20_000
    logits = np.array(
        [-np.inf, 1.0, -1.0, -np.inf, 2.0, 0.0, 0.5, -2.0, -np.inf], np.float32
    )
    weights = np.exp(logits.astype(np.float64) / temperature)
    probabilities = weights / weights.sum()
    possible = probabilities > 0
    expected = draws * probabilities[possible]
    sample = jax.jit(sample_token)
    total = 0.0
    for seed in range(10):
        keys = jax.random.split(jax.random.key(seed), draws)
        tokens, logprobs = sample(
            jnp.broadcast_to(logits, (draws, len(logits))), keys, jnp.float32(temperature)
        )
        counts = np.bincount(tokens, minlength=len(logits))
        assert counts[~possible].sum() == 0
        total += float(((counts[possible] - expected) ** 2 / expected).sum())
        np.testing.assert_allclose(
            logprobs, np.log(probabilities[np.asarray(tokens)]), atol=1e-5
        )
    assert total < 93


@pytest.mark.parametrize("vocab_size", [7, 50257])
def test_no_uniform_number_draws_a_token_of_probability_zero(monkeypatch, vocab_size):
    """Tries the extremes and the cumulative sums themselves, where rounding could draw a
    token that adds nothing."""
    rng = np.random.default_rng(1)
    logits = np.where(
        rng.random(vocab_size) < 0.7, -np.inf, rng.normal(size=vocab_size)
    ).astype(np.float32)
    logits[:2] = logits[-2:] = -np.inf
    logits[3] = 1.0
    sums = np.cumsum(jax.nn.softmax(jnp.asarray(logits)), dtype=np.float32)
    uniforms = np.concatenate(
        [[0.0, 1 - 2**-23, 1 - 2**-24], rng.choice(sums, 300)]
    ).astype(np.float32)
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24))
    monkeypatch.setattr(jax.random, "uniform", lambda number, shape: number.reshape(shape))
    repeated = jnp.broadcast_to(logits, (len(uniforms), vocab_size))
    tokens, logprobs = sample_token(repeated, jnp.asarray(uniforms), jnp.float32(1.0))
    possible = np.flatnonzero(np.isfinite(logits))
    assert np.isin(tokens, possible).all()
    assert np.isfinite(logprobs).all()
    assert int(tokens[0]) == possible[0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-8, 1e-10, 1e-30, 3e-38, 1e-45])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature, scale):
    """The limit: its log-probability is 0, or −log 2 if two tokens are the most likely."""
    logits = scale * jnp.array([[0.1, 3.0, -2.0, 2.9], [5.0, -1.0, 5.0, 4.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs = jax.jit(sample_token)(logits, keys, float32_temperature(temperature))
    assert int(tokens[0]) == 1
    assert int(tokens[1]) in (0, 2)
    np.testing.assert_allclose(logprobs, [0.0, -np.log(2.0)], atol=1e-6)


def test_temperature_zero_reports_the_log_probability_at_one():
    logits = jnp.array([[0.1, 3.0, -2.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    tokens, logprobs = sample_token(logits, keys, float32_temperature(0.0))
    assert int(tokens[0]) == 1
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)
