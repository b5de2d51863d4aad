"""The arithmetic of one iteration on two responses, worked out by hand, and its
diagnostics.

The example has two rows of three tokens. The last token of the second row is padding and
holds junk. With r the log-ratio of policy to reference:

    r       = [1/2, 0, -1/4], [1, 1/2, ·]      scores = 2, 1
    values  = [1, 1/2, 0], [1/4, 1/2, ·]       β = 1/2, λ = 1/2, discount 1, penalty 1/2

The second response does not end with EOS.
"""

import dataclasses
import math
import statistics
from fractions import Fraction as F

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.stages.ppo.experience import (
    NO_EOS_RULES,
    diagnostics,
    make_experience,
    replace_by_penalty,
    subtract_penalty,
)
from instructax.stages.ppo.program import AdvantageSettings
from instructax.types import Prompts, Rollouts, Scored

JUNK = np.nan
MASK = np.array([[True, True, True], [True, True, False]])
LOG_RATIOS = np.array([[1 / 2, 0, -1 / 4], [1, 1 / 2, JUNK]], np.float32)
LOGPROBS = np.array([[-1, -2, -3], [-1 / 2, -1, JUNK]], np.float32)
SAMPLED = LOGPROBS + np.array([[0, 1 / 8, 0], [-1 / 4, 0, 0]], np.float32)
VALUES = np.array([[1, 1 / 2, 0], [1 / 4, 1 / 2, JUNK]], np.float32)
ENTROPY = np.array([[1, 2, 3], [4, 5, JUNK]], np.float32)

# r_t = −β · r, plus the score at the last real token: row 1 ends with 1/8 + 2, row 2 with
# −1/4 + (1 − 1/2).
REWARDS = [[F(-1, 4), F(0), F(17, 8)], [F(-1, 2), F(1, 4), F(0)]]
# δ = [−1/4 + 1/2 − 1, 0 + 0 − 1/2, 17/8 − 0], [−1/2 + 1/2 − 1/4, 1/4 + 0 − 1/2];  A_t = δ_t
# + A_{t+1} / 2.
ADVANTAGES = [[F(-15, 32), F(9, 16), F(17, 8)], [F(-3, 8), F(-1, 4), F(0)]]
RETURNS = [[F(17, 32), F(17, 16), F(17, 8)], [F(-1, 8), F(1, 4), F(0)]]  # A + v


def settings(**changes: float) -> AdvantageSettings:
    values = {
        "kl_coef": 0.5,
        "discount": 1.0,
        "lambda_": 0.5,
        "no_eos_penalty": 0.5,
        **changes,
    }
    return AdvantageSettings(**{name: jnp.float32(value) for name, value in values.items()})


def example(log_ratios=LOG_RATIOS, values=VALUES) -> Scored:
    prompts = Prompts(
        tokens=jnp.zeros((2, 2), jnp.int32), mask=jnp.array([[False, True], [True, True]])
    )
    rollouts = Rollouts(
        prompts=prompts,
        responses=jnp.ones((2, 3), jnp.int32),
        mask=jnp.asarray(MASK),
        logprobs=jnp.asarray(SAMPLED),
        ended=jnp.array([True, False]),
    )
    return Scored(
        rollouts=rollouts,
        ref_logprobs=jnp.asarray(LOGPROBS - log_ratios),
        values=jnp.asarray(values),
        scores=jnp.array([2.0, 1.0]),
    )


def experience_of(
    scored: Scored,
    *,
    no_eos_rule="subtract",
    whiten_rewards=False,
    whiten_advantages=False,
    **changes: float,
):
    return make_experience(
        scored,
        jnp.asarray(LOGPROBS),
        settings(**changes),
        no_eos_rule=no_eos_rule,
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
    )


def metrics(scored: Scored) -> dict[str, float]:
    experience, rewards = experience_of(scored)
    found = diagnostics(
        scored, jnp.asarray(LOGPROBS), jnp.asarray(ENTROPY), rewards, experience.returns
    )
    assert all(x.shape == () and x.dtype == jnp.float32 for x in found.values())
    return {name: float(x) for name, x in found.items()}


def floats(rows: list[list[F]]) -> np.ndarray:
    return np.array([[float(x) for x in row] for row in rows], np.float32)


