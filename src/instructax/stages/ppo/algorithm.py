"""Proximal policy optimization from human feedback, and PPO-ptx (paper, section 3.5 and
appendix C.4).

Follows the paper: rollouts at temperature 1, per-token KL penalty inside the reward, the
score at the end, a separate value network that starts as the reward model with head and
bias, clipped losses, one inner epoch over minibatches, PPO and pretraining gradients summed
into one Adam step, constant learning rate after 10 iterations of warm-up, averaged weights.
The paper leaves open, and settings decide: λ, whitening, value clipping, the penalty for
endless responses. The average moves at every optimizer step; the pretraining loss is a mean
per token, so that `ptx_coef` has another scale than a sum per document would give it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructax import rng, sharding
from instructax.generation import generate, prefill_padding
from instructax.losses import clipped_policy_loss, clipped_value_loss
from instructax.masking import masked_mean, token_count
from instructax.models import Transformer, merge_lora, merge_trees, trainable
from instructax.models.scoring import (
    packed_logprobs,
    packed_logprobs_and_entropy,
    packed_loss_and_gradients,
    packed_outputs,
    packed_values,
    rollout_sequences,
    select_last_token,
)
from instructax.models.sequence_packing import (
    PackedLayout,
    pack,
    pack_and_map,
    plan_packing,
)
from instructax.stages.ppo.experience import AdvantageSettings, diagnostics, make_experience
from instructax.training.accumulation import (
    accumulate,
    accumulate_packed,
    microbatch_count,
    microbatch_weights,
    next_token_gradients,
    scale_tree,
    split_microbatches,
)
from instructax.training.optimizer import (
    OptimizerConfig,
    apply_gradients,
    learning_rate_at,
    moving_average,
    skipped,
)
from instructax.types import (
    Array,
    Experience,
    LmBatch,
    Params,
    PpoState,
    Prompts,
    Rollouts,
    Scored,
    TrainState,
    pytree,
)


@pytree
class PpoSettings:
    """What a sweep varies: arrays, so that every value runs the same compiled programs."""

    seed: Array  # i32[], of rollouts and of the order of minibatches
    rewards: AdvantageSettings
    temperature: Array  # f32[]
    clip: Array  # f32[], of the ratio
    value_clip: Array  # f32[], of the change of a value estimate
    ptx_coef: Array  # f32[], γ of Eq. 2
    learning_rate: Array  # f32[], the policy's peak
    value_learning_rate: Array  # f32[], the value network's peak
    ema_decay: Array  # f32[]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoProgram:
    """What is compiled in: networks, optimizers, shapes, and the choices that change the
    program."""

    policy: Transformer
    scorer: Transformer  # reward model and value network
    policy_optimizer: optax.GradientTransformation
    value_optimizer: optax.GradientTransformation
    policy_schedule: OptimizerConfig
    value_schedule: OptimizerConfig
    mesh: jax.sharding.Mesh
    eos_id: int
    total_steps: int  # iterations
    response_tokens: int  # the longest response
    inner_epochs: int
    minibatches: int
    row_tokens: int  # W of the rows that prompts and responses are packed into
    rescores: bool  # whether the policy scores its rollouts before the update; else `old_logprobs` are the sampler's
    whiten_rewards: bool
    whiten_advantages: bool
    clip_values: bool

    @property
    def packing(self) -> dict[str, Any]:
        """How prompts and responses are packed: arguments of `rows.lay_out`."""
        return {"width": self.row_tokens, "compute": self.policy.compute, "mesh": self.mesh}


def rollout(
    program: PpoProgram,
    params: Params,
    prompts: Prompts,
    step: Array,
    settings: PpoSettings,
) -> Rollouts:
    """Samples one response to each prompt; sample i of iteration `step` has a random key of
    its own."""
    samples = jnp.arange(prompts.tokens.shape[0])
    keys = rng.sample_keys(rng.step_key(settings.seed, "rollout", step), samples)
    return generate(
        program.policy,
        merge_lora(params),
        prompts,
        keys,
        length=program.response_tokens,
        temperature=settings.temperature,
        eos_id=program.eos_id,
        groups=sharding.num_row_shards(program.mesh),
    )


def score(
    program: PpoProgram,
    state: PpoState,
    ref_params: Params,
    reward_params: Params,
    rollouts: Rollouts,
    settings: PpoSettings,
) -> tuple[Experience, Scored, dict[str, Array]]:
    """The judgements of the rollouts (by reference, value and reward model, and by the
    policy if it `rescores`), and the advantages they give.

    Without `rescores` the entropy is the estimate −log π of the sampled tokens.
    """

    def judge(rows: LmBatch) -> tuple[Array, ...]:
        temperature, policy = settings.temperature, program.policy
        others = (
            packed_logprobs(policy, ref_params, rows, temperature=temperature),
            packed_values(program.scorer, state.value.params, rows),
            packed_outputs(program.scorer, reward_params, rows),
        )
        if not program.rescores:
            return others
        return *others, *packed_logprobs_and_entropy(
            policy, state.policy.params, rows, temperature=temperature
        )

    judged, layout = pack_and_map(judge, rollout_sequences(rollouts), **program.packing)
    ref_logprobs, values, outputs, *own = judged
    start = rollouts.prompts.tokens.shape[1]
    scored = Scored(
        rollouts=rollouts,
        ref_logprobs=ref_logprobs[:, start:],
        values=values[:, start:],
        scores=select_last_token(outputs, rollouts),
    )
    logprobs, entropy = (
        (x[:, start:] for x in own) if own else (rollouts.logprobs, -rollouts.logprobs)
    )
    experience, rewards = make_experience(
        scored,
        logprobs,
        settings.rewards,
        whiten_rewards=program.whiten_rewards,
        whiten_advantages=program.whiten_advantages,
    )
    figures = diagnostics(scored, logprobs, entropy, rewards, experience.returns)
    if not program.rescores:  # the gap is then that of the update's first ratios
        figures = {
            name: x for name, x in figures.items() if not name.startswith("sampler_gap")
        }
    figures["prefill_padding"] = prefill_padding(
        program.policy, rollouts.prompts, sharding.num_row_shards(program.mesh)
    )
    return experience, scored, figures | {"padding": layout.padding_fraction()}


@pytree
class Minibatch:
    """The rollouts of one optimizer step, packed: what belongs to a response token stands
    where it does."""

    rows: LmBatch  # [lines, ways, W], the loss mask marks response tokens
    old_logprobs: Array  # f32[lines, ways, W], as the three below
    values: Array
    advantages: Array
    returns: Array
    layout: PackedLayout


def packed(program: PpoProgram, experience: Experience) -> Minibatch:
    """Experience [n, ...] as a minibatch."""
    batch = rollout_sequences(experience.rollouts)
    layout = plan_packing(batch.segments != 0, **program.packing)
    start = experience.rollouts.prompts.tokens.shape[1]
    names = ("old_logprobs", "values", "advantages", "returns")
    arrays = {
        name: layout.scatter(jnp.pad(getattr(experience, name), ((0, 0), (start, 0))))
        for name in names
    }
    return Minibatch(rows=pack(batch, layout), layout=layout, **arrays)


def update(
    program: PpoProgram,
    state: PpoState,
    experience: Experience,
    text: LmBatch | None,
    settings: PpoSettings,
) -> tuple[PpoState, dict[str, Array]]:
    """One iteration's optimizer steps: `inner_epochs` × `minibatches` of them, in one scan.

    `text` holds the pretraining rows of all of these steps, or is None for PPO without
    them. Metrics are means over the steps, except `first_*`, which are of the first.
    """
    steps = program.inner_epochs * program.minibatches
    step = state.step
    rows_of_text = None if text is None else split_microbatches(text, steps, program.mesh)
    minibatches = jax.lax.map(
        partial(packed, program), _minibatches(program, experience, settings.seed, step)
    )
    inputs = (minibatches, rows_of_text)
    policy_rate = learning_rate_at(
        step,
        peak=settings.learning_rate,
        config=program.policy_schedule,
        total_steps=program.total_steps,
    )
    value_rate = learning_rate_at(
        step,
        peak=settings.value_learning_rate,
        config=program.value_schedule,
        total_steps=program.total_steps,
    )

    def inner_step(
        state: PpoState, inputs: tuple[Minibatch, LmBatch | None]
    ) -> tuple[PpoState, dict[str, Array]]:
        minibatch, text = inputs
        policy_gradients, metrics = policy_step(
            program, state.policy.params, minibatch, settings
        )
        if text is not None:
            ptx_gradients, metrics["ptx_loss"] = ptx_step(
                program, state.policy.params, text
            )
            policy_gradients = jax.tree.map(
                lambda g, ptx: g + settings.ptx_coef * ptx, policy_gradients, ptx_gradients
            )
        value_gradients, value_metrics = value_step(
            program, state.value.params, minibatch, settings
        )
        policy = apply_gradients(
            program.policy_optimizer, state.policy, policy_gradients, policy_rate
        )
        value = apply_gradients(
            program.value_optimizer, state.value, value_gradients, value_rate
        )
        ema = moving_average(state.ema, policy.params, settings.ema_decay)
        metrics |= value_metrics
        norms = optax.tree.norm(policy_gradients), optax.tree.norm(value_gradients)
        metrics["policy_grad_norm"], metrics["value_grad_norm"] = norms
        metrics |= {
            "update_padding": minibatch.layout.padding_fraction(),
            "skipped": skipped(*norms),
        }
        return PpoState(policy=policy, value=value, ema=ema), metrics

    state, metrics = jax.lax.scan(inner_step, state, inputs)
    first = {
        f"first_{name}": metrics[name][0] for name in ("ratio_gap", "clipped_fraction")
    }
    means = {name: jnp.mean(x) for name, x in metrics.items()}
    state = dataclasses.replace(state, policy=_tick(state.policy), value=_tick(state.value))
    return state, {
        **means,
        **first,
        "learning_rate": policy_rate,
        "value_learning_rate": value_rate,
    }


def iteration(
    program: PpoProgram,
    state: PpoState,
    ref_params: Params,
    reward_params: Params,
    prompts: Prompts,
    text: LmBatch | None,
    settings: PpoSettings,
) -> tuple[PpoState, dict[str, Array], Rollouts, Array]:
    """Rollout, scores and update as one function: (new state, metrics, rollouts, scores
    f32[B]).

    `jax.vmap` of it over state, prompts, text and settings is a sweep: runs of other seeds,
    coefficients and learning rates side by side in one program, each with the numbers that
    it has alone, up to rounding.
    """
    rollouts = rollout(program, state.policy.params, prompts, state.step, settings)
    experience, scored, metrics = score(
        program, state, ref_params, reward_params, rollouts, settings
    )
    state, update_metrics = update(program, state, experience, text, settings)
    return state, {**metrics, **update_metrics}, rollouts, scored.scores


def _tick(state: TrainState) -> TrainState:
    return dataclasses.replace(state, step=state.step + 1)


def _minibatches(
    program: PpoProgram, experience: Experience, seed: Array, step: Array
) -> Experience:
    """The rows in a new order for each inner epoch: [B, ...] → [inner_epochs · minibatches,
    rows, ...]."""
    key = rng.step_key(seed, "minibatches", step)
    rows = experience.advantages.shape[0]
    epochs = jax.vmap(lambda key: jax.random.permutation(key, rows))(
        jax.random.split(key, program.inner_epochs)
    )
    shuffled = jax.tree.map(lambda x: jnp.take(x, epochs.reshape(-1), axis=0), experience)
    return split_microbatches(
        shuffled, program.inner_epochs * program.minibatches, program.mesh
    )


def policy_step(
    program: PpoProgram, params: Params, minibatch: Minibatch, settings: PpoSettings
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the clipped policy loss over one minibatch, and its figures."""

    def loss_of(
        logprobs: Array, mask: Array, extras: tuple[Array, Array]
    ) -> tuple[Array, dict[str, Array]]:
        old_logprobs, advantages = extras
        loss, clipped_fraction = clipped_policy_loss(
            logprobs, old_logprobs, advantages, mask, clip=settings.clip
        )
        log_ratios = jnp.where(mask, logprobs - old_logprobs, 0.0)
        return loss, {
            "clipped_fraction": clipped_fraction,
            "update_kl": masked_mean(jnp.expm1(log_ratios) - log_ratios, mask),
            "ratio_gap": masked_mean(jnp.abs(jnp.expm1(log_ratios)), mask),
        }

    def gradients_of(part: tuple[LmBatch, Any]) -> tuple[Params, dict[str, Array]]:
        rows, extras = part
        loss, metrics, gradients = packed_loss_and_gradients(
            program.policy, params, rows, loss_of, extras, temperature=settings.temperature
        )
        return gradients, {"policy_loss": loss, **metrics}

    return _accumulated(
        gradients_of, minibatch, (minibatch.old_logprobs, minibatch.advantages)
    )


