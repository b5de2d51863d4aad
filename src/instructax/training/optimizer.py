"""Adam with the paper's betas, learning-rate schedules, clipping, decay, and the moving
average of parameters.

The learning rate is not part of the optimizer: `learning_rate_at` gives it for a step and
`apply_gradients` multiplies by it, so that a sweep can hand it over as an array.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from instructax.config import check_positive, check_range
from instructax.models import merge_trees, trainable
from instructax.types import Array, Params, TrainState

MATRICES = ("kernel", "embedding", "positions", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule; steps are calls of the stage's update."""

    learning_rate: float  # the peak
    schedule: Literal["constant", "cosine", "linear"]  # after the warm-up
    warmup_steps: int
    warmup_from: float  # fraction of the peak at step 0
    final_fraction: float  # fraction of the peak after the last step (cosine, linear)
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float  # of matrices only; multiplied by the learning rate
    clip_norm: float  # largest global gradient norm; 0 = unclipped

    def __post_init__(self):
        fractions = {"warmup_from": 0, "final_fraction": 0, "beta1": 0, "beta2": 0}
        others = {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "clip_norm": 0}
        check_range(self, fractions | others, {"beta1": 1, "beta2": 1})
        check_positive(self, "epsilon")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of one step: clipping, Adam, weight decay on every matrix; the learning
    rate comes later.

    With clipping, its `update` wants the norm of the gradients, f32[], as `norm`.
    """
    parts = [optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)]
    if config.clip_norm > 0:
        parts.insert(0, clip(config.clip_norm))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts)


def clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """gradients · min(1, largest / norm), by a norm that is given: optax's own clipping
    takes a norm of its own, which in a branch of a program is another pass over all
    gradients."""

    def update(
        updates: Params, state: Any, params: Any = None, **given: Any
    ) -> tuple[Params, Any]:
        scale = jnp.minimum(1.0, largest / given["norm"])
        return jax.tree.map(lambda gradient: gradient * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decayed(params: Params) -> Params:
    """True for matrices (kernels, embeddings, adapters), False for biases and norms, judged
    by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in MATRICES, params
    )


def learning_rate_at(
    step: Array, *, peak: Array | float, config: OptimizerConfig, total_steps: int
) -> Array:
    """Learning rate of update number `step` (from 0): i32[] → f32[].

    Linear from `warmup_from` to the peak over `warmup_steps`, then constant, or a cosine or
    a line down to `final_fraction` at `total_steps`. Paper, appendix C: cosine to 10%
    without warm-up for SFT and RM; constant, with 10 iterations of warm-up from 0.1, for
    PPO.
    """
    step = step.astype(jnp.float32)
    warmup = config.warmup_from + (1.0 - config.warmup_from) * step / max(
        config.warmup_steps, 1
    )
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    }
    final = 1.0 if config.schedule == "constant" else config.final_fraction
    after = final + (1.0 - final) * shape[config.schedule]
    return peak * jnp.where(step < config.warmup_steps, warmup, after)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Params,
    learning_rate: Array,
) -> TrainState:
    """One optimizer step of what is trained: params − learning_rate · direction; none if
    the norm of the gradients is not finite: then the state stays as it is. The step count
    is the caller's."""
    norm = optax.tree.norm(gradients)
    before = trainable(state.params), state.opt_state
    # A branch leaves the state where it is in memory; a choice for every number costs a
    # twentieth of a small step.
    moved = partial(step, optimizer, gradients, learning_rate, norm)
    params, opt_state = jax.lax.cond(
        jnp.isfinite(norm), moved, lambda *before: before, *before
    )
    return dataclasses.replace(
        state, params=merge_trees(params, state.params), opt_state=opt_state
    )


def step(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    learning_rate: Array,
    norm: Array,
    params: Params,
    opt_state: optax.OptState,
) -> tuple[Params, optax.OptState]:
    """Parameters and the optimizer's state after one step by gradients of the norm `norm`,
    whatever they are."""
    update = optax.with_extra_args_support(optimizer).update
    directions, opt_state = update(gradients, opt_state, params, norm=norm)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, directions), opt_state


def skipped(*norms: Array) -> Array:
    """1 where `apply_gradients` skipped gradients of any of these norms f32[], else 0:
    f32[]."""
    return 1.0 - jnp.all(jnp.isfinite(jnp.stack(norms))).astype(jnp.float32)


def moving_average(average: Params, params: Params, decay: Array | float) -> Params:
    """decay · average + (1 − decay) · params of what is trained (paper, appendix C.4:
    0.992)."""
    moved = jax.tree.map(
        lambda a, p: decay * a + (1.0 - decay) * p, trainable(average), trainable(params)
    )
    return merge_trees(moved, average)
