"""Sampling and scoring against the plain NumPy network, row by row, and what a sample must not depend on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference_model
from instructax import inference
from instructax.inference import (
    generate,
    rollout_rows,
    row_logprobs,
    row_logprobs_and_entropy,
    sample_token,
    sequence_scores,
    token_logprobs,
    token_values,
)
from instructax.model import ModelConfig, Transformer
from instructax.types import Array, Comparisons, LmBatch, Params, Prompts, Rollouts
from small import VOCAB_SIZE, compute, gpt_config, llama_config, ragged_prompts, random_params

FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}
LENGTHS = (6, 1, 3, 4, 2, 5, 6, 2)  # of the prompts
COLUMNS, LENGTH = 6, 8  # of prompts and of responses
EOS = 4
SEED = 7  # of the sampling keys: in both families rows end at different places, and some do not end


@dataclasses.dataclass(frozen=True)
class Policy:
    config: ModelConfig
    model: Transformer
    params: Params
    sample: Callable[..., Rollouts]  # prompts, keys, temperature → NumPy arrays
    score: Callable[..., tuple[Array, Array]]  # rollouts, temperature → log-probabilities, entropy


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    config = FAMILIES[request.param]
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)
    sample = jax.jit(lambda p, k, t: generate(model, params, p, k, length=LENGTH, temperature=t, eos_id=EOS))

    @jax.jit
    def score(rollouts: Rollouts, temperature: Array) -> tuple[Array, Array]:
        found = row_logprobs_and_entropy(model, params, rollout_rows(rollouts), temperature=temperature)
        start = rollouts.prompts.tokens.shape[1]
        return found[0][:, start:], found[1][:, start:]

    return Policy(config, model, params, lambda *inputs: jax.device_get(sample(*inputs)), score)


def prompts_and_keys(columns: int = COLUMNS) -> tuple[Prompts, Array]:
    """Prompts of which the third ends with the end token, and a key for each."""
    prompts = ragged_prompts(LENGTHS, columns=columns)
    prompts = Prompts(tokens=prompts.tokens.at[2, -1].set(EOS), mask=prompts.mask)
    return prompts, jax.random.split(jax.random.key(SEED), len(LENGTHS))


def text_of(prompts: Prompts, row: int) -> list[int]:
    return np.asarray(prompts.tokens)[row, np.asarray(prompts.mask)[row]].tolist()


def assert_same(a: Rollouts, b: Rollouts, *, rows: list[int], bitwise: bool) -> None:
    """Row i of `a` is row rows[i] of `b`: the tokens exactly, the log-probabilities to the bit or up to rounding.

    Programs of different shapes add in different orders: theirs agree up to rounding only.
    """
    for name in ("responses", "mask", "ended"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[np.array(rows)])
    compare = np.testing.assert_array_equal if bitwise else lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    compare(a.logprobs, b.logprobs[np.array(rows)])


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_samples_follow_the_definition(policy, temperature):
    """Token t is where the cumulative distribution passes the uniform number of fold_in(key, t)."""
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, temperature)
    keys_of_tokens = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, jnp.arange(LENGTH))
    uniforms = np.asarray(jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (1,))))(keys_of_tokens))[..., 0]
    for row in range(len(LENGTHS)):
        prompt, response = text_of(prompts, row), rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(policy.config, policy.params, prompt + response[:-1], temperature)
        logprobs = logprobs[len(prompt) - 1 :]
        end = response.index(EOS) + 1 if EOS in response else LENGTH
        for t in range(end):
            cumulative = np.cumsum(np.exp(logprobs[t]))
            assert response[t] == np.searchsorted(cumulative, uniforms[row, t], side="right")
            assert float(rollouts.logprobs[row, t]) == pytest.approx(logprobs[t, response[t]], abs=1e-5)
        assert rollouts.mask[row].tolist() == [t < end for t in range(LENGTH)]
        assert bool(rollouts.ended[row]) == (EOS in response)
        assert set(response[end:]) <= {EOS}
        assert not rollouts.logprobs[row, end:].any()
    lengths = rollouts.mask.sum(axis=1)
    assert len({int(n) for n, ended in zip(lengths, rollouts.ended, strict=True) if ended}) > 1, "ends differ"
    assert not rollouts.ended.all(), "one reaches the limit"
    assert rollouts.mask.dtype == rollouts.ended.dtype == bool


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_equals_rescored(policy, temperature):
    rollouts = policy.sample(*prompts_and_keys(), temperature)
    logprobs, _ = policy.score(rollouts, temperature)
    np.testing.assert_allclose(logprobs, rollouts.logprobs, atol=1e-5)
    other, _ = policy.score(rollouts, temperature + 0.1)
    assert np.abs(other - rollouts.logprobs).max() > 1e-2


def test_a_sample_depends_on_its_prompt_and_key_alone(policy):
    prompts, keys = prompts_and_keys()
    together = policy.sample(prompts, keys, 1.0)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = policy.sample(jax.tree.map(lambda x: x[np.array(order)], prompts), keys[np.array(order)], 1.0)
    assert_same(shuffled, together, rows=order, bitwise=True)
    # The second prompt without its neighbours, and three columns further to the right.
    wider, _ = prompts_and_keys(COLUMNS + 3)
    alone = policy.sample(jax.tree.map(lambda x: x[1:2], wider), keys[1:2], 1.0)
    assert_same(alone, together, rows=[1], bitwise=False)


def test_a_sample_does_not_depend_on_what_the_padding_holds(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    for pad in (EOS, 0):  # pad == eos is harmless
        padded = Prompts(tokens=jnp.where(prompts.mask, prompts.tokens, pad), mask=prompts.mask)
        assert_same(policy.sample(padded, keys, 1.0), rollouts, rows=[*range(len(LENGTHS))], bitwise=True)


def test_an_early_exit_changes_nothing(policy):
    """A row that ends early, alone in the batch, so that the loop stops, against the loop that ran to the limit."""
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    early = int(np.argmin(rollouts.mask.sum(axis=1)))
    assert rollouts.ended[early]
    assert rollouts.mask[early].sum() < LENGTH
    rows = np.full(len(LENGTHS), early)
    repeated = policy.sample(jax.tree.map(lambda x: x[rows], prompts), keys[rows], 1.0)
    assert_same(repeated, rollouts, rows=rows.tolist(), bitwise=True)


def test_other_keys_give_other_samples(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    others = policy.sample(prompts, jax.random.split(jax.random.key(4), len(LENGTHS)), 1.0)
    assert (rollouts.responses != others.responses).any(axis=1).mean() > 0.5


def test_temperature_zero_takes_the_likeliest(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 0.0)
    for row in range(len(LENGTHS)):
        prompt, response = text_of(prompts, row), rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(policy.config, policy.params, prompt + response[:-1])[len(prompt) - 1 :]
        for t in range(int(rollouts.mask[row].sum())):
            assert response[t] == logprobs[t].argmax()
            assert float(rollouts.logprobs[row, t]) == pytest.approx(logprobs[t].max(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_frequencies_follow_the_probabilities(temperature):
    """χ² of 20 000 draws of six possible tokens, summed over ten keys: 50 degrees of freedom, p = 0.0001 at 93."""
    draws, logits = 20_000, np.array([-np.inf, 1.0, -1.0, -np.inf, 2.0, 0.0, 0.5, -2.0, -np.inf], np.float32)
    weights = np.exp(logits.astype(np.float64) / temperature)
    probabilities = weights / weights.sum()
    possible = probabilities > 0
    expected = draws * probabilities[possible]
    sample = jax.jit(sample_token)
    total = 0.0
    for seed in range(10):
        keys = jax.random.split(jax.random.key(seed), draws)
        tokens, logprobs = sample(jnp.broadcast_to(logits, (draws, len(logits))), keys, jnp.float32(temperature))
        counts = np.bincount(tokens, minlength=len(logits))
        assert counts[~possible].sum() == 0
        total += float(((counts[possible] - expected) ** 2 / expected).sum())
        np.testing.assert_allclose(logprobs, np.log(probabilities[np.asarray(tokens)]), atol=1e-5)
    assert total < 93


@pytest.mark.parametrize("vocab_size", [7, 50257])
def test_no_uniform_number_draws_an_impossible_token(monkeypatch, vocab_size):
    """The extremes, and the running sums themselves: there rounding would draw a token that adds nothing."""
    rng = np.random.default_rng(1)
    logits = np.where(rng.random(vocab_size) < 0.7, -np.inf, rng.normal(size=vocab_size)).astype(np.float32)
    logits[:2] = logits[-2:] = -np.inf
    logits[3] = 1.0
    sums = np.cumsum(jax.nn.softmax(jnp.asarray(logits)), dtype=np.float32)
    uniforms = np.concatenate([[0.0, 1 - 2**-23, 1 - 2**-24], rng.choice(sums, 300)]).astype(np.float32)
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24))
    monkeypatch.setattr(inference.jax.random, "uniform", lambda number, shape: number.reshape(shape))
    many = jnp.broadcast_to(logits, (len(uniforms), vocab_size))
    tokens, logprobs = sample_token(many, jnp.asarray(uniforms), jnp.float32(1.0))
    possible = np.flatnonzero(np.isfinite(logits))
    assert np.isin(tokens, possible).all()
    assert np.isfinite(logprobs).all()
    assert int(tokens[0]) == possible[0]


RESPONSE_LENGTHS = (4, 0, 2, 1)


def hand_made(seed: int = 0) -> Rollouts:
    """Four answers of 4, 0, 2 and 1 tokens to prompts of 3, 2, 1 and 5; the masked cells hold random ids."""
    responses = np.random.default_rng(seed).integers(VOCAB_SIZE, size=(4, 4))
    mask = np.arange(4)[None, :] < np.array(RESPONSE_LENGTHS)[:, None]
    return Rollouts(
        prompts=ragged_prompts((3, 2, 1, 5), columns=5),
        responses=jnp.asarray(responses, jnp.int32),
        mask=jnp.asarray(mask),
        logprobs=jnp.zeros((4, 4)),
        ended=jnp.zeros((4,), bool),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request: pytest.FixtureRequest) -> tuple[Transformer, Params]:
    model = Transformer(FAMILIES[request.param], compute(), "scalar")
    return model, random_params(model)


def test_values_stand_before_tokens_and_scores_after_the_last(scorer):
    model, params = scorer
    rollouts = hand_made()
    values, scores = jax.jit(lambda r: (token_values(model, params, r), sequence_scores(model, params, r)))(rollouts)
    responses = np.asarray(rollouts.responses)
    assert values.shape == (4, 4)
    assert scores.shape == (4,)
    for row, length in enumerate(RESPONSE_LENGTHS):
        prompt = text_of(rollouts.prompts, row)
        text = prompt + responses[row, :length].tolist()
        outputs = reference_model.scalars(model.config, params, text)
        # The value before token t has read the prompt and t tokens; an empty answer is scored where its prompt ends.
        expected = [*outputs[len(prompt) - 1 : len(text) - 1], *[0.0] * (4 - length)]
        np.testing.assert_allclose(values[row], expected, rtol=1e-5, atol=1e-5)
        assert float(scores[row]) == pytest.approx(outputs[-1], rel=1e-5, abs=1e-5)


ANSWER_LENGTHS = np.array([[4, 1, 0], [2, 3, 4]])  # of three responses to two prompts


def some_comparisons() -> Comparisons:
    return Comparisons(
        prompts=ragged_prompts((2, 4), columns=5, seed=1),
        responses=jnp.asarray(np.random.default_rng(2).integers(VOCAB_SIZE, size=(2, 3, 4)), jnp.int32),
        mask=jnp.asarray(np.arange(4) < ANSWER_LENGTHS[..., None]),
        ranks=jnp.zeros((2, 3), jnp.int32),
        valid=jnp.ones((2, 3), bool),
        labeler=jnp.zeros((2,), jnp.int32),
    )


def test_comparisons_are_scored_as_separate_rows(scorer):
    model, params = scorer
    comparisons = some_comparisons()
    scores = jax.jit(lambda c: sequence_scores(model, params, c))(comparisons)
    assert scores.shape == (2, 3)
    responses = np.asarray(comparisons.responses)
    for row, answer in np.ndindex(2, 3):
        text = text_of(comparisons.prompts, row) + responses[row, answer, : ANSWER_LENGTHS[row, answer]].tolist()
        expected = reference_model.scalars(model.config, params, text)[-1]
        assert float(scores[row, answer]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_gradients_behind_one_prompt_are_those_of_separate_rows(scorer):
    model, params = scorer
    comparisons, weights = some_comparisons(), jnp.array([0.7, -1.3, 0.4, 1.1, -0.2, 0.9])
    rows = Rollouts(
        prompts=jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), comparisons.prompts),
        responses=comparisons.responses.reshape(6, 4),
        mask=comparisons.mask.reshape(6, 4),
        logprobs=jnp.zeros((6, 4)),
        ended=jnp.zeros((6,), bool),
    )
    shared, apart = (
        jax.jit(jax.grad(lambda p, x=x: jnp.sum(weights * sequence_scores(model, p, x).reshape(-1))))(params)
        for x in (comparisons, rows)
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(apart)) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), shared, apart)


def test_entropy_and_logprobs_against_the_plain_network(policy):
    rollouts = hand_made()
    logprobs, entropy = jax.device_get(policy.score(rollouts, 0.7))
    alone = jax.jit(lambda r: token_logprobs(policy.model, policy.params, r, temperature=0.7))(rollouts)
    np.testing.assert_allclose(alone, logprobs, atol=1e-5)
    responses = np.asarray(rollouts.responses)
    for row, length in enumerate(RESPONSE_LENGTHS):
        prompt, response = text_of(rollouts.prompts, row), responses[row, :length].tolist()
        expected = reference_model.logprobs(policy.config, policy.params, prompt + response, 0.7)
        expected = expected[len(prompt) - 1 : len(prompt) - 1 + length]
        chosen = [expected[t, token] for t, token in enumerate(response)]
        np.testing.assert_allclose(logprobs[row], [*chosen, *[0.0] * (4 - length)], atol=1e-5)
        entropies = -(np.exp(expected) * expected).sum(axis=-1)
        np.testing.assert_allclose(entropy[row], [*entropies, *[0.0] * (4 - length)], atol=1e-5)


def test_row_logprobs_equal_token_logprobs_of_the_same_text(policy):
    """A row of two documents: each is a prompt of one token and its response."""
    tokens = np.random.default_rng(4).integers(VOCAB_SIZE, size=(1, 9)).astype(np.int32)
    batch = LmBatch(
        tokens=jnp.asarray(tokens),
        segments=jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0]]),
        positions=jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 0]]),
        loss_mask=jnp.asarray([[False, True, True, True, True, False, True, True, False]]),
    )
    logprobs = jax.jit(lambda b: row_logprobs(policy.model, policy.params, b, temperature=1.0))(batch)
    assert logprobs.shape == (1, 9)
    assert float(logprobs[0, 0]) == 0.0
    documents = [tokens[0, :5], tokens[0, 5:8]]
    responses = np.array([documents[0][1:], [*documents[1][1:], 0, 0]], np.int32)
    mask = jnp.asarray([[True] * 4, [True, True, False, False]])
    rollouts = Rollouts(
        prompts=Prompts(tokens=jnp.asarray([[d[0]] for d in documents]), mask=jnp.ones((2, 1), bool)),
        responses=jnp.asarray(responses),
        mask=mask,
        logprobs=jnp.zeros((2, 4)),
        ended=jnp.zeros((2,), bool),
    )
    expected = jax.jit(lambda r: token_logprobs(policy.model, policy.params, r, temperature=1.0))(rollouts)
    np.testing.assert_allclose(logprobs[batch.loss_mask], expected[mask], atol=1e-5)