def value_step(
    program: PpoProgram, params: Params, minibatch: Minibatch, settings: PpoSettings
) -> tuple[Params, dict[str, Array]]:
    """Gradient of the value loss over one minibatch, and its figures."""
    clip = settings.value_clip if program.clip_values else None

    def gradients_of(part: tuple[LmBatch, Any]) -> tuple[Params, dict[str, Array]]:
        rows, (old_values, returns) = part

        def loss_of(part: Params) -> tuple[Array, dict[str, Array]]:
            values = packed_values(program.scorer, merge_trees(part, params), rows)
            loss, clipped_fraction = clipped_value_loss(
                values, old_values, returns, rows.loss_mask, clip=clip
            )
            return loss, {"value_loss": loss, "value_clipped_fraction": clipped_fraction}

        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable(params)
        )
        return gradients, metrics

    return _accumulated(gradients_of, minibatch, (minibatch.values, minibatch.returns))


def ptx_step(program: PpoProgram, params: Params, text: LmBatch) -> tuple[Params, Array]:
    """Gradient of the pretraining loss over one minibatch's rows of text, before
    `ptx_coef`, and the loss."""
    count = microbatch_count(
        text.tokens.shape[0], program.policy.compute.microbatch_rows, program.mesh
    )
    parts = split_microbatches(text, count, program.mesh)
    weights = microbatch_weights(jnp.sum(parts.loss_mask, axis=(1, 2), dtype=jnp.float32))
    gradients, metrics = accumulate(
        partial(next_token_gradients, program.policy, params), parts, weights
    )
    return gradients, jnp.sum(weights * metrics["loss"])


def _accumulated(
    gradients_of: Callable[[tuple[LmBatch, Any]], tuple[Params, dict[str, Array]]],
    minibatch: Minibatch,
    extras: Any,
) -> tuple[Params, dict[str, Array]]:
    """Gradient and figures of a loss that is a mean over the response tokens of a
    minibatch; `extras` [lines, ways, W] each are what it reads beside the rows."""
    total = jnp.maximum(token_count(minibatch.rows.loss_mask), 1.0)

    def share_of(part: tuple[LmBatch, Any]) -> tuple[Params, dict[str, Array]]:
        return scale_tree(token_count(part[0].loss_mask) / total, gradients_of(part))

    return accumulate_packed(share_of, (minibatch.rows, extras), minibatch.layout)
