"""The arrays that the parts of the program exchange: field, shape, dtype.

Dimensions: `B` batch, `P` prompt length, `R` response length, `T` any sequence, `K`
responses per prompt. A completion in a file is called a response once it is tokenized.
Masks are boolean; `True` marks a real token. They are created together with the tokens: no
code finds an end by comparing ids. Prompts are left-padded, so a response always starts at
column `P` and every per-token array is `[B, R]`.
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
    """Class decorator: makes `cls` a frozen dataclass and registers it as a pytree.

    Fields whose metadata contain "static" are not children of the pytree.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    return jax.tree_util.register_dataclass(cls)


@pytree
class LmBatch:
    """Rows of tokens, packed or not: text, demonstrations, and what is scored."""

    tokens: Array  # i32[B, T]
    # i32[B, T]: 0 is padding, n > 0 a text of the row, negative a prompt that several texts
    # share.
    segments: Array
    # i32[B, T], counted from 0 within each segment; a text with a shared prompt continues
    # the prompt's positions.
    positions: Array
    # b[B, T], the tokens that are predicted or valued; never the first of a row.
    loss_mask: Array


@pytree
class Prompts:
    """Left-padded prompts."""

    tokens: Array  # i32[B, P]
    mask: Array  # b[B, P]


@pytree
class Comparisons:
    """K ranked responses per prompt (paper, section 3.5: K = 4 … 9)."""

    prompts: Prompts
    responses: Array  # i32[B, K, R]
    mask: Array  # b[B, K, R]
    # i32[B, K], 0 is best, ties share a rank. Arrays count from 0, files of comparisons
    # (`data.schema.Comparison`) from 1.
    ranks: Array
    valid: Array  # b[B, K], False where the prompt has fewer than K responses
    labeler: Array  # i32[B], -1 = unknown


@pytree
class Rollouts:
    """Sampled responses."""

    prompts: Prompts
    responses: Array  # i32[B, R]
    mask: Array  # b[B, R], the end token included
    logprobs: Array  # f32[B, R], log-probabilities as sampled
    ended: Array  # b[B], whether the end token was sampled within R tokens


@pytree
class Scored:
    """Rollouts scored by the reference policy, the value model and the reward model."""

    rollouts: Rollouts
    ref_logprobs: Array  # f32[B, R], log-probabilities under the reference policy
    values: Array  # f32[B, R], the value model's estimate before each token
    scores: Array  # f32[B], the reward model's score of the whole response


@pytree
class Experience:
    """The input of the PPO update."""

    rollouts: Rollouts
    old_logprobs: Array  # f32[B, R]
    values: Array  # f32[B, R]
    advantages: Array  # f32[B, R]
    returns: Array  # f32[B, R]


@pytree
class TrainState:
    """Everything that training one network changes."""

    step: Array  # i32[], finished calls of the stage's `update`
    params: Params
    opt_state: Any


@pytree
class PpoState:
    """Everything that PPO changes."""

    policy: TrainState
    value: TrainState
    ema: Params  # moving average of the policy's parameters (paper, appendix C.4)

    @property
    def step(self) -> Array:
        """i32[], finished PPO iterations."""
        return self.policy.step
