"""Sampling against the plain NumPy network, row by row, and what a sample must not depend
on."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tests.support import reference_model
from tests.support.tiny_models import (
    compute,
    gemma_config,
    gpt_config,
    llama_config,
    ragged_prompts,
    random_params,
)

from instructax.generation import decoding as slots_
from instructax.generation import generate, sample_token, sampler
from instructax.models import ModelConfig, Transformer
from instructax.models.scoring import token_logprobs
from instructax.types import Array, Params, Prompts, Rollouts

FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}
LENGTHS = (6, 1, 3, 4, 2, 5, 6, 2)  # of the prompts, which share three slots
COLUMNS, LENGTH = 6, 8  # of prompts and of responses
EOS = 4
SEED = 7  # of the sampling keys: in both families rows end at different places, and some do not end


@dataclasses.dataclass(frozen=True)
class Policy:
    config: ModelConfig
    model: Transformer
    params: Params
    sample: Callable[..., Rollouts]  # prompts, keys, temperature → NumPy arrays
    score: Callable[..., Array]  # rollouts, temperature → log-probabilities


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    config = FAMILIES[request.param]
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)
    sample = jax.jit(
        lambda p, k, t: generate(
            model, params, p, k, length=LENGTH, temperature=t, eos_id=EOS
        )
    )
    score = jax.jit(lambda r, t: token_logprobs(model, params, r, temperature=t))
    return Policy(
        config, model, params, lambda *inputs: jax.device_get(sample(*inputs)), score
    )


def prompts_and_keys(columns: int = COLUMNS) -> tuple[Prompts, Array]:
    """Prompts of which the third ends with the end token, and a key for each."""
    prompts = ragged_prompts(LENGTHS, columns=columns)
    prompts = Prompts(tokens=prompts.tokens.at[2, -1].set(EOS), mask=prompts.mask)
    return prompts, jax.random.split(jax.random.key(SEED), len(LENGTHS))


def text_of(prompts: Prompts, row: int) -> list[int]:
    return np.asarray(prompts.tokens)[row, np.asarray(prompts.mask)[row]].tolist()


def assert_same(a: Rollouts, b: Rollouts, *, rows: list[int], bitwise: bool) -> None:
    """Row i of `a` is row rows[i] of `b`: the tokens exactly, the log-probabilities to the
    bit or up to rounding.

    Programs of different shapes add in different orders: theirs agree up to rounding only.
    """
    for name in ("responses", "mask", "ended"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[np.array(rows)])
    compare = (
        np.testing.assert_array_equal
        if bitwise
        else lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    )
    compare(a.logprobs, b.logprobs[np.array(rows)])


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_samples_follow_the_definition(policy, temperature):
    """Token t is where the cumulative distribution passes the uniform number of
    fold_in(key, t)."""
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, temperature)
    keys_of_tokens = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        keys, jnp.arange(LENGTH)
    )
    uniforms = np.asarray(
        jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (1,))))(keys_of_tokens)
    )[..., 0]
    for row in range(len(LENGTHS)):
        prompt, response = text_of(prompts, row), rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(
            policy.config, policy.params, prompt + response[:-1], temperature
        )
        logprobs = logprobs[len(prompt) - 1 :]
        end = response.index(EOS) + 1 if EOS in response else LENGTH
        for t in range(end):
            cumulative = np.cumsum(np.exp(logprobs[t]))
            assert response[t] == np.searchsorted(
                cumulative, uniforms[row, t], side="right"
            )
            assert float(rollouts.logprobs[row, t]) == pytest.approx(
                logprobs[t, response[t]], abs=1e-5
            )
        assert rollouts.mask[row].tolist() == [t < end for t in range(LENGTH)]
        assert bool(rollouts.ended[row]) == (EOS in response)
        assert set(response[end:]) <= {EOS}
        assert not rollouts.logprobs[row, end:].any()
    lengths = rollouts.mask.sum(axis=1)
    assert (
        len({int(n) for n, ended in zip(lengths, rollouts.ended, strict=True) if ended}) > 1
    ), "ends differ"
    assert not rollouts.ended.all(), "one reaches the limit"
    assert rollouts.mask.dtype == rollouts.ended.dtype == bool


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_equals_rescored(policy, temperature):
    rollouts = policy.sample(*prompts_and_keys(), temperature)
    logprobs = policy.score(rollouts, temperature)
    np.testing.assert_allclose(logprobs, rollouts.logprobs, atol=1e-5)
    other = policy.score(rollouts, temperature + 0.1)
    assert np.abs(other - rollouts.logprobs).max() > 1e-2


def test_windows_and_soft_caps_are_those_of_the_definition():
    """Responses are longer than the window of three tokens, slots are taken over, and
    scores reach the caps."""
    config = gemma_config()
    model = Transformer(config, compute(), "tokens")
    params, (prompts, keys) = random_params(model), prompts_and_keys()
    sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
    rollouts = jax.device_get(jax.jit(sample)(params, prompts, keys))
    rescored = jax.jit(partial(token_logprobs, model, temperature=1.0))(params, rollouts)
    np.testing.assert_allclose(rescored, rollouts.logprobs, atol=1e-5)
    for row in range(len(LENGTHS)):
        prompt, response = text_of(prompts, row), rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(config, params, prompt + response[:-1])[
            len(prompt) - 1 :
        ]
        end = int(rollouts.mask[row].sum())
        wanted = logprobs[np.arange(end), response[:end]]
        np.testing.assert_allclose(rollouts.logprobs[row, :end], wanted, atol=1e-5)


def test_a_sample_depends_on_its_prompt_and_key_alone(policy):
    prompts, keys = prompts_and_keys()
    together = policy.sample(prompts, keys, 1.0)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = policy.sample(
        jax.tree.map(lambda x: x[np.array(order)], prompts), keys[np.array(order)], 1.0
    )
    assert_same(shuffled, together, rows=order, bitwise=True)
    # The second prompt without its neighbours, and three columns further to the right.
    wider, _ = prompts_and_keys(COLUMNS + 3)
    alone = policy.sample(jax.tree.map(lambda x: x[1:2], wider), keys[1:2], 1.0)
    assert_same(alone, together, rows=[1], bitwise=False)


def test_a_sample_does_not_depend_on_what_the_padding_holds(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    for pad in (EOS, 0):  # pad == eos is harmless
        padded = Prompts(
            tokens=jnp.where(prompts.mask, prompts.tokens, pad), mask=prompts.mask
        )
        assert_same(
            policy.sample(padded, keys, 1.0),
            rollouts,
            rows=[*range(len(LENGTHS))],
            bitwise=True,
        )


def test_an_early_exit_changes_nothing(policy):
    """A row that ends early, alone in the batch, so that the loop stops, against the loop
    that ran to the limit."""
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
        logprobs = reference_model.logprobs(
            policy.config, policy.params, prompt + response[:-1]
        )[len(prompt) - 1 :]
        for t in range(int(rollouts.mask[row].sum())):
            assert response[t] == logprobs[t].argmax()
            assert float(rollouts.logprobs[row, t]) == pytest.approx(
                logprobs[t].max(), abs=1e-5
            )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_frequencies_follow_the_probabilities(temperature):
    """χ² of 20 000 draws of six possible tokens, summed over ten keys: 50 degrees of
    freedom, p = 0.0001 at 93."""
    draws, logits = (
        20_000,
        np.array([-np.inf, 1.0, -1.0, -np.inf, 2.0, 0.0, 0.5, -2.0, -np.inf], np.float32),
    )
    weights = np.exp(logits.astype(np.float64) / temperature)
    probabilities = weights / weights.sum()
    possible = probabilities > 0
    expected = draws * probabilities[possible]
    sample = jax.jit(sample_token)
    total = 0.0
    for seed in range(10):
        keys = jax.random.split(jax.random.key(seed), draws)
        tokens, logprobs = sample(
            jnp.broadcast_to(logits, (draws, len(logits))), keys, jnp.float32(temperature)
        )
        counts = np.bincount(tokens, minlength=len(logits))
        assert counts[~possible].sum() == 0
        total += float(((counts[possible] - expected) ** 2 / expected).sum())
        np.testing.assert_allclose(
            logprobs, np.log(probabilities[np.asarray(tokens)]), atol=1e-5
        )
    assert total < 93


@pytest.mark.parametrize("vocab_size", [7, 50257])
def test_no_uniform_number_draws_an_impossible_token(monkeypatch, vocab_size):
    """The extremes, and the running sums themselves: there rounding would draw a token that
    adds nothing."""
    rng = np.random.default_rng(1)
    logits = np.where(
        rng.random(vocab_size) < 0.7, -np.inf, rng.normal(size=vocab_size)
    ).astype(np.float32)
    logits[:2] = logits[-2:] = -np.inf
    logits[3] = 1.0
    sums = np.cumsum(jax.nn.softmax(jnp.asarray(logits)), dtype=np.float32)
    uniforms = np.concatenate(
        [[0.0, 1 - 2**-23, 1 - 2**-24], rng.choice(sums, 300)]
    ).astype(np.float32)
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24))
    monkeypatch.setattr(jax.random, "uniform", lambda number, shape: number.reshape(shape))
    many = jnp.broadcast_to(logits, (len(uniforms), vocab_size))
    tokens, logprobs = sample_token(many, jnp.asarray(uniforms), jnp.float32(1.0))
    possible = np.flatnonzero(np.isfinite(logits))
    assert np.isin(tokens, possible).all()
    assert np.isfinite(logprobs).all()
    assert int(tokens[0]) == possible[0]


@pytest.mark.parametrize(
    ("slots", "halvings"), [(1, 1), (2, 0), (2, 1), (8, 0), (8, 2), (50, 9)]
)
def test_a_sample_does_not_depend_on_the_number_of_slots(policy, slots, halvings):
    prompts, keys = prompts_and_keys()
    model = Transformer(
        policy.config, compute(slots=slots, compaction_steps=halvings), "tokens"
    )
    sample = jax.jit(
        lambda p, k: generate(
            model, policy.params, p, k, length=LENGTH, temperature=1.0, eos_id=EOS
        )
    )
    rows = [*range(len(LENGTHS))]
    assert_same(
        sample(prompts, keys), policy.sample(prompts, keys, 1.0), rows=rows, bitwise=False
    )


def test_devices_with_slots_of_their_own_sample_the_same(policy):
    prompts, keys = prompts_and_keys()
    sample = jax.jit(
        lambda p, k: generate(
            policy.model,
            policy.params,
            p,
            k,
            length=LENGTH,
            temperature=1.0,
            eos_id=EOS,
            groups=2,
        )
    )
    rows = [*range(len(LENGTHS))]
    assert_same(
        sample(prompts, keys), policy.sample(prompts, keys, 1.0), rows=rows, bitwise=False
    )


def test_samples_of_one_prompt_share_it(policy):
    """Sixteen keys for eight prompts: as if each prompt were given twice."""
    prompts, _ = prompts_and_keys()
    keys = jax.random.split(jax.random.key(11), 2 * len(LENGTHS))
    shared = policy.sample(prompts, keys, 1.0)
    twice = policy.sample(
        jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), prompts), keys, 1.0
    )
    assert_same(shared, twice, rows=[*range(len(keys))], bitwise=False)
    np.testing.assert_array_equal(shared.prompts.tokens, twice.prompts.tokens)
    np.testing.assert_array_equal(shared.prompts.mask, twice.prompts.mask)


def test_a_stop_ends_a_response_and_belongs_to_it(policy):
    prompts, keys = prompts_and_keys()
    whole = policy.sample(prompts, keys, 1.0)
    long = whole.mask.sum(axis=1) > 5
    stops = np.isin(np.arange(policy.config.vocab_size), whole.responses[long, 3])
    sample = partial(
        generate,
        policy.model,
        length=LENGTH,
        temperature=1.0,
        eos_id=EOS,
        stop_token_mask=jnp.asarray(stops),
    )
    cut = jax.device_get(jax.jit(sample)(policy.params, prompts, keys))
    lengths = cut.mask.sum(axis=1)
    assert long.sum() > 1 and (lengths[long] <= 4).all()
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(
            cut.responses[row, :length], whole.responses[row, :length]
        )
        assert not stops[cut.responses[row, : length - 1]].any()
        assert cut.ended[row] == (stops[cut.responses[row, length - 1]] or whole.ended[row])
        assert length == LENGTH or cut.ended[row]


def converted(jaxpr: Any, inside: bool = False) -> set[tuple[int, ...]]:
    """Shapes of the float32 arrays that the loops of a program turn into bfloat16."""
    found = set()
    for equation in jaxpr.eqns:
        if (
            inside
            and equation.primitive.name == "convert_element_type"
            and equation.outvars[0].aval.dtype == "bfloat16"
        ):
            found |= {x.aval.shape for x in equation.invars if x.aval.dtype == "float32"}
        for inner in jaxprs_in_params(equation.params):
            found |= converted(
                inner, inside or equation.primitive.name in ("while", "scan")
            )
    return found


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_matrices_are_cast_before_the_loop_and_not_at_every_token(
    policy, dtype, monkeypatch
):
    """A decoding step reads all of them: in bfloat16 half the bytes of float32."""
    model = Transformer(policy.config, compute(decoding=dtype), "tokens")
    prompts, keys = prompts_and_keys()
    blocks = jax.tree_util.tree_leaves_with_path(policy.params["blocks"])
    matrices = {leaf.shape[1:] for path, leaf in blocks if path[-1].key == "kernel"}
    matrices |= {policy.params["embedding"].shape}

    def cast_in_loops() -> set[tuple[int, ...]]:
        sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
        program = jax.make_jaxpr(lambda params: sample(params, prompts, keys))(
            policy.params
        )
        return converted(program.jaxpr) & matrices

    assert not cast_in_loops()
    monkeypatch.setattr(sampler, "cast_matrices", lambda params, compute: params)
    assert cast_in_loops() == matrices - {
        policy.params["embedding"].shape
    }  # the head is cast before all the same


def test_a_sampler_rounds_as_it_is_told_to(policy):
    """In the first token as in those behind it, whose keys and values come from the cache."""
    prompts, keys = prompts_and_keys()
    exact = policy.sample(prompts, keys, 1.0)
    for dtype in ("mixed", "bfloat16"):
        model = Transformer(policy.config, compute(decoding=dtype), "tokens")
        sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
        found = jax.jit(sample)(policy.params, prompts, keys)
        # As long as all tokens are the same, so are the distributions but for rounding.
        same = np.cumprod(found.responses == exact.responses, axis=1).astype(
            bool
        ) & np.asarray(exact.mask)
        gaps = np.abs(found.logprobs - exact.logprobs) * same
        assert same[:, 1:].sum() > 10
        for column in (gaps[:, 0], gaps[:, 1:]):
            assert 1e-5 < column.max() < 0.15


def test_a_limit_of_one_token(policy):
    prompts, keys = prompts_and_keys()
    one = jax.jit(
        lambda p, k: generate(
            policy.model, policy.params, p, k, length=1, temperature=1.0, eos_id=EOS
        )
    )(prompts, keys)
    first = policy.sample(prompts, keys, 1.0)
    np.testing.assert_array_equal(one.responses, first.responses[:, :1])
    np.testing.assert_allclose(one.logprobs, first.logprobs[:, :1], atol=1e-5)
    assert np.all(one.mask)


def draws(monkeypatch, lengths: list[int], slots: int, halvings: int = 0) -> list[int]:
    """How many slots draw a token at each step, for responses of these lengths."""
    model = Transformer(
        gpt_config(), compute(slots=slots, compaction_steps=halvings), "tokens"
    )
    params, keys = random_params(model), jax.random.split(jax.random.key(0), len(lengths))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    numbers = jax.random.key_data(
        fold(keys, jnp.arange(12))
    )  # u32[sample, token, 2], no two alike
    calls = []

    def scripted(logits: Array, keys: Array, _: Array) -> tuple[Array, Array]:
        jax.debug.callback(lambda: calls.append(len(logits)))
        found = jnp.all(numbers[None] == jax.random.key_data(keys)[:, None, None], axis=-1)
        sample, token = jnp.divmod(jnp.argmax(found.reshape(len(logits), -1), axis=1), 12)
        return jnp.where(token + 1 >= jnp.asarray(lengths)[sample], EOS, 0), jnp.zeros(
            len(logits)
        )

    monkeypatch.setattr(slots_, "sample_token", scripted)
    prompts = ragged_prompts([2] * len(lengths), columns=3)
    rollouts = generate(
        model, params, prompts, keys, length=12, temperature=1.0, eos_id=EOS
    )
    jax.effects_barrier()
    assert np.asarray(rollouts.mask).sum(axis=1).tolist() == lengths
    return calls


def test_a_slot_takes_the_next_sample_as_soon_as_its_own_has_ended(monkeypatch):
    lengths = [2, 9, 1, 3, 4, 2]
    # One slot makes 2 + 1 + 3 + 4, the other 9 and the last 2.
    assert draws(monkeypatch, lengths, 2) == [2] * 11
    assert draws(monkeypatch, lengths, 1) == [1] * sum(lengths)
    assert draws(monkeypatch, lengths, 6) == [6] * max(lengths)


def test_slots_are_given_up_when_half_of_them_would_do(monkeypatch):
    lengths = [2, 9, 1, 3, 4, 2]
    assert draws(monkeypatch, lengths, 6, halvings=1) == [6, 6, *[3] * 7]
    assert draws(monkeypatch, lengths, 6, halvings=5) == [6, 6, 3, 3, 1, 1, 1, 1, 1]
    # The last two samples are taken over by slots of the first four, and nothing is given
    # up before.
    assert draws(monkeypatch, lengths, 4, halvings=1) == [4] * 4 + [2] * 5
