"""KL-penalized rewards and generalized advantages: worked examples, references, identities
and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import references

from instructax import advantages

SEEDS = range(6)
GARBAGE = [1e30, -1e30, np.nan, np.inf, -np.inf]
# (discount, lambda_)
SETTINGS = [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0), (0.0, 0.9)]


def reward_case(seed: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """scores, logprobs, ref_logprobs and mask; rows of random length, the last row
    empty."""
    rng = np.random.default_rng(seed)
    mask = references.ragged_mask(rng, 5, 7)
    # A hole: the last real token is the last unmasked one, not the one at index count - 1.
    mask[0, 2] = False
    scores = jnp.asarray(rng.normal(0.0, 2.0, 5), dtype)
    logprobs = jnp.asarray(-rng.exponential(1.5, mask.shape), dtype)
    ref_logprobs = jnp.asarray(-rng.exponential(1.5, mask.shape), dtype)
    return scores, logprobs, ref_logprobs, jnp.asarray(mask)


def advantage_case(seed: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """rewards, values and mask; rows of random length, the last row empty."""
    rng = np.random.default_rng(seed)
    mask = references.ragged_mask(rng, 5, 7)
    mask[0, 0] = False  # padding before the response too: no advantage flows back into it
    rewards, values = (jnp.asarray(rng.normal(size=mask.shape), dtype) for _ in range(2))
    return rewards, values, jnp.asarray(mask)


def with_garbage(mask: jax.Array, garbage: float, *arrays: jax.Array) -> list[jax.Array]:
    return [jnp.where(mask, array, garbage) for array in arrays]


def numpy_of(arrays) -> list[np.ndarray]:
    return [np.asarray(array) for array in arrays]


def test_last_real_by_hand():
    # Padding on either side and a hole; an empty row has no last token.
    mask = jnp.array([[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
    expected = [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(advantages.last_real(mask), expected)


def test_rewards_by_hand():
    scores = jnp.array([0.7, -1.3, 9.9])
    logprobs = jnp.array([[-1.0, -0.5, -2.0], [-0.3, -5.0, -5.0], [-5.0, -5.0, -5.0]])
    ref_logprobs = jnp.array([[-1.4, -0.2, -1.8], [-0.8, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    # Log-ratios 0.4, -0.3, -0.2 and 0.5, times -0.1. The score 0.7 is added to the third
    # token and -1.3 to the only one; the row with score 9.9 has no token.
    expected = [[-0.04, 0.03, 0.72], [-1.35, 0.0, 0.0], [0.0, 0.0, 0.0]]
    rewards = advantages.kl_penalized_rewards(
        scores, logprobs, ref_logprobs, mask, kl_coef=0.1
    )
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-7)


def test_advantages_by_hand():
    rewards = jnp.array(
        [
            [0.1, -0.2, 0.7, 50.0],
            [-1.3, 50.0, 50.0, 50.0],
            [50.0] * 4,
            [0.1, -0.2, 0.0, 0.7],
        ]
    )
    values = jnp.array(
        [[0.5, 0.3, -0.4, 50.0], [0.7, 50.0, 50.0, 50.0], [50.0] * 4, [0.5, 0.3, 0.3, -0.4]]
    )
    mask = jnp.array(
        [[True, True, True, False], [True, False, False, False], [False] * 4, [True] * 4]
    )
    # Row 0, from its end: deltas 0.7 + 0.4 = 1.1; -0.2 - 0.36 - 0.3 = -0.86; 0.1 + 0.27 -
    # 0.5 = -0.13; discount times lambda is 0.45: -0.86 + 0.495 = -0.365; -0.13 - 0.16425 =
    # -0.29425. Row 3, from its end: deltas 1.1; -0.36 - 0.3 = -0.66; -0.2 + 0.27 - 0.3 =
    # -0.23; -0.13; advantages 1.1;
    # -0.66 + 0.495 = -0.165; -0.23 - 0.07425 = -0.30425; -0.13 - 0.1369125 = -0.2669125.
    expected_advantages = [
        [-0.29425, -0.365, 1.1, 0.0],
        [-2.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [-0.2669125, -0.30425, -0.165, 1.1],
    ]
    expected_returns = [
        [0.20575, -0.065, 0.7, 0.0],
        [-1.3, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.2330875, -0.00425, 0.135, 0.7],
    ]
    result = advantages.generalized_advantages(
        rewards, values, mask, discount=0.9, lambda_=0.5
    )
    np.testing.assert_allclose(result[0], expected_advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result[1], expected_returns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rewards_equal_the_plain_reference(seed, dtype):
    arguments = reward_case(seed, dtype)
    rewards = advantages.kl_penalized_rewards(*arguments, kl_coef=0.02)
    assert rewards.dtype == jnp.float32
    expected = references.kl_penalized_rewards(*numpy_of(arguments), kl_coef=0.02)
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("discount", "lambda_"), SETTINGS)
def test_advantages_equal_the_plain_reference(seed, dtype, discount, lambda_):
    arguments = advantage_case(seed, dtype)
    result = advantages.generalized_advantages(
        *arguments, discount=discount, lambda_=lambda_
    )
    expected = references.generalized_advantages(
        *numpy_of(arguments), discount=discount, lambda_=lambda_
    )
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score_dtype", [jnp.float32, jnp.int32])
@pytest.mark.parametrize("logprob_dtype", [jnp.float32, jnp.int32])
def test_integers_truncate_no_reward(score_dtype, logprob_dtype):
    scores = jnp.array([0.7 if score_dtype == jnp.float32 else 2], score_dtype)
    logprobs = jnp.array([[-1, -3]], logprob_dtype)
    ref_logprobs = jnp.array([[-2, -2]], logprob_dtype)
    rewards = advantages.kl_penalized_rewards(
        scores, logprobs, ref_logprobs, jnp.ones((1, 2), bool), kl_coef=0.25
    )
    assert rewards.dtype == jnp.float32
    np.testing.assert_allclose(rewards, [[-0.25, 0.25 + float(scores[0])]], rtol=1e-6)


def test_integer_rewards_and_values():
    mask = jnp.ones((1, 2), bool)
    result = advantages.generalized_advantages(
        jnp.array([[0, 3]]), jnp.array([[1, 2]]), mask, discount=0.9, lambda_=0.5
    )
    # Deltas 0 + 1.8 - 1 = 0.8 and 3 - 2 = 1; 0.8 + 0.45 = 1.25.
    np.testing.assert_allclose(result[0], [[1.25, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(result[1], [[2.25, 3.0]], rtol=1e-6)


def test_policy_equal_to_reference_rewards_only_the_last_real_token():
    scores, logprobs, _, mask = reward_case(0)
    rewards = advantages.kl_penalized_rewards(scores, logprobs, logprobs, mask, kl_coef=0.5)
    last = mask & (jnp.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(rewards, jnp.where(last, scores[:, None], 0.0))


def test_without_kl_penalty_the_logprobs_do_not_matter():
    scores, logprobs, ref_logprobs, mask = reward_case(1)
    np.testing.assert_array_equal(
        advantages.kl_penalized_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.0),
        advantages.kl_penalized_rewards(scores, logprobs, logprobs, mask, kl_coef=0.5),
    )


def test_no_discount_and_lambda_one_give_reward_to_go_minus_value():
    rewards, values, mask = advantage_case(0)
    result, returns = advantages.generalized_advantages(
        rewards, values, mask, discount=1.0, lambda_=1.0
    )
    reward_to_go = np.cumsum((np.asarray(rewards) * mask)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(
        result, np.where(mask, reward_to_go - values, 0.0), atol=1e-5
    )
    np.testing.assert_allclose(returns, np.where(mask, reward_to_go, 0.0), atol=1e-5)


def test_lambda_zero_gives_the_one_step_delta():
    rewards, values, mask = advantage_case(1)
    result, _ = advantages.generalized_advantages(
        rewards, values, mask, discount=0.9, lambda_=0.0
    )
    next_values = np.pad(np.where(mask, values, 0.0)[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(
        result, np.where(mask, rewards + 0.9 * next_values - values, 0.0), atol=1e-6
    )


def test_a_reward_at_the_end_decays_geometrically():
    rewards = jnp.zeros((1, 6)).at[0, 3].set(-1.3)
    mask = jnp.arange(6)[None, :] < 4
    result, returns = advantages.generalized_advantages(
        rewards, jnp.zeros((1, 6)), mask, discount=0.9, lambda_=0.8
    )
    np.testing.assert_allclose(
        result, [[-1.3 * 0.72**3, -1.3 * 0.72**2, -1.3 * 0.72, -1.3, 0.0, 0.0]], rtol=1e-5
    )
    np.testing.assert_array_equal(result, returns)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_tokens_do_not_matter(garbage):
    scores, logprobs, ref_logprobs, mask = reward_case(2)
    # A row without a token has no score either.
    dirty_scores = jnp.where(mask.any(axis=1), scores, garbage)
    rewards = advantages.kl_penalized_rewards(
        scores, logprobs, ref_logprobs, mask, kl_coef=0.1
    )
    logprobs, ref_logprobs = with_garbage(mask, garbage, logprobs, ref_logprobs)
    dirty = advantages.kl_penalized_rewards(
        dirty_scores, logprobs, ref_logprobs, mask, kl_coef=0.1
    )
    np.testing.assert_array_equal(dirty, rewards)
    np.testing.assert_array_equal(dirty[~mask], 0.0)

    rewards, values, mask = advantage_case(2)
    clean = advantages.generalized_advantages(
        rewards, values, mask, discount=0.9, lambda_=0.95
    )
    rewards, values = with_garbage(mask, garbage, rewards, values)
    dirty = advantages.generalized_advantages(
        rewards, values, mask, discount=0.9, lambda_=0.95
    )
    for actual, wanted in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(actual, wanted)
        np.testing.assert_array_equal(actual[~mask], 0.0)


def test_jit_and_vmap_give_the_same_results():
    rewards_of = functools.partial(advantages.kl_penalized_rewards, *reward_case(3))
    coefs = jnp.array([0.0, 0.02, 0.5])
    expected = np.stack([rewards_of(kl_coef=float(coef)) for coef in coefs])
    np.testing.assert_allclose(
        jax.vmap(lambda coef: rewards_of(kl_coef=coef))(coefs),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )
    jitted = jax.jit(advantages.kl_penalized_rewards)(*reward_case(3), kl_coef=coefs[1])
    np.testing.assert_allclose(jitted, expected[1], rtol=1e-5, atol=1e-6)

    advantages_of = functools.partial(advantages.generalized_advantages, *advantage_case(3))
    discounts, lambdas = jnp.array(SETTINGS).T
    expected = [
        np.stack(x)
        for x in zip(
            *(advantages_of(discount=d, lambda_=x) for d, x in SETTINGS), strict=True
        )
    ]
    mapped = jax.vmap(
        lambda discount, lambda_: advantages_of(discount=discount, lambda_=lambda_)
    )(discounts, lambdas)
    jitted = jax.jit(advantages.generalized_advantages)(
        *advantage_case(3), discount=discounts[1], lambda_=lambdas[1]
    )
    for i in range(2):
        np.testing.assert_allclose(mapped[i], expected[i], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jitted[i], expected[i][1], rtol=1e-5, atol=1e-5)
