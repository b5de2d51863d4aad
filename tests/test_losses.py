"""The four losses: worked examples, plain references and their gradients, identities, and
masked tokens.

In each loss the trained array is the first argument and the mask is the last one. The
shared tests rely on that.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from tests.support import references

from instructax import losses

GARBAGE = [1e30, -1e30, np.nan, np.inf, -np.inf]
KEYWORDS = {
    "next_token_loss": {},
    "pairwise_ranking_loss": {},
    "clipped_policy_loss": {"clip": 0.2},
    "clipped_value_loss": {"clip": 0.2},
    "unclipped_value_loss": {"clip": None},
}
every_loss = pytest.mark.parametrize("name", KEYWORDS)
every_garbage = pytest.mark.parametrize("garbage", GARBAGE)


def call(name: str, *arguments, module=losses, **keywords) -> tuple:
    """(loss,) or (loss, accuracy or clipped fraction), from the library or the
    references."""
    function = getattr(module, name.replace("unclipped", "clipped"))
    result = function(*arguments, **(keywords or KEYWORDS[name]))
    return result if isinstance(result, tuple) else (result,)


def case(
    name: str, seed: int, columns: int = 6, dtype=jnp.float32
) -> tuple[jax.Array, ...]:
    """Random arguments: five rows, one of them empty. Rankings also have ties, and one row
    with only ties."""
    rng = np.random.default_rng(seed)
    mask = references.ragged_mask(rng, 5, columns)
    numbers = [jnp.asarray(rng.normal(0.0, 0.5, mask.shape), dtype) for _ in range(3)]
    if name == "next_token_loss":
        return numbers[0], jnp.asarray(mask)
    if name == "pairwise_ranking_loss":
        ranks = rng.integers(0, columns, mask.shape)
        ranks[1] = 1
        return (
            numbers[0],
            jnp.asarray(ranks, jnp.int32),
            jnp.asarray(rng.permuted(mask, axis=1)),
        )
    return *numbers, jnp.asarray(mask)


@functools.cache
def jitted(name: str):
    return jax.jit(lambda *arguments: call(name, *arguments))


@functools.cache
def gradient_function(name: str):
    return jax.jit(jax.grad(lambda *arguments: call(name, *arguments)[0]))


def loss_gradient(name: str, *arguments) -> jax.Array:
    """Gradient of the loss with respect to its first argument."""
    return gradient_function(name)(*arguments)


def test_next_token_loss_by_hand():
    logprobs = jnp.array([[-1.3, -0.7, -9.0], [-0.2, -9.0, -9.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    # 1.3 + 0.7 + 0.2 over three tokens; the mean of the two row means would be 0.6.
    np.testing.assert_allclose(losses.next_token_loss(logprobs, mask), 2.2 / 3, rtol=1e-6)


def test_ranking_loss_by_hand():
    scores = jnp.array(
        [
            [0.7, -1.3, 0.2, 5.0],
            [0.4, 0.4, -0.1, 1.1],
            [0.3, 0.9, -2.0, 4.0],
            [0.1, 0.2, 0.3, 0.4],
        ]
    )
    ranks = jnp.array([[0, 1, 1, 2], [1, 0, 2, 2], [3, 3, 3, 3], [0, 1, 2, 3]])
    valid = jnp.array(
        [[True, True, True, False], [True] * 4, [True] * 4, [False, True, False, False]]
    )
    # Row 0: differences 0.7 + 1.3 = 2.0 and 0.7 - 0.2 = 0.5 (two answers tie, the fourth is
    # invalid). Row 1: second over first 0.0; first over third 0.5, over fourth -0.7; second
    # over third 0.5, over fourth -0.7. Rows 2 and 3 have no pair. The losses log(1 +
    # e^-difference) of 2.0, 0.5, 0.0, -0.7, to ten places:
    at_2 = 0.1269280110
    at_half = 0.4740769842
    at_0 = 0.6931471806
    at_minus_07 = 1.1031860489
    expected = ((at_2 + at_half) / 2 + (at_0 + 2 * at_half + 2 * at_minus_07) / 5) / 2
    loss, accuracy = losses.pairwise_ranking_loss(scores, ranks, valid)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # Both pairs of row 0, two of row 1: equal scores count as wrong.
    np.testing.assert_allclose(accuracy, 4 / 7, rtol=1e-6)


def test_policy_loss_by_hand():
    ratios = jnp.array([[1.5, 1.5, 0.5, 0.5], [1.1, 1.0, 9.0, 0.1]])
    old_logprobs = jnp.array([[-1.3, -0.7, -2.1, -0.4], [-3.2, -0.9, -5.0, -5.0]])
    advantages = jnp.array([[0.7, -1.3, 0.7, -1.3], [0.4, 0.0, 50.0, -50.0]])
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    # (-A ratio, -A clipped ratio), the larger one starred: (-1.05, -0.84*), (1.95*, 1.56),
    # (-0.35*, -0.56), (0.65, 1.04*), and the equal ones (-0.44, -0.44), (0, 0).
    loss, clipped_fraction = losses.clipped_policy_loss(
        old_logprobs + jnp.log(ratios), old_logprobs, advantages, mask, clip=0.2
    )
    np.testing.assert_allclose(loss, (-0.84 + 1.95 - 0.35 + 1.04 - 0.44) / 6, rtol=1e-5)
    np.testing.assert_allclose(clipped_fraction, 2 / 6, rtol=1e-6)
    actual = loss_gradient(
        "clipped_policy_loss",
        old_logprobs + jnp.log(ratios),
        old_logprobs,
        advantages,
        mask,
    )
    np.testing.assert_allclose(
        actual, [[0, 1.95 / 6, -0.35 / 6, 0], [-0.44 / 6, 0, 0, 0]], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_by_hand(clip):
    values = jnp.array([[1.0, -1.3, 0.6], [0.2, 30.0, 30.0]])
    old_values = jnp.array([[0.5, -0.5, 0.5], [0.9, 0.0, 0.0]])
    returns = jnp.array([[0.7, -1.4, 0.0], [0.2, -9.0, -9.0]])
    mask = jnp.array([[True] * 3, [True, False, False]])
    # Clipped values 0.7, -0.7, 0.6, 0.7; squares (0.09*, 0), (0.01, 0.49*), (0.36, 0.36),
    # (0, 0.25*).
    expected_loss, expected_fraction = (1.19 / 8, 2 / 4) if clip else (0.46 / 8, 0.0)
    loss, clipped_fraction = losses.clipped_value_loss(
        values, old_values, returns, mask, clip=clip
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(clipped_fraction, expected_fraction, rtol=1e-6)


@every_loss
@pytest.mark.parametrize("seed", range(8))
def test_equal_to_the_plain_reference(name, seed):
    arguments = case(name, seed, columns=2 + seed if name == "pairwise_ranking_loss" else 6)
    plain = [np.asarray(argument) for argument in arguments]
    result = jitted(name)(*arguments)
    np.testing.assert_allclose(
        result, call(name, *plain, module=references), rtol=1e-5, atol=1e-6
    )
    expected = references.gradient(
        lambda x: call(name, x, *plain[1:], module=references)[0], plain[0]
    )
    np.testing.assert_allclose(
        loss_gradient(name, *arguments), expected, rtol=1e-4, atol=1e-6
    )


@every_loss
def test_gradients_agree_with_finite_differences(name):
    trained, *rest = case(name, seed=0)
    check_grads(
        lambda x: call(name, x, *rest)[0], (trained,), order=1, atol=1e-2, rtol=1e-2
    )


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_returns_float32_scalars_computed_in_float32(name, dtype):
    arguments = case(name, seed=4)
    scaled = [(2 * x).astype(dtype) if x.dtype == jnp.float32 else x for x in arguments]
    result = call(name, *scaled)
    assert [(x.dtype, x.shape) for x in result] == [(jnp.float32, ())] * len(result)
    expected = call(name, *[np.asarray(x) for x in scaled], module=references)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@every_loss
@every_garbage
def test_masked_tokens_change_neither_loss_nor_gradient(name, garbage):
    arguments = case(name, seed=4)
    mask = arguments[-1]
    dirty = [
        jnp.where(mask, x, garbage) if x.dtype == jnp.float32 else x for x in arguments
    ]
    dirty = [jnp.where(mask, x, -7) if x.dtype == jnp.int32 else x for x in dirty]
    np.testing.assert_array_equal(call(name, *dirty), call(name, *arguments))
    np.testing.assert_array_equal(
        loss_gradient(name, *dirty), loss_gradient(name, *arguments)
    )
    np.testing.assert_array_equal(loss_gradient(name, *dirty)[~mask], 0.0)


@every_loss
@pytest.mark.parametrize("garbage", [1.0, *GARBAGE])
def test_empty_mask_gives_zeros(name, garbage):
    arguments = [
        jnp.full_like(x, garbage) if x.dtype == jnp.float32 else x
        for x in case(name, seed=5)
    ]
    arguments[-1] = jnp.zeros_like(arguments[-1])
    np.testing.assert_array_equal(call(name, *arguments), 0.0)
    np.testing.assert_array_equal(loss_gradient(name, *arguments), 0.0)


@every_loss
def test_jit_and_vmap_give_the_same_results(name):
    cases = [case(name, seed) for seed in range(3)]
    expected = [call(name, *arguments) for arguments in cases]
    np.testing.assert_allclose(jitted(name)(*cases[0]), expected[0], rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    mapped = jax.vmap(lambda *x: call(name, *x))(*stacked)
    np.testing.assert_allclose(np.stack(mapped, axis=-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clipped_policy_loss", "clipped_value_loss"])
def test_clip_may_be_an_array(name):
    arguments = case(name, seed=6)
    clips = (0.05, 0.2, 0.5)
    mapped = jax.jit(jax.vmap(lambda clip: call(name, *arguments, clip=clip)))(
        jnp.array(clips)
    )
    expected = [call(name, *arguments, clip=clip) for clip in clips]
    np.testing.assert_allclose(np.stack(mapped, axis=-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (2, 7)])
def test_two_answers_give_minus_log_sigmoid(ranks):
    loss, accuracy = losses.pairwise_ranking_loss(
        jnp.array([[0.7, -1.3]]), jnp.array([ranks]), jnp.ones((1, 2), bool)
    )
    difference = 2.0 if ranks[0] < ranks[1] else -2.0
    np.testing.assert_allclose(loss, -math.log(1 / (1 + math.exp(-difference))), rtol=1e-6)
    assert accuracy == float(ranks[0] < ranks[1])


def test_ranking_depends_on_differences_and_not_on_the_order_of_answers():
    scores, ranks, valid = case("pairwise_ranking_loss", seed=1)
    expected = losses.pairwise_ranking_loss(scores, ranks, valid)
    shifted = losses.pairwise_ranking_loss(scores + 3.7, ranks, valid)
    np.testing.assert_allclose(shifted, expected, rtol=1e-5)
    reversed_ = losses.pairwise_ranking_loss(
        scores[:, ::-1], ranks[:, ::-1], valid[:, ::-1]
    )
    np.testing.assert_allclose(reversed_, expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss_gradient("pairwise_ranking_loss", scores, ranks, valid).sum(axis=1),
        0.0,
        atol=1e-6,
    )


def test_ties_give_no_loss_and_no_slope():
    tied = jnp.array([[0.7, -1.3, 0.2]]), jnp.full((1, 3), 2), jnp.ones((1, 3), bool)
    np.testing.assert_array_equal(losses.pairwise_ranking_loss(*tied), 0.0)
    np.testing.assert_array_equal(loss_gradient("pairwise_ranking_loss", *tied), 0.0)


def test_every_prompt_with_a_pair_has_the_same_weight():
    arguments = case("pairwise_ranking_loss", seed=6)
    rows = [
        losses.pairwise_ranking_loss(*(x[i : i + 1] for x in arguments))[0]
        for i in range(5)
    ]
    # Row 1 is a single tie and row 4 is empty.
    assert [row > 0 for row in rows] == [True, False, True, True, False]
    expected = (rows[0] + rows[2] + rows[3]) / 3
    np.testing.assert_allclose(
        losses.pairwise_ranking_loss(*arguments)[0], expected, rtol=1e-5
    )


def test_one_answer_has_no_pair():
    one = jnp.array([[0.7], [-1.3]]), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool)
    np.testing.assert_array_equal(losses.pairwise_ranking_loss(*one), 0.0)


def test_ordered_pairs_by_hand():
    # Response 0 is best, 1 and 2 tie, 3 is invalid: 0 beats 1 and 2, nothing else.
    ranks = jnp.array([[0, 1, 1, 2]])
    valid = jnp.array([[True, True, True, False]])
    expected = np.zeros((1, 4, 4), bool)
    expected[0, 0, 1] = True
    expected[0, 0, 2] = True
    np.testing.assert_array_equal(losses.ordered_pairs(ranks, valid), expected)


def test_every_trained_token_has_the_same_gradient():
    logprobs, mask = case("next_token_loss", seed=1)
    gradient = loss_gradient("next_token_loss", logprobs, mask)
    np.testing.assert_allclose(gradient, jnp.where(mask, -1.0, 0.0) / mask.sum(), rtol=1e-6)


def test_a_wide_clip_is_none():
    arguments = case("clipped_value_loss", seed=1)
    wide = losses.clipped_value_loss(*arguments, clip=1e9)
    none = losses.clipped_value_loss(*arguments, clip=None)
    np.testing.assert_allclose(wide, none, rtol=1e-6)


def test_without_a_change_of_values_the_gradient_is_the_error():
    values, _, returns, mask = case("clipped_value_loss", seed=2)
    arguments = (values, values, returns, mask)
    actual = loss_gradient("clipped_value_loss", *arguments)
    errors = jnp.where(mask, values - returns, 0.0)
    np.testing.assert_allclose(actual, errors / mask.sum(), rtol=1e-5)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    _, logprobs, advantages, mask = case("clipped_policy_loss", seed=1)
    loss, clipped_fraction = losses.clipped_policy_loss(
        logprobs, logprobs, advantages, mask, clip=0.2
    )
    np.testing.assert_allclose(
        loss, -references.masked_mean(np.asarray(advantages), np.asarray(mask)), rtol=1e-5
    )
    assert clipped_fraction == 0.0
    actual = loss_gradient("clipped_policy_loss", logprobs, logprobs, advantages, mask)
    np.testing.assert_allclose(
        actual, jnp.where(mask, -advantages, 0.0) / mask.sum(), rtol=1e-5
    )


@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_huge_score_differences_stay_finite(difference):
    arguments = jnp.array([[difference, 0.0]]), jnp.array([[0, 1]]), jnp.ones((1, 2), bool)
    np.testing.assert_allclose(
        losses.pairwise_ranking_loss(*arguments)[0], max(0.0, -difference)
    )
    pull = 0.0 if difference > 0 else 1.0
    np.testing.assert_allclose(
        loss_gradient("pairwise_ranking_loss", *arguments), [[-pull, pull]]
    )


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "loss"),
    [
        (0.7, 1e3, -0.84),
        (0.7, -1e3, 0.0),
        (-1.3, -1e3, 1.04),
        (0.0, 1e3, 0.0),
        (0.0, -1e3, 0.0),
    ],
)
def test_huge_ratios_keep_a_finite_loss_finite(advantage, log_ratio, loss):
    arguments = (
        jnp.array([[log_ratio]]),
        jnp.zeros((1, 1)),
        jnp.full((1, 1), advantage),
        jnp.ones((1, 1), bool),
    )
    np.testing.assert_allclose(
        losses.clipped_policy_loss(*arguments, clip=0.2)[0], loss, rtol=1e-6
    )
    np.testing.assert_array_equal(loss_gradient("clipped_policy_loss", *arguments), 0.0)


def test_a_ratio_beyond_float32_gives_a_finite_loss():
    arguments = (
        jnp.array([[1e3]]),
        jnp.zeros((1, 1)),
        jnp.array([[-1.3]]),
        jnp.ones((1, 1), bool),
    )
    assert 1e30 < losses.clipped_policy_loss(*arguments, clip=0.2)[0] < jnp.inf
    assert jnp.isfinite(loss_gradient("clipped_policy_loss", *arguments)).all()