def test_by_hand():
    scored = example()
    experience, rewards = experience_of(scored)
    np.testing.assert_allclose(rewards, floats(REWARDS), rtol=1e-6)
    np.testing.assert_allclose(experience.advantages, floats(ADVANTAGES), rtol=1e-6)
    np.testing.assert_allclose(experience.returns, floats(RETURNS), rtol=1e-6)
    # The scorer's, not the sampler's.
    np.testing.assert_array_equal(experience.old_logprobs, LOGPROBS)
    np.testing.assert_array_equal(experience.values, scored.values)
    assert experience.rollouts is scored.rollouts


def test_only_responses_that_did_not_end_are_penalised():
    gentle = experience_of(example(), no_eos_penalty=0.0)[1]
    harsh = experience_of(example(), no_eos_penalty=3.0)[1]
    np.testing.assert_allclose(gentle - harsh, [[0, 0, 0], [0, 3, 0]], rtol=1e-6)


# Scores 2 and 1, penalty 1/2; only the second response did not end. With β = 1/2 and r =
# 1/2 at its last token, its last reward is −1/4 + (1 − 1/2) or −1/4 − 1/2.
NO_EOS_SCORES = {"subtract": [F(2), F(1, 2)], "replace": [F(2), F(-1, 2)]}
LAST_REWARDS = {"subtract": F(1, 4), "replace": F(-3, 4)}


@pytest.mark.parametrize("rule", ["subtract", "replace"])
def test_no_eos_rules_by_hand(rule):
    scored = example()
    penalize = NO_EOS_RULES[rule]
    found = penalize(scored.scores, scored.rollouts.ended, settings().no_eos_penalty)
    np.testing.assert_array_equal(found, [float(x) for x in NO_EOS_SCORES[rule]])
    rewards = experience_of(scored, no_eos_rule=rule)[1]
    np.testing.assert_allclose(rewards[0], floats(REWARDS)[0], rtol=1e-6)
    assert float(rewards[1, 1]) == float(LAST_REWARDS[rule])


def test_replacing_ignores_the_score_and_subtracting_keeps_its_order():
    """A harmless and a harmful response, both truncated."""
    scores = jnp.array([3.0, -5.0])
    ended = jnp.array([False, False])
    replaced = replace_by_penalty(scores, ended, 1.0)
    subtracted = subtract_penalty(scores, ended, 1.0)
    np.testing.assert_array_equal(replaced, [-1.0, -1.0])
    np.testing.assert_array_equal(subtracted, [2.0, -6.0])


