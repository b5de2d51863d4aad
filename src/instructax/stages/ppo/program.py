"""What configures the PPO algorithm: options and networks, which are compiled in, and
hyperparameters, which are arrays."""

import dataclasses
from typing import Literal

import jax
import optax

from instructax.models.transformer import Transformer
from instructax.training.optimizer import OptimizerConfig
from instructax.training.settings import OptimizerSettings
from instructax.types import Array, pytree


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoOptions:
    """Compile-time choices of the algorithm."""

    # The fields here are static: another value of one compiles another program.
    steps: int  # iterations
    minibatches: int  # optimizer steps of one inner epoch
    inner_epochs: int  # passes over the rollouts of one iteration
    optimizer: OptimizerConfig  # the policy's; schedules count iterations
    value_optimizer: OptimizerConfig
    # Where the ratio's denominator comes from: a forward pass of the policy before the
    # update, or the sampler, which saves that pass.
    old_logprobs: Literal["recomputed", "sampled"]
    # What `no_eos_penalty` does to the score of a response without an end token:
    # "subtract": score − penalty; "replace": −penalty, whatever the score.
    no_eos_rule: Literal["subtract", "replace"]
    whiten_rewards: bool
    whiten_advantages: bool


@pytree
class AdvantageSettings:
    """What turns scores into advantages; arrays, so that a sweep compiles once."""

    # All f32[] scalars, or f32[runs] under a sweep's vmap.
    kl_coef: Array  # f32[], β of Eq. 2
    discount: Array  # f32[]
    lambda_: Array  # f32[], of generalized advantage estimation
    no_eos_penalty: Array  # f32[], see `PpoOptions.no_eos_rule`


@pytree
class PpoSettings(AdvantageSettings):
    """Hyperparameters that a sweep varies: arrays, so that all values share one program."""

    # All f32[] (the seed i32[]), with a leading axis of runs in a sweep.
    seed: Array  # i32[], of rollouts and of the order of minibatches
    temperature: Array  # f32[]
    clip: Array  # f32[], of the probability ratio
    value_clip: Array  # f32[], of the change of a value estimate
    ptx_coef: Array  # f32[], γ of Eq. 2
    ema_decay: Array  # f32[], at every optimizer step
    optimizer: OptimizerSettings  # the policy's
    value_optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoProgram:
    """What is compiled in: networks, optimizers, shapes and options."""

    # Hashable: the program is a static argument, so equal programs are compiled once.
    options: PpoOptions
    policy: Transformer
    value_model: Transformer  # architecture of the value model and of the reward model
    # Clipping, Adam and decay; learning rates come from `PpoSettings` and the schedules.
    policy_optimizer: optax.GradientTransformation
    value_optimizer: optax.GradientTransformation
    # Used to constrain how rows are split over devices inside the program.
    mesh: jax.sharding.Mesh
    eos_id: int
    response_tokens: int  # R, the longest response
    row_tokens: int  # W, width of the rows that prompts and responses are packed into
    clip_values: bool
