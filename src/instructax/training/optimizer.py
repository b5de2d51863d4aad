"""Adam with the paper's betas, learning-rate schedules, gradient clipping, weight decay,
and the moving average of parameters.

The learning rate is not part of the optimizer. `learning_rate_at` computes it for a step
and `apply_gradients` multiplies by it, so that a sweep can pass the peak as an array.

The paper names Adam's betas, the schedules and the average's decay (appendix C). Gradient
clipping, weight decay and epsilon are not in the paper, nor is skipping a step whose
gradients are not finite.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from instructax.config import check_positive, check_range
from instructax.models.lora import merge_trees, trainable
from instructax.types import Array, Params, TrainState

# Last path component of the parameters that are matrices or tables, which decay.
MATRICES = ("kernel", "embedding", "positions", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its learning-rate schedule; a step is one call of the stage's update."""

    # The paper's Adam has beta1 = 0.9 and beta2 = 0.95 (appendix C).
    learning_rate: float  # the peak
    schedule: Literal["constant", "cosine", "linear"]  # after the warm-up
    warmup_steps: int
    warmup_from: float  # fraction of the peak at step 0
    final_fraction: float  # fraction of the peak after the last step (cosine, linear)
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float  # of matrices only; multiplied by the learning rate
    clip_norm: float  # largest global gradient norm; 0 = no clipping

    def __post_init__(self):
        at_least = {
            "learning_rate": 0,
            "warmup_steps": 0,
            "warmup_from": 0,
            "final_fraction": 0,
            "beta1": 0,
            "beta2": 0,
            "weight_decay": 0,
            "clip_norm": 0,
        }
        check_range(self, at_least, {"beta1": 1, "beta2": 1})
        check_positive(self, "epsilon")


def without_peak(config: OptimizerConfig) -> OptimizerConfig:
    """The config with a learning rate of 0.

    Programs hold this one. The peak is their argument, so those that differ in nothing else
    are equal and compiled once.
    """
    return dataclasses.replace(config, learning_rate=0.0)


# Cached: programs are compared by their optimizers, so equal configs must give the same
# object for `jax.jit` to reuse a compiled program.
@functools.cache
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, Adam and weight decay: everything but the learning rate.

    With clipping, its `update` takes the global norm of the gradients as `norm` f32[].
    """
    # The order matters: clip the raw gradient, then scale by Adam's moments, then decay the
    # weights, which Adam must not rescale (AdamW, Loshchilov and Hutter 2019).
    transforms: list[Any] = []
    if config.clip_norm > 0:
        transforms.append(clip_by_given_norm(config.clip_norm))
    # Scales to unit step size; the learning rate is applied in `apply_gradients`.
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    transforms.append(adam)
    if config.weight_decay > 0:
        decay = optax.add_decayed_weights(config.weight_decay, mask=weight_decay_mask)
        transforms.append(decay)
    return optax.chain(*transforms)


def clip_by_given_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """gradients · min(1, max_norm / norm), where the caller passes the norm.

    `optax.clip_by_global_norm` computes the norm itself. Inside the branch of
    `apply_gradients` that would be a second pass over all gradients.
    """

    def update(
        updates: Params, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Params, Any]:
        # A norm of 0 gives infinity here, and a scale of 1.
        scale = jnp.minimum(1.0, max_norm / extra["norm"])
        return jax.tree.map(lambda gradient: gradient * scale, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def weight_decay_mask(params: Params) -> Params:
    """True for matrices (kernels, embeddings, adapters), False for biases and norms.

    Decided by name, because stacked layers give biases a second axis too.
    """

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) in MATRICES

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def learning_rate_at(
    step: Array, *, peak: Array | float, config: OptimizerConfig, total_steps: int
) -> Array:
    """Learning rate of update number `step`, counted from 0.

    Linear from `warmup_from` to the peak over `warmup_steps`, then constant, or a cosine or
    a line down to `final_fraction` at `total_steps`. Paper, appendix C: cosine to 10%
    without warm-up for SFT and RM; constant after 10 iterations of warm-up from 0.1 for
    PPO. The shapes are those of `optax.schedules`, which round differently in the last bit.

    Args:
      step: i32[].
      peak: f32[], the largest learning rate.
      config: the schedule.
      total_steps: the length of the run.

    Returns:
      f32[]
    """
    # float32 holds all integers up to 2²⁴ exactly.
    step = step.astype(jnp.float32)
    warmup_steps = config.warmup_steps
    start = config.warmup_from
    # Fraction of the peak, which reaches 1 at step `warmup_steps`.
    warmup = start + (1.0 - start) * step / max(warmup_steps, 1)

    # Fraction of the steps after the warm-up that are done: f32[].
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    # Each falls from 1 to 0 (or stays at 1) as progress goes from 0 to 1.
    shapes = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    }
    # A constant schedule ignores `final_fraction`.
    final = 1.0 if config.schedule == "constant" else config.final_fraction
    decayed = final + (1.0 - final) * shapes[config.schedule]
    # The peak is the only factor that a sweep varies.
    return peak * jnp.where(step < warmup_steps, warmup, decayed)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Params,
    learning_rate: Array,
) -> TrainState:
    """One optimizer step on the trainable parameters.

    A step with non-finite gradients is skipped: parameters and optimizer state stay as they
    are. (`optax.apply_if_finite` accepts them after a number of failures; the run should
    stop instead, see `runtime.nonfinite`.) The caller advances `state.step`.

    Args:
      optimizer: from `make_optimizer`.
      state: parameters and optimizer state before the step.
      gradients: of the trainable parameters.
      learning_rate: f32[].
    """
    # One pass over the gradients serves the finite check and the clipping.
    norm = optax.tree.norm(gradients)
    # Without clipping no transform takes `norm`; this drops it then.
    optimizer = optax.with_extra_args_support(optimizer)

    def take_step(params: Params, opt_state: Any) -> tuple[Params, Any]:
        # Directions point uphill and have no learning rate yet.
        directions, opt_state = optimizer.update(gradients, opt_state, params, norm=norm)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, params, directions)
        return params, opt_state

    # Both branches must return the same structure and dtypes.
    def skip_step(params: Params, opt_state: Any) -> tuple[Params, Any]:
        return params, opt_state

    # A branch updates in place; `where` on each number would cost 5% of a small step.
    params, opt_state = jax.lax.cond(
        jnp.isfinite(norm), take_step, skip_step, trainable(state.params), state.opt_state
    )
    # Frozen parameters are put back beside the trained ones.
    params = merge_trees(params, state.params)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def skipped(*norms: Array) -> Array:
    """1 if `apply_gradients` skipped a step for any of these gradient norms, else 0.

    f32[] each → f32[].
    """
    # Finite exactly if all gradients are and the sum of their squares does not overflow.
    all_finite = jnp.all(jnp.isfinite(jnp.stack(norms)))
    return 1.0 - all_finite.astype(jnp.float32)


def moving_average(average: Params, params: Params, decay: Array | float) -> Params:
    """decay · average + (1 − decay) · params, over the trainable parameters.

    The paper's decay is 0.992 (appendix C.4).
    """
    # optax computes step_size · first + (1 − step_size) · second. Passing `decay` as the
    # step size of the *average* avoids rounding 1 − (1 − decay).
    averaged = optax.incremental_update(trainable(average), trainable(params), decay)
    return merge_trees(averaged, average)