def test_a_policy_that_is_the_reference_gets_the_score_alone():
    scored = example(log_ratios=np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(
        experience_of(scored, no_eos_penalty=0.0)[1], [[0, 0, 2], [0, 1, 0]]
    )
    found = metrics(scored)
    assert (found["kl"], found["kl_k3"], found["kl_standard_error"], found["ref_gap"]) == (
        0,
        0,
        0,
        0,
    )


def test_whitened_advantages():
    """Mean 0 and variance 1 over the five real tokens, zero on the padding. Rewards and
    returns are unchanged."""
    plain, rewards = experience_of(example())
    white, same = experience_of(example(), whiten_advantages=True)
    real = np.asarray(plain.advantages)[MASK]
    np.testing.assert_allclose(
        np.asarray(white.advantages)[MASK], (real - real.mean()) / real.std(), rtol=1e-5
    )
    assert white.advantages[1, 2] == 0
    np.testing.assert_array_equal(white.returns, plain.returns)
    np.testing.assert_array_equal(same, rewards)


def test_whitened_rewards():
    """Only the scale of the rewards changes. λ = 1 and values 0 make the returns
    rewards-to-go. The rewards returned for the log are not whitened."""
    nothing = np.zeros((2, 3), np.float32)
    white, rewards = experience_of(
        example(values=nothing), whiten_rewards=True, lambda_=1.0
    )
    np.testing.assert_allclose(rewards, floats(REWARDS), rtol=1e-6)
    real = floats(REWARDS)[MASK]
    scaled = nothing.copy()
    scaled[MASK] = (real - real.mean()) / real.std() + real.mean()
    to_go = np.cumsum(scaled[:, ::-1], axis=1)[:, ::-1] * MASK
    np.testing.assert_allclose(white.returns, to_go, rtol=1e-5)


def test_settings_are_arguments_of_one_program():
    compiled = jax.jit(
        lambda s, scored: make_experience(
            scored,
            jnp.asarray(LOGPROBS),
            s,
            no_eos_rule="subtract",
            whiten_rewards=False,
            whiten_advantages=True,
        )
    )
    for kl_coef in (0.0, 0.5):
        compiled(
            settings(kl_coef=kl_coef, lambda_=kl_coef, no_eos_penalty=kl_coef), example()
        )
    assert compiled._cache_size() == 1


def test_diagnostics_by_hand():
    found = metrics(example())
    k3 = [
        math.exp(-1 / 2) - 1 + 1 / 2 + 0 + math.exp(1 / 4) - 1 - 1 / 4,
        math.exp(-1) - 1 + 1 + math.exp(-1 / 2) - 1 + 1 / 2,
    ]
    residuals = [
        a
        for row, real in zip(ADVANTAGES, MASK, strict=True)
        for a, m in zip(row, real, strict=True)
        if m
    ]
    returns = [
        r
        for row, real in zip(RETURNS, MASK, strict=True)
        for r, m in zip(row, real, strict=True)
        if m
    ]
    expected = {
        "kl": F(7, 8),  # of 1/4 and 3/2
        "kl_standard_error": 5 / 8 / math.sqrt(2),
        "kl_k3": sum(k3) / 2,
        "ref_gap": F(9, 20),  # (1/2 + 0 + 1/4 + 1 + 1/2) / 5
        "sampler_gap": F(3, 40),  # (1/8 + 1/4) / 5
        "sampler_gap_max": F(1, 4),
        "entropy": 3,  # (1 + 2 + 3 + 4 + 5) / 5
        "scores": F(3, 2),  # before the penalty
        "scores_std": F(1, 2),
        "rewards": F(13, 16),  # of 15/8 and −1/4
        "values": F(9, 20),
        "explained_variance": 1
        - statistics.pvariance(residuals) / statistics.pvariance(returns),
        "response_length": F(5, 2),
        "response_length_max": 3,
        "ended_share": F(1, 2),
        "tokens": 8,  # 5 sampled tokens, 3 prompt tokens
    }
    assert found == pytest.approx(
        {name: float(x) for name, x in expected.items()}, rel=1e-5
    )


def test_k3_is_positive_where_k1_is_not():
    found = metrics(example(log_ratios=np.full((2, 3), -1 / 2, np.float32)))
    assert found["kl"] == -5 / 4
    assert found["kl_k3"] == pytest.approx(5 / 2 * (math.exp(1 / 2) - 3 / 2), rel=1e-5)


def test_one_extreme_token_leaves_the_figures_finite():
    log_ratios = np.array([[-200.0, 0, 0], [0, 300.0, 0]], np.float32)
    assert all(math.isfinite(x) for x in metrics(example(log_ratios=log_ratios)).values())


def explained(values: np.ndarray, returns: np.ndarray) -> float:
    nothing = jnp.zeros((2, 3))
    found = diagnostics(
        example(values=values), nothing, nothing, nothing, jnp.asarray(returns)
    )
    return float(found["explained_variance"])


def test_explained_variance():
    returns = floats(RETURNS)
    assert explained(returns, returns) == 1.0
    # A constant error is not variance.
    assert explained(returns + 5, returns) == pytest.approx(1.0)
    assert explained(np.full((2, 3), 7.0, np.float32), returns) == pytest.approx(
        0.0, abs=1e-6
    )
    assert explained(-returns, returns) == pytest.approx(-3.0)  # residuals of 2 · returns
    # Returns without variance: finite, not NaN.
    assert explained(returns, np.ones((2, 3), np.float32)) < 0


def test_rollouts_without_a_token_give_zeros():
    scored = example()
    scored = dataclasses.replace(
        scored,
        rollouts=dataclasses.replace(
            scored.rollouts, mask=jnp.zeros((2, 3), bool), ended=jnp.zeros(2, bool)
        ),
    )
    experience, rewards = experience_of(scored, whiten_rewards=True, whiten_advantages=True)
    for x in (rewards, experience.advantages, experience.returns):
        np.testing.assert_array_equal(x, np.zeros((2, 3)))
