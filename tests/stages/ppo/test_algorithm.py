"""PPO's rollout, score and update: against direct gradients, identities at the first
optimizer step, and a task that PPO must learn."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import stages, tiny_models
from tests.support.scoring import sequence_scores, token_values

from instructax import rng
from instructax.stages.ppo import algorithm
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.stages.ppo.experience import shuffled_minibatches
from instructax.training import supervised
from instructax.training.optimizer import make_optimizer
from instructax.training.state import init_state, no_adapters, start_from
from instructax.types import LmBatch, PpoState, Rollouts

pytest_plugins = ("tests.support.pipeline_fixture",)

# SGD with rate 1: the update is −1 · gradient, which shows the gradient
GRADIENT = optax.identity()
MESH = stages.mesh_of()
# A single optimizer step, which shows its gradient.
PROGRAM = stages.ppo_program(
    MESH, minibatches=1, policy_optimizer=GRADIENT, value_optimizer=GRADIENT
)
SHOWN = stages.ppo_settings(learning_rate=1.0, value_learning_rate=1.0)
PROMPTS = tiny_models.ragged_prompts([1, 5, 3, 6, 2, 4, 6, 1], columns=6)
TEXT = jax.tree.map(jnp.asarray, stages.packed_rows(4, 14))


@cache
def compiled_rollout(program):
    return jax.jit(partial(algorithm.rollout, program))


@cache
def state_and_rollouts(temperature: float = 1.0) -> tuple[PpoState, Rollouts]:
    """A random state and its samples; some rows end early."""
    state = stages.ppo_state(PROGRAM)
    settings = stages.ppo_settings(temperature=temperature)
    rollouts = compiled_rollout(PROGRAM)(
        state.policy.params, PROMPTS, jnp.int32(0), settings
    )
    lengths = np.asarray(rollouts.mask).sum(axis=1)
    assert lengths.min() < lengths.max()
    return state, rollouts


@cache
def compiled_score(program):
    return jax.jit(partial(algorithm.score, program))


@cache
def compiled_update(program):
    return jax.jit(partial(algorithm.update, program))


@cache
def other_params(head: str, seed: int = 5):
    model = PROGRAM.policy if head == "tokens" else PROGRAM.value_model
    return tiny_models.random_params(model, seed)


def with_microbatch_rows(rows: int, splits: int = 0) -> algorithm.PpoProgram:
    """PROGRAM with microbatches of `rows` packed rows and `splits` tail splits."""
    policy, value_model = (
        dataclasses.replace(
            model, compute=tiny_models.compute(microbatch_rows=rows, tail_splits=splits)
        )
        for model in (PROGRAM.policy, PROGRAM.value_model)
    )
    return dataclasses.replace(PROGRAM, policy=policy, value_model=value_model)


def score_rollouts(program=PROGRAM, settings=SHOWN, ref_params=None):
    """(state, experience, scored, metrics), with a separate reference and reward model."""
    state, rollouts = state_and_rollouts(float(settings.temperature))
    ref_params = other_params("tokens") if ref_params is None else ref_params
    return state, *compiled_score(program)(
        state, ref_params, other_params("scalar"), rollouts, settings
    )


def update_gradients(program, experience, text, settings=SHOWN, state=None):
    """((policy's, value model's gradients), metrics) of a single SGD step with rate 1."""
    state = state or state_and_rollouts()[0]
    new, metrics = compiled_update(program)(state, experience, text, settings)
    gradients = jax.tree.map(
        lambda a, b: a - b,
        (state.policy.params, state.value.params),
        (new.policy.params, new.value.params),
    )
    return gradients, metrics


def plain_policy_logprobs(params, rollouts: Rollouts):
    """Log-probabilities of the responses f32[B, R] from full logits; differentiable."""
    prompts = rollouts.prompts
    width = rollouts.prompts.tokens.shape[1]
    tokens = jnp.concatenate([prompts.tokens, rollouts.responses], axis=1)
    real = jnp.concatenate([prompts.mask, rollouts.mask], axis=1)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden = PROGRAM.policy.apply(
        {"params": params}, tokens, real.astype(jnp.int32), positions
    )[0]
    logprobs = jax.nn.log_softmax(hidden @ params["embedding"].T, axis=-1)[
        :, width - 1 : -1
    ]
    chosen = jnp.take_along_axis(logprobs, rollouts.responses[..., None], axis=-1)[..., 0]
    return jnp.where(rollouts.mask, chosen, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_the_plain_computation(temperature):
    state, experience, judged, _ = score_rollouts(
        settings=stages.ppo_settings(temperature=temperature)
    )
    rollouts = judged.rollouts
    documents = stages.responses_of(rollouts)
    mask = np.asarray(rollouts.mask)
    for params, logprobs in (
        (state.policy.params, experience.old_logprobs),
        (state.policy.params, rollouts.logprobs),
        (other_params("tokens"), judged.ref_logprobs),
    ):
        plain = stages.plain_logprobs(PROGRAM.policy, params, documents, temperature)
        for row, real in enumerate(mask):
            np.testing.assert_allclose(
                logprobs[row][real], plain[row][-real.sum() :], rtol=1e-4, atol=1e-5
            )
    plain = stages.plain_scores(PROGRAM.value_model, other_params("scalar"), documents)
    np.testing.assert_allclose(judged.scores, plain, rtol=1e-4, atol=1e-5)
    outputs = stages.plain_outputs(PROGRAM.value_model, state.value.params, documents)
    for row, real in enumerate(mask):
        start = len(documents[row]) - real.sum() - 1
        np.testing.assert_allclose(
            judged.values[row][real],
            outputs[row, start:][: real.sum()],
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_value_before_a_token_is_the_score_of_its_prefix():
    rollouts = state_and_rollouts()[1]
    params = other_params("scalar")
    mask = np.asarray(rollouts.mask)
    values = jax.jit(partial(token_values, PROGRAM.value_model))(params, rollouts)
    score = jax.jit(partial(sequence_scores, PROGRAM.value_model))
    for t in range(7):
        cut = dataclasses.replace(rollouts, mask=jnp.asarray(mask & (np.arange(7) < t)))
        wanted = np.where(mask[:, t], score(params, cut), 0.0)
        np.testing.assert_allclose(values[:, t], wanted, rtol=1e-5, atol=1e-5)


def test_metrics_of_an_iteration():
    _, experience, judged, metrics = score_rollouts()
    mask = np.asarray(judged.rollouts.mask)
    log_ratios = np.where(
        mask, np.asarray(experience.old_logprobs - judged.ref_logprobs, np.float64), 0.0
    )
    assert float(metrics["kl"]) == pytest.approx(log_ratios.sum() / 8, rel=1e-4)
    assert float(metrics["kl_k3"]) == pytest.approx(
        (np.exp(-log_ratios) - 1 + log_ratios).sum() / 8, rel=1e-4
    )
    endings = np.asarray(judged.rollouts.ended)
    penalties = float(SHOWN.no_eos_penalty) * (~endings)
    rewards = (
        np.asarray(judged.scores, np.float64) - penalties - 0.1 * log_ratios.sum(axis=1)
    )
    assert float(metrics["rewards"]) == pytest.approx(rewards.mean(), rel=1e-4)
    assert float(metrics["ended_share"]) == endings.mean()
    assert float(metrics["response_length"]) == mask.sum() / 8
    assert metrics["tokens"] == mask.sum() + np.asarray(PROMPTS.mask).sum()
    # A single microbatch of the maximal number of rows: 16 tokens for each rollout, 12 for
    # two prompts of up to 6 tokens.
    assert float(metrics["padding"]) == pytest.approx(
        1 - float(metrics["tokens"]) / (8 * 16), abs=1e-6
    )
    assert float(metrics["prefill_padding"]) == pytest.approx(1 - 28 / (4 * 12), abs=1e-6)


def test_without_rescoring_the_samplers_logprobs_are_the_old_logprobs():
    state, experience, _, metrics = score_rollouts()
    unscored = stages.with_options(PROGRAM, old_logprobs="sampled")
    _, other, judged, score_metrics = score_rollouts(unscored)
    np.testing.assert_array_equal(other.old_logprobs, judged.rollouts.logprobs)
    stages.assert_trees_close(other, experience, rtol=1e-4, atol=1e-5)
    assert metrics.keys() - score_metrics.keys() == {"sampler_gap", "sampler_gap_max"}
    mask = np.asarray(judged.rollouts.mask)
    mean = np.asarray(judged.rollouts.logprobs)[mask].mean()
    assert float(score_metrics["entropy"]) == pytest.approx(-mean, rel=1e-5)
    # A single token of each.
    assert float(score_metrics["entropy"]) == pytest.approx(
        float(metrics["entropy"]), rel=0.3
    )
    # The policy is not run, so replacing it changes nothing.
    moved = dataclasses.replace(
        state, policy=dataclasses.replace(state.policy, params=other_params("tokens"))
    )
    rest = (other_params("tokens"), other_params("scalar"), judged.rollouts, SHOWN)
    again = compiled_score(unscored)(moved, *rest)[0]
    stages.assert_trees_equal(again, other)


def test_at_ratio_one_the_update_is_the_policy_gradient():
    state, experience, judged, _ = score_rollouts()
    (gradients, _), metrics = update_gradients(PROGRAM, experience, None)
    mask = judged.rollouts.mask
    advantages = experience.advantages

    def loss(params):
        # −A · log π: if gradients flowed into the old log-probabilities, the ratio's would
        # be zero.
        return (
            -jnp.sum(mask * advantages * plain_policy_logprobs(params, judged.rollouts))
            / mask.sum()
        )

    wanted = jax.jit(jax.grad(loss))(state.policy.params)
    stages.assert_trees_close(gradients, wanted, rtol=1e-3, atol=2e-5)
    assert float(optax.tree.norm(wanted)) > 1e-2
    assert metrics["first_ratio_gap"] < 1e-5
    assert metrics["first_clipped_fraction"] == 0
    assert abs(float(metrics["update_kl"])) < 1e-6


def test_value_gradient_is_that_of_half_the_squared_error():
    state, experience, judged, _ = score_rollouts()
    (_, gradients), metrics = update_gradients(PROGRAM, experience, None)
    mask = judged.rollouts.mask

    def loss(params):
        values = token_values(PROGRAM.value_model, params, judged.rollouts)
        return 0.5 * jnp.sum(mask * (values - experience.returns) ** 2) / mask.sum()

    value, wanted = jax.jit(jax.value_and_grad(loss))(state.value.params)
    stages.assert_trees_close(gradients, wanted, rtol=1e-3, atol=2e-5)
    assert float(metrics["value_loss"]) == pytest.approx(float(value), rel=1e-5)


def test_the_value_network_has_its_own_rate_schedule_and_optimizer():
    _, experience, _, _ = score_rollouts()
    (policy, value), metrics = update_gradients(PROGRAM, experience, None)
    slowly = tiny_models.optimizer_config(warmup_steps=4, warmup_from=0.25)
    other = dataclasses.replace(PROGRAM, value_optimizer=optax.scale(3.0))
    other = stages.with_options(other, value_optimizer=slowly)
    settings = stages.ppo_settings(learning_rate=1.0, value_learning_rate=0.5)
    (same, scaled), rates = update_gradients(other, experience, None, settings)
    stages.assert_trees_close(same, policy, rtol=1e-4, atol=1e-6)
    # 3 from the optimizer, 1/2 from the peak, 1/4 from the schedule's first step
    stages.assert_trees_close(
        scaled, jax.tree.map(lambda g: 0.375 * g, value), rtol=1e-4, atol=1e-5
    )
    assert (rates["learning_rate"], rates["value_learning_rate"]) == (1.0, 0.125)
    assert metrics["value_learning_rate"] == 1.0


def test_text_adds_its_gradient_times_ptx_coef():
    state, experience, _, _ = score_rollouts()
    (alone, value_alone), _ = update_gradients(PROGRAM, experience, None)
    (both, value_both), metrics = update_gradients(PROGRAM, experience, TEXT)

    def text_loss(params):
        hidden = PROGRAM.policy.apply(
            {"params": params}, TEXT.tokens, TEXT.segments, TEXT.positions
        )[0]
        logprobs = jax.nn.log_softmax(hidden @ params["embedding"].T, axis=-1)[:, :-1]
        chosen = jnp.take_along_axis(logprobs, TEXT.tokens[:, 1:, None], axis=-1)[..., 0]
        return (
            -jnp.sum(jnp.where(TEXT.loss_mask[:, 1:], chosen, 0.0)) / TEXT.loss_mask.sum()
        )

    loss, text_gradients = jax.jit(jax.value_and_grad(text_loss))(state.policy.params)
    wanted = jax.tree.map(lambda g, t: g + 1.5 * t, alone, text_gradients)
    stages.assert_trees_close(both, wanted, rtol=1e-3, atol=5e-5)
    assert float(metrics["ptx_loss"]) == pytest.approx(float(loss), rel=1e-5)
    # A different program rounds differently.
    stages.assert_trees_close(value_both, value_alone, rtol=1e-5, atol=1e-6)
    without = dataclasses.replace(SHOWN, ptx_coef=jnp.float32(0.0))
    (_, value_without), _ = update_gradients(PROGRAM, experience, TEXT, without)
    stages.assert_trees_equal(value_both, value_without)


def test_without_both_coefficients_it_is_plain_ppo():
    nothing = stages.ppo_settings(
        kl_coef=0.0, ptx_coef=0.0, learning_rate=1.0, value_learning_rate=1.0
    )
    _, experience, judged, _ = score_rollouts(settings=nothing)
    other = score_rollouts(settings=nothing, ref_params=other_params("tokens", seed=6))[1]
    # The reference has no influence.
    stages.assert_trees_equal(experience.advantages, other.advantages)
    with_text, _ = update_gradients(PROGRAM, experience, TEXT, nothing)
    without, _ = update_gradients(PROGRAM, experience, None, nothing)
    stages.assert_trees_close(with_text, without, rtol=1e-4, atol=1e-6)
    # With discount 1 and λ = 1, returns − values, which are the advantages, telescope to
    # the score.
    straight = stages.ppo_settings(kl_coef=0.0, lambda_=1.0)
    raw = stages.with_options(PROGRAM, whiten_advantages=False)
    _, experience, judged, _ = score_rollouts(raw, straight)
    finals = np.asarray(judged.scores) - 0.5 * ~np.asarray(judged.rollouts.ended)
    mask = np.asarray(judged.rollouts.mask)
    np.testing.assert_allclose(
        experience.returns, np.where(mask, finals[:, None], 0.0), rtol=1e-4, atol=1e-4
    )


def test_vmapped_runs_equal_separate_runs():
    """Two iterations of three runs with different seeds, coefficients and rates, vmapped in
    one program and run one after the other."""
    program = stages.ppo_program(MESH)
    changes = (
        {},
        {"seed": 8, "kl_coef": 0.5, "learning_rate": 0.002},
        {"temperature": 0.7, "ptx_coef": 0.0, "clip": 0.1},
    )
    settings = [stages.ppo_settings(**change) for change in changes]
    fixed = (other_params("tokens"), other_params("scalar"))
    texts = [
        jax.tree.map(jnp.asarray, stages.packed_rows(4, 14, seed)) for seed in range(3)
    ]
    states = [stages.ppo_state(program, seed) for seed in range(3)]

    def stacked(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    alone = jax.jit(partial(algorithm.iteration, program))
    together = jax.jit(
        jax.vmap(partial(algorithm.iteration, program), in_axes=(0, None, None, None, 0, 0))
    )
    many = stacked(states)
    for _ in range(2):
        many, metrics, rollouts, scores = together(
            many, *fixed, PROMPTS, stacked(texts), stacked(settings)
        )
        ones = [
            alone(s, *fixed, PROMPTS, t, c)
            for s, t, c in zip(states, texts, settings, strict=True)
        ]
        states = [one[0] for one in ones]
        np.testing.assert_array_equal(
            rollouts.responses, stacked([one[2].responses for one in ones])
        )
        stages.assert_trees_close(
            metrics, stacked([one[1] for one in ones]), rtol=1e-3, atol=1e-5
        )
        stages.assert_trees_close(
            scores, stacked([one[3] for one in ones]), rtol=1e-4, atol=1e-5
        )
        stages.assert_trees_close(many, stacked(states), rtol=1e-3, atol=1e-5)
    assert len(set(np.asarray(metrics["learning_rate"]).tolist())) == 2


def test_clipped_tokens_have_no_gradient():
    _, experience, judged, _ = score_rollouts()
    mask = judged.rollouts.mask
    # As if the policy had moved by log 2 since the rollout, upwards where the advantage is
    # positive: every token is clipped.
    moved = dataclasses.replace(
        experience,
        old_logprobs=experience.old_logprobs
        - jnp.where(mask, jnp.sign(experience.advantages) * 0.7, 0.0),
    )
    (gradients, _), metrics = update_gradients(PROGRAM, moved, None)
    assert float(optax.tree.norm(gradients)) == 0
    assert metrics["clipped_fraction"] == 1


@pytest.mark.parametrize(("rows", "splits"), [(1, 0), (1, 1), (4, 3)])
def test_accumulated_gradients_equal_those_of_the_whole_minibatch(rows, splits):
    _, experience, judged, _ = score_rollouts()
    counts = np.asarray(judged.rollouts.mask).sum(axis=1)
    assert len(set(counts.reshape(4, 2).sum(axis=1))) > 1  # microbatches of different sizes
    # With four microbatches, one has text with many trained tokens and one has none.
    whole, metrics = update_gradients(PROGRAM, experience, TEXT)
    parts, parts_metrics = update_gradients(
        with_microbatch_rows(rows, splits), experience, TEXT
    )
    stages.assert_trees_close(parts, whole, rtol=1e-3, atol=1e-5)
    # Microbatches have no unused rows.
    assert parts_metrics.pop("update_padding") < metrics.pop("update_padding")
    stages.assert_trees_close(parts_metrics, metrics, rtol=1e-4, atol=2e-6)


def test_every_epoch_partitions_the_rows_into_new_minibatches():
    _, experience, _, _ = score_rollouts()
    rows = jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 7))
    numbered = dataclasses.replace(experience, advantages=rows, returns=rows)
    shuffle = jax.jit(
        partial(shuffled_minibatches, epochs=2, minibatches=4, mesh=PROGRAM.mesh)
    )
    shuffled = shuffle(numbered, rng.step_key(3, "minibatches", 0))
    order = np.asarray(shuffled.advantages[:, :, 0])
    assert order.shape == (8, 2)  # 2 epochs × 4 minibatches of 2 rows
    first, second = order.reshape(2, 8).astype(int)
    assert sorted(first) == sorted(second) == list(range(8))
    assert list(first) != list(second) != list(range(8))
    # The arrays of a row stay together.
    np.testing.assert_array_equal(shuffled.returns, shuffled.advantages)
    wanted = np.asarray(experience.rollouts.responses)[order.reshape(-1).astype(int)]
    np.testing.assert_array_equal(
        np.asarray(shuffled.rollouts.responses).reshape(16, 7), wanted
    )
    later = shuffle(numbered, rng.step_key(3, "minibatches", 1))
    assert not np.array_equal(later.advantages, shuffled.advantages)


def test_the_average_moves_at_every_optimizer_step():
    _, experience, _, _ = score_rollouts()
    start = state_and_rollouts()[0]
    # Both minibatches are identical.
    same_rows = jax.tree.map(lambda x: jnp.repeat(x[:1], 8, axis=0), experience)
    first, _ = compiled_update(PROGRAM)(start, same_rows, None, SHOWN)
    two_steps = stages.with_options(PROGRAM, minibatches=2)
    second, _ = compiled_update(two_steps)(start, same_rows, None, SHOWN)
    wanted = jax.tree.map(
        lambda e, p1, p2: 0.81 * e + 0.09 * p1 + 0.1 * p2,
        start.ema,
        first.policy.params,
        second.policy.params,
    )
    stages.assert_trees_close(second.ema, wanted, rtol=1e-5, atol=1e-5)
    assert first.policy.step == second.policy.step == second.value.step == 1


def test_value_clipping_is_off_where_the_program_says_so():
    _, experience, _, _ = score_rollouts()
    far = dataclasses.replace(
        experience, values=experience.values + 5.0 * experience.rollouts.mask
    )
    clipped = update_gradients(PROGRAM, far, None)[1]
    free = update_gradients(dataclasses.replace(PROGRAM, clip_values=False), far, None)[1]
    assert clipped["value_clipped_fraction"] > 0.2
    assert free["value_clipped_fraction"] == 0
    assert clipped["value_loss"] > free["value_loss"]


def test_rollouts_change_only_with_the_step_and_the_seed():
    state, rollouts = state_and_rollouts()
    again = jax.jit(partial(algorithm.rollout, PROGRAM))
    same, other = (
        again(state.policy.params, PROMPTS, jnp.int32(step), SHOWN) for step in (0, 1)
    )
    stages.assert_trees_equal(same, rollouts)
    assert not np.array_equal(other.responses, rollouts.responses)
    seeded = dataclasses.replace(SHOWN, seed=jnp.int32(4))
    assert not np.array_equal(
        again(state.policy.params, PROMPTS, jnp.int32(0), seeded).responses,
        rollouts.responses,
    )


# A task that runs in seconds: the reward is the share of "good" tokens, and the text counts
# up.


GOOD = 8  # ids below it are good
ITERATIONS = 25


def counting_text(rows: int, seed: int) -> LmBatch:
    """Text that counts up and wraps around: the next token is always one more."""
    starts = np.random.default_rng(seed).integers(tiny_models.VOCAB_SIZE, size=rows)
    tokens = ((starts[:, None] + np.arange(13)) % tiny_models.VOCAB_SIZE).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(13, dtype=np.int32), tokens.shape)
    return LmBatch(
        tokens=tokens, segments=ones, positions=positions, loss_mask=positions > 0
    )


def good_fraction(model, params, rows: LmBatch):
    """The true reward at each position: the share of good tokens in its response."""
    same = (rows.segments[:, :, None] == rows.segments[:, None, :]) & rows.loss_mask[
        :, None, :
    ]
    good = same & (rows.tokens < GOOD)[:, None, :]
    return jnp.sum(good, axis=2, dtype=jnp.float32) / jnp.maximum(jnp.sum(same, axis=2), 1)


@cache
def counting_policy():
    """A policy that has learned to count."""
    config = tiny_models.optimizer_config(learning_rate=1e-2)
    optimizer = make_optimizer(config)
    program = supervised.SupervisedProgram(
        model=PROGRAM.policy,
        optimizer=optimizer,
        schedule=config,
        mesh=MESH,
        total_steps=1,
        num_microbatches=1,
        has_dropout=False,
    )
    settings = stages.supervised_settings(learning_rate=1e-2, dropout=0.0)
    update = jax.jit(partial(supervised.supervised_update, program))
    state = init_state(program.model, optimizer, jax.random.key(0), MESH)
    for step in range(80):
        state, metrics = update(state, counting_text(16, step), settings)
    assert metrics["loss"] < 0.5
    return state.params


def learn(ptx_coef: float) -> tuple[list[float], float]:
    """(the true reward of each iteration, the final text loss) of PPO from the counting
    policy."""
    program = stages.ppo_program(
        MESH,
        optimizer=tiny_models.optimizer_config(clip_norm=1.0),
        eos_id=22,
        response_tokens=6,
        steps=ITERATIONS,
    )
    settings = stages.ppo_settings(
        kl_coef=0.01,
        no_eos_penalty=0.0,
        ptx_coef=ptx_coef,
        learning_rate=3e-3,
        value_learning_rate=1e-2,
    )
    state = PpoState(
        policy=start_from(counting_policy(), program.policy_optimizer, MESH, no_adapters),
        value=start_from(
            other_params("scalar"), program.value_optimizer, MESH, no_adapters
        ),
        ema=stages.copy_of(counting_policy()),
    )
    iterate = CompiledIteration(
        program,
        abstract_ppo_state(program),
        settings,
        counting_policy(),
        other_params("scalar"),
        1e-3,
    )
    rewards = []
    for step in range(ITERATIONS):
        prompts = jax.tree.map(
            jnp.asarray, tiny_models.ragged_prompts([3] * 64, columns=3, seed=step)
        )
        text = counting_text(16, 1000 + step) if ptx_coef else None
        state, metrics, _, _ = iterate(state, (prompts, text), stages.no_phase)
        rewards.append(float(metrics["scores"]))
    unseen = counting_text(32, 9999)
    return rewards, stages.plain_loss(program.policy, state.policy.params, unseen)


def test_ppo_raises_the_true_reward_and_ptx_keeps_the_text(monkeypatch):
    monkeypatch.setattr(algorithm, "packed_outputs", good_fraction)
    rewards, text_loss = learn(ptx_coef=0.0)
    ptx_rewards, ptx_text_loss = learn(ptx_coef=1.0)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.5
    assert np.mean(ptx_rewards[-5:]) > np.mean(ptx_rewards[:3]) + 0.3
    assert ptx_text_loss < text_loss - 1.0  # nats per token
