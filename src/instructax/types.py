"""The arrays that travel between the parts: field, shape, dtype.

Dims: `B` batch, `P` prompt length, `R` response length, `T` any sequence, `K` responses to
one prompt. What files and labelers know as a completion is a response once it is tokens.
Masks are boolean, `True` marks a real token, and they are made where the tokens are made:
nothing finds an end by comparing ids. Prompts are padded on the left, so a response always
starts at column `P` and every per-token array is `[B, R]`.
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

Array = jax.Array
Class = TypeVar("Class")
Params = Any  # a nested dict of float32 arrays


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def pytree(cls: type[Class]) -> type[Class]:
    """Freezes `cls` and registers its fields as children of a pytree, but for those whose
    metadata say "static"."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return jax.tree_util.register_dataclass(cls)


@pytree
class LmBatch:
    """Rows of tokens, packed or not: text and demonstrations, and rollouts and comparisons
    where they are scored."""

    tokens: Array  # i32[B, T]
    segments: Array  # i32[B, T], 0 = padding, n > 0 = a text of the row, negative = a prompt that several texts share
    positions: Array  # i32[B, T], counted from 0 within each segment; after a shared prompt, on from its end
    loss_mask: (
        Array  # b[B, T], the tokens that are predicted or valued (never the first of a row)
    )


@pytree
class Prompts:
    """Left-padded prompts."""

    tokens: Array  # i32[B, P]
    mask: Array  # b[B, P]


@pytree
class Comparisons:
    """K ranked responses to each prompt (paper, section 3.5: K = 4 … 9)."""

    prompts: Prompts
    responses: Array  # i32[B, K, R]
    mask: Array  # b[B, K, R]
    ranks: Array  # i32[B, K], 0 is best, ties share a rank
    valid: Array  # b[B, K], False = this prompt has fewer than K responses
    labeler: Array  # i32[B], -1 = unknown


@pytree
class Rollouts:
    """What the sampler made."""

    prompts: Prompts
    responses: Array  # i32[B, R]
    mask: Array  # b[B, R], the end token included
    logprobs: Array  # f32[B, R], log-probabilities as sampled
    ended: Array  # b[B], whether the end token was sampled within R tokens


@pytree
class Scored:
    """Rollouts with the three judgements of them."""

    rollouts: Rollouts
    ref_logprobs: Array  # f32[B, R], log-probabilities of the reference policy
    values: Array  # f32[B, R], the value network's estimate before each token
    scores: Array  # f32[B], the reward model's score of the whole response


@pytree
class Experience:
    """What the PPO update reads."""

    rollouts: Rollouts
    old_logprobs: Array  # f32[B, R]
    values: Array  # f32[B, R]
    advantages: Array  # f32[B, R]
    returns: Array  # f32[B, R]


@pytree
class TrainState:
    """All that training one network changes; `step` counts the finished calls of its
    stage's `update`."""

    step: Array  # i32[]
    params: Params
    opt_state: Any


@pytree
class PpoState:
    """Policy, value network, and the moving average of the policy's parameters (paper,
    appendix C.4)."""

    policy: TrainState
    value: TrainState
    ema: Params

    @property
    def step(self) -> Array:
        """i32[], finished PPO iterations."""
        return self.policy.step
