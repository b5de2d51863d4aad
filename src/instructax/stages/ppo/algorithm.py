"""Proximal policy optimization from human feedback: PPO and PPO-ptx (paper, section 3.5 and
appendix C.4).

As in the paper: rollouts at temperature 1, a per-token KL penalty inside the reward, the
score at the end, a separate value model that starts as the reward model with its head and
bias, clipped losses, one epoch over minibatches, PPO and pretraining gradients summed into
one Adam step, a constant learning rate after 10 iterations of warm-up, averaged weights.

The paper leaves open, and the config decides: λ, whitening, value clipping, and what
happens to responses without an end token. The average moves at every optimizer step. The
pretraining loss is a mean per token, so `ptx_coef` has another scale than it would have for
a sum per document.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from instructax import rng, sharding
from instructax.generation.prefill import prefill_padding
from instructax.generation.sampler import generate
from instructax.models.lora import merge_lora
from instructax.models.scoring import (
    packed_logprobs,
    packed_logprobs_and_entropy,
    packed_outputs,
    packed_values,
    rollout_sequences,
    select_last_token,
)
from instructax.models.sequence_packing import PackedLayout, pack_and_map
from instructax.stages.ppo.experience import (
    SAMPLER_GAPS,
    Minibatch,
    diagnostics,
    make_experience,
    pack_minibatch,
    shuffled_minibatches,
)
from instructax.stages.ppo.gradients import (
    policy_loss_gradients,
    ptx_loss_gradients,
    value_loss_gradients,
)
from instructax.stages.ppo.program import PpoOptions, PpoProgram, PpoSettings
from instructax.training.accumulation import split_microbatches
from instructax.training.optimizer import (
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
)


def iteration(
    program: PpoProgram,
    state: PpoState,
    ref_params: Params,
    reward_params: Params,
    prompts: Prompts,
    text: LmBatch | None,
    settings: PpoSettings,
) -> tuple[PpoState, dict[str, Array], Rollouts, Array]:
    """One iteration of PPO: sample responses, score them, update policy and value model.

    `jax.vmap` over state, text and settings runs a sweep: several seeds, coefficients and
    learning rates in one program, each with the numbers it has alone, up to rounding.

    Args:
      program: networks, optimizers and compile-time choices.
      state: policy, value model and averaged policy.
      ref_params: the policy that the KL penalty is measured against.
      reward_params: the reward model.
      prompts: [B, P].
      text: pretraining rows of all optimizer steps, or None for PPO without them.
      settings: the hyperparameters that a sweep varies.

    Returns:
      (new state, metrics, rollouts, scores f32[B])
    """
    # Three parts, as `compiled` runs them: they exchange rollouts and experience only.
    rollouts = rollout(program, state.policy.params, prompts, state.step, settings)
    experience, scored, metrics = score(
        program, state, ref_params, reward_params, rollouts, settings
    )
    state, update_metrics = update(program, state, experience, text, settings)
    return state, {**metrics, **update_metrics}, rollouts, scored.scores


def rollout(
    program: PpoProgram,
    params: Params,
    prompts: Prompts,
    step: Array,
    settings: PpoSettings,
) -> Rollouts:
    """Samples one response to each prompt; each sample of an iteration has its own key."""
    # Row b of iteration `step` always draws with the same key, however rows are sharded and
    # however often the run is resumed.
    samples = jnp.arange(prompts.tokens.shape[0])
    keys = rng.sample_keys(rng.step_key(settings.seed, "rollout", step), samples)
    return generate(
        program.policy,
        # An adapter would add two small products per matrix to every token, so merge once.
        merge_lora(params),
        prompts,
        keys,
        length=program.response_tokens,
        temperature=settings.temperature,
        eos_id=program.eos_id,
        # Rows of one device are decoded together; no token crosses devices.
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
    """Runs reference, value model, reward model and policy on the rollouts.

    With `old_logprobs="sampled"` the policy is not run, and the entropy is estimated as the
    mean of −log π over the sampled tokens.

    Returns:
      (experience for the update, the networks' outputs, metrics)
    """
    options = program.options
    scored, logprobs, entropy, layout = _run_networks(
        program, state, ref_params, reward_params, rollouts, settings
    )
    experience, rewards = make_experience(
        scored,
        logprobs,
        settings,
        no_eos_rule=options.no_eos_rule,
        whiten_rewards=options.whiten_rewards,
        whiten_advantages=options.whiten_advantages,
    )
    metrics = diagnostics(scored, logprobs, entropy, rewards, experience.returns)
    if options.old_logprobs == "sampled":
        # Zero by construction; the gap to the sampler shows in the update's first ratio.
        for name in SAMPLER_GAPS:
            del metrics[name]

    # Fractions of computed tokens that are padding, in the prompt pass and in the rows.
    row_shards = sharding.num_row_shards(program.mesh)
    metrics["prefill_padding"] = prefill_padding(
        program.policy, rollouts.prompts, row_shards
    )
    metrics["padding"] = layout.padding_fraction()
    return experience, scored, metrics


def _run_networks(
    program: PpoProgram,
    state: PpoState,
    ref_params: Params,
    reward_params: Params,
    rollouts: Rollouts,
    settings: PpoSettings,
) -> tuple[Scored, Array, Array, PackedLayout]:
    """Runs all networks on the rollouts, microbatch by microbatch of packed rows.

    Returns:
      (the networks' outputs, the policy's log-probabilities f32[B, R], its entropy
      f32[B, R], the layout of the packed rows)
    """

    def run_networks(rows: LmBatch) -> NetworkOutputs:
        return _network_outputs(program, state, ref_params, reward_params, rows, settings)

    # Packed and back: every output is f32[B, P + R].
    outputs, layout = pack_and_map(
        run_networks,
        rollout_sequences(rollouts),
        width=program.row_tokens,
        compute=program.policy.compute,
        mesh=program.mesh,
    )
    # Outputs at prompt tokens are not needed: cut them off, [B, P + R] → [B, R].
    start = rollouts.prompts.tokens.shape[1]  # P, where responses begin
    scored = Scored(
        rollouts=rollouts,
        ref_logprobs=outputs.ref_logprobs[:, start:],
        values=outputs.values[:, start:],
        # The reward model scores a response once, at its last token: f32[B].
        scores=select_last_token(outputs.reward_outputs, rollouts),
    )
    if outputs.logprobs is None:
        return scored, rollouts.logprobs, -rollouts.logprobs, layout
    return scored, outputs.logprobs[:, start:], outputs.entropy[:, start:], layout


class NetworkOutputs(NamedTuple):
    """What the networks say of each token of packed rows, f32[rows, W] each."""

    ref_logprobs: Array
    values: Array
    reward_outputs: Array  # of the reward model
    # None unless the log-probabilities of the ratio are recomputed.
    logprobs: Any = None
    entropy: Any = None


def _network_outputs(
    program: PpoProgram,
    state: PpoState,
    ref_params: Params,
    reward_params: Params,
    rows: LmBatch,
    settings: PpoSettings,
) -> NetworkOutputs:
    """Runs all networks on a microbatch of packed rows.

    All networks read the same rows, so one loop over microbatches serves them all.
    """
    policy = program.policy
    temperature = settings.temperature
    # The reference is scored at the sampling temperature too, so that the KL is between the
    # distributions that were sampled from.
    ref_logprobs = packed_logprobs(policy, ref_params, rows, temperature=temperature)
    # The reward model has the value model's architecture, but its own parameters.
    values = packed_values(program.value_model, state.value.params, rows)
    reward_outputs = packed_outputs(program.value_model, reward_params, rows)
    if program.options.old_logprobs == "sampled":
        return NetworkOutputs(ref_logprobs, values, reward_outputs)

    # Computed as the update does it, so the ratio of the first optimizer step is 1.
    logprobs, entropy = packed_logprobs_and_entropy(
        policy, state.policy.params, rows, temperature=temperature
    )
    return NetworkOutputs(ref_logprobs, values, reward_outputs, logprobs, entropy)


def update(
    program: PpoProgram,
    state: PpoState,
    experience: Experience,
    text: LmBatch | None,
    settings: PpoSettings,
) -> tuple[PpoState, dict[str, Array]]:
    """One iteration's optimizer steps, `inner_epochs` × `minibatches` of them, in one scan.

    Args:
      program: networks, optimizers and compile-time choices.
      state: the state that made the rollouts.
      experience: all rollouts of the iteration.
      text: pretraining rows of all optimizer steps, or None for PPO without them.
      settings: the hyperparameters that a sweep varies.

    Returns:
      (new state, metrics). Metrics are means over the optimizer steps, except `first_*`,
      which are those of the first step.
    """
    options = program.options
    # The paper makes one inner epoch; more reuse the same rollouts in a new order.
    num_steps = options.inner_epochs * options.minibatches
    # [rows, T] → [num_steps, rows / num_steps, T]: each step has its own pretraining rows.
    text_rows = None
    if text is not None:
        text_rows = split_microbatches(text, num_steps, program.mesh)
    key = rng.step_key(settings.seed, "minibatches", state.step)
    minibatches = _packed_minibatches(program, experience, key)
    # Schedules count iterations, so all optimizer steps of one have the same learning rate.
    policy_rate, value_rate = _learning_rates(options, settings, state.step)
    # The scan compiles one optimizer step, however many there are.
    take_step = partial(_optimizer_step, program, settings, policy_rate, value_rate)
    state, step_metrics = jax.lax.scan(take_step, state, (minibatches, text_rows))

    metrics = {name: jnp.mean(values) for name, values in step_metrics.items()}
    # The first step starts from the policy that sampled, which the invariants check.
    for name in ("ratio_gap", "clipped_fraction"):
        metrics[f"first_{name}"] = step_metrics[name][0]
    metrics["learning_rate"] = policy_rate
    metrics["value_learning_rate"] = value_rate
    state = dataclasses.replace(
        state,
        policy=_count_iteration(state.policy),
        value=_count_iteration(state.value),
    )
    return state, metrics


def _packed_minibatches(
    program: PpoProgram, experience: Experience, key: Array
) -> Minibatch:
    """The minibatches of all optimizer steps, stacked on a leading axis for the scan."""

    def pack(minibatch: Experience) -> Minibatch:
        return pack_minibatch(
            minibatch,
            width=program.row_tokens,
            compute=program.policy.compute,
            mesh=program.mesh,
        )

    shuffled = shuffled_minibatches(
        experience,
        key,
        epochs=program.options.inner_epochs,
        minibatches=program.options.minibatches,
        mesh=program.mesh,
    )
    # One minibatch at a time, each with its own layout.
    return jax.lax.map(pack, shuffled)


def _learning_rates(
    options: PpoOptions, settings: PpoSettings, step: Array
) -> tuple[Array, Array]:
    """Learning rates of the policy and of the value model in iteration `step`."""
    policy_rate = learning_rate_at(
        step,
        peak=settings.optimizer.learning_rate,
        config=options.optimizer,
        total_steps=options.steps,
    )
    value_rate = learning_rate_at(
        step,
        peak=settings.value_optimizer.learning_rate,
        config=options.value_optimizer,
        total_steps=options.steps,
    )
    return policy_rate, value_rate


def _optimizer_step(
    program: PpoProgram,
    settings: PpoSettings,
    policy_rate: Array,
    value_rate: Array,
    state: PpoState,
    inputs: tuple[Minibatch, LmBatch | None],
) -> tuple[PpoState, dict[str, Array]]:
    """One Adam step of both networks on one minibatch, and one of the moving average."""
    # Eq. 2: the reinforcement-learning objective plus γ times the pretraining objective.
    # The gradients are summed before Adam, so both share its moments.
    minibatch, text = inputs
    gradients, metrics = policy_loss_gradients(
        program.policy,
        state.policy.params,
        minibatch,
        clip=settings.clip,
        temperature=settings.temperature,
    )
    if text is not None:
        ptx_gradients, metrics["ptx_loss"] = ptx_loss_gradients(
            program.policy, state.policy.params, text, mesh=program.mesh
        )
        gradients = jax.tree.map(
            lambda g, ptx: g + settings.ptx_coef * ptx, gradients, ptx_gradients
        )
    # The value model has its own parameters and optimizer; the losses share nothing.
    value_gradients, value_metrics = value_loss_gradients(
        program.value_model,
        state.value.params,
        minibatch,
        clip=settings.value_clip if program.clip_values else None,
    )

    # Both gradients come from the state before the step.
    policy = apply_gradients(program.policy_optimizer, state.policy, gradients, policy_rate)
    value = apply_gradients(
        program.value_optimizer, state.value, value_gradients, value_rate
    )
    ema = moving_average(state.ema, policy.params, settings.ema_decay)

    # Norms before clipping. A non-finite one means that `apply_gradients` skipped the step.
    policy_norm = optax.tree.norm(gradients)
    value_norm = optax.tree.norm(value_gradients)
    metrics |= value_metrics
    metrics["policy_grad_norm"] = policy_norm
    metrics["value_grad_norm"] = value_norm
    metrics["update_padding"] = minibatch.layout.padding_fraction()
    metrics["skipped"] = skipped(policy_norm, value_norm)
    return PpoState(policy=policy, value=value, ema=ema), metrics


def _count_iteration(state: TrainState) -> TrainState:
    """The state after an iteration. Adam counts its own steps, in `opt_state`."""
    return dataclasses.replace(state, step=state.step + 1)
