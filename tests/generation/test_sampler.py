"""Samples against the plain NumPy network, row by row, and what a sample must not depend
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
from tests.support.scoring import token_logprobs
from tests.support.tiny_models import (
    compute,
    gemma_config,
    gpt_config,
    llama_config,
    ragged_prompts,
    random_params,
)

from instructax.generation import sampler
from instructax.generation.sampler import generate
from instructax.models.config import ModelConfig
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, Prompts, Rollouts

FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}
PROMPT_LENGTHS = (6, 1, 3, 4, 2, 5, 6, 2)  # eight prompts in three slots
COLUMNS = 6  # P
LENGTH = 8  # R
EOS = 4
# Of the sampling keys. With it, rows of both families end at different places, and some
# rows do not end.
SEED = 7


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
    """Prompts, the third of which ends with the end token, and one key for each."""
    prompts = ragged_prompts(PROMPT_LENGTHS, columns=columns)
    prompts = Prompts(tokens=prompts.tokens.at[2, -1].set(EOS), mask=prompts.mask)
    return prompts, jax.random.split(jax.random.key(SEED), len(PROMPT_LENGTHS))


def prompt_tokens(prompts: Prompts, row: int) -> list[int]:
    return np.asarray(prompts.tokens)[row, np.asarray(prompts.mask)[row]].tolist()


def assert_same(a: Rollouts, b: Rollouts, *, rows: list[int], bitwise: bool) -> None:
    """Checks that row i of `a` is row rows[i] of `b`: the tokens exactly, the
    log-probabilities bit for bit or up to rounding.

    Programs of different shapes add in different orders, so they agree up to rounding only.
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
def test_samples_match_the_definition(policy, temperature):
    """Token t is where the cumulative distribution passes the uniform number drawn with
    fold_in(key, t)."""
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, temperature)
    keys_of_tokens = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        keys, jnp.arange(LENGTH)
    )
    uniforms = np.asarray(
        jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (1,))))(keys_of_tokens)
    )[..., 0]
    for row in range(len(PROMPT_LENGTHS)):
        prompt = prompt_tokens(prompts, row)
        response = rollouts.responses[row].tolist()
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
    ), "rows should end at different places"
    assert not rollouts.ended.all(), "one row should reach the limit"
    assert rollouts.mask.dtype == rollouts.ended.dtype == bool


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_logprobs_equal_rescored_ones(policy, temperature):
    rollouts = policy.sample(*prompts_and_keys(), temperature)
    logprobs = policy.score(rollouts, temperature)
    np.testing.assert_allclose(logprobs, rollouts.logprobs, atol=1e-5)
    other = policy.score(rollouts, temperature + 0.1)
    assert np.abs(other - rollouts.logprobs).max() > 1e-2


def test_windows_and_soft_caps_match_the_definition():
    """Responses are longer than the window of three tokens, slots are refilled, and scores
    reach the caps."""
    config = gemma_config()
    model = Transformer(config, compute(), "tokens")
    params, (prompts, keys) = random_params(model), prompts_and_keys()
    sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
    rollouts = jax.device_get(jax.jit(sample)(params, prompts, keys))
    rescored = jax.jit(partial(token_logprobs, model, temperature=1.0))(params, rollouts)
    np.testing.assert_allclose(rescored, rollouts.logprobs, atol=1e-5)
    for row in range(len(PROMPT_LENGTHS)):
        prompt = prompt_tokens(prompts, row)
        response = rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(config, params, prompt + response[:-1])[
            len(prompt) - 1 :
        ]
        end = int(rollouts.mask[row].sum())
        wanted = logprobs[np.arange(end), response[:end]]
        np.testing.assert_allclose(rollouts.logprobs[row, :end], wanted, atol=1e-5)


def test_a_sample_depends_only_on_its_prompt_and_key(policy):
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


def test_a_sample_does_not_depend_on_the_padding_tokens(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    for pad in (EOS, 0):  # pad == eos is harmless
        padded = Prompts(
            tokens=jnp.where(prompts.mask, prompts.tokens, pad), mask=prompts.mask
        )
        assert_same(
            policy.sample(padded, keys, 1.0),
            rollouts,
            rows=[*range(len(PROMPT_LENGTHS))],
            bitwise=True,
        )


def test_an_early_exit_of_the_loop_changes_nothing(policy):
    """Compares a batch of copies of a row that ends early, where the loop stops early, with
    the loop that ran to the limit."""
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    early = int(np.argmin(rollouts.mask.sum(axis=1)))
    assert rollouts.ended[early]
    assert rollouts.mask[early].sum() < LENGTH
    rows = np.full(len(PROMPT_LENGTHS), early)
    repeated = policy.sample(jax.tree.map(lambda x: x[rows], prompts), keys[rows], 1.0)
    assert_same(repeated, rollouts, rows=rows.tolist(), bitwise=True)


def test_different_keys_give_different_samples(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 1.0)
    others = policy.sample(
        prompts, jax.random.split(jax.random.key(4), len(PROMPT_LENGTHS)), 1.0
    )
    assert (rollouts.responses != others.responses).any(axis=1).mean() > 0.5


def test_temperature_zero_takes_the_most_likely_token(policy):
    prompts, keys = prompts_and_keys()
    rollouts = policy.sample(prompts, keys, 0.0)
    for row in range(len(PROMPT_LENGTHS)):
        prompt = prompt_tokens(prompts, row)
        response = rollouts.responses[row].tolist()
        logprobs = reference_model.logprobs(
            policy.config, policy.params, prompt + response[:-1]
        )[len(prompt) - 1 :]
        for t in range(int(rollouts.mask[row].sum())):
            assert response[t] == logprobs[t].argmax()
            assert float(rollouts.logprobs[row, t]) == pytest.approx(
                logprobs[t].max(), abs=1e-5
            )


@pytest.mark.parametrize(
    ("slots", "compaction_steps"), [(1, 1), (2, 0), (2, 1), (8, 0), (8, 2), (50, 9)]
)
def test_a_sample_does_not_depend_on_the_number_of_slots(policy, slots, compaction_steps):
    prompts, keys = prompts_and_keys()
    model = Transformer(
        policy.config, compute(slots=slots, compaction_steps=compaction_steps), "tokens"
    )
    sample = jax.jit(
        lambda p, k: generate(
            model, policy.params, p, k, length=LENGTH, temperature=1.0, eos_id=EOS
        )
    )
    rows = [*range(len(PROMPT_LENGTHS))]
    assert_same(
        sample(prompts, keys), policy.sample(prompts, keys, 1.0), rows=rows, bitwise=False
    )


def test_groups_with_their_own_slots_draw_the_same_samples(policy):
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
    rows = [*range(len(PROMPT_LENGTHS))]
    assert_same(
        sample(prompts, keys), policy.sample(prompts, keys, 1.0), rows=rows, bitwise=False
    )


def test_samples_of_one_prompt_equal_those_of_repeated_prompts(policy):
    """Sixteen keys for eight prompts give the same samples as each prompt given twice."""
    prompts, _ = prompts_and_keys()
    keys = jax.random.split(jax.random.key(11), 2 * len(PROMPT_LENGTHS))
    shared = policy.sample(prompts, keys, 1.0)
    twice = policy.sample(
        jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), prompts), keys, 1.0
    )
    assert_same(shared, twice, rows=[*range(len(keys))], bitwise=False)
    np.testing.assert_array_equal(shared.prompts.tokens, twice.prompts.tokens)
    np.testing.assert_array_equal(shared.prompts.mask, twice.prompts.mask)


def test_a_stop_token_ends_a_response_and_belongs_to_it(policy):
    prompts, keys = prompts_and_keys()
    whole = policy.sample(prompts, keys, 1.0)
    long = whole.mask.sum(axis=1) > 5
    is_stop = np.isin(np.arange(policy.config.vocab_size), whole.responses[long, 3])
    sample = partial(
        generate,
        policy.model,
        length=LENGTH,
        temperature=1.0,
        eos_id=EOS,
        stop_token_mask=jnp.asarray(is_stop),
    )
    cut = jax.device_get(jax.jit(sample)(policy.params, prompts, keys))
    lengths = cut.mask.sum(axis=1)
    assert long.sum() > 1 and (lengths[long] <= 4).all()
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(
            cut.responses[row, :length], whole.responses[row, :length]
        )
        assert not is_stop[cut.responses[row, : length - 1]].any()
        assert cut.ended[row] == (
            is_stop[cut.responses[row, length - 1]] or whole.ended[row]
        )
        assert length == LENGTH or cut.ended[row]


def cast_shapes_in_loops(jaxpr: Any, inside: bool = False) -> set[tuple[int, ...]]:
    """Shapes of the float32 arrays that loops of a program cast to bfloat16."""
    found = set()
    for equation in jaxpr.eqns:
        if (
            inside
            and equation.primitive.name == "convert_element_type"
            and equation.outvars[0].aval.dtype == "bfloat16"
        ):
            found |= {x.aval.shape for x in equation.invars if x.aval.dtype == "float32"}
        for inner in jaxprs_in_params(equation.params):
            found |= cast_shapes_in_loops(
                inner, inside or equation.primitive.name in ("while", "scan")
            )
    return found


@pytest.mark.parametrize("dtype", ["bf16_matmul", "bfloat16"])
def test_matrices_are_cast_before_the_loop_and_not_for_every_token(
    policy, dtype, monkeypatch
):
    """A decoding step reads all matrices; in bfloat16 they have half the bytes."""
    model = Transformer(policy.config, compute(decoding_dtype=dtype), "tokens")
    prompts, keys = prompts_and_keys()
    blocks = jax.tree_util.tree_leaves_with_path(policy.params["blocks"])
    matrices = {leaf.shape[1:] for path, leaf in blocks if path[-1].key == "kernel"}
    matrices |= {policy.params["embedding"].shape}

    def matrices_cast_in_loops() -> set[tuple[int, ...]]:
        sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
        program = jax.make_jaxpr(lambda params: sample(params, prompts, keys))(
            policy.params
        )
        return cast_shapes_in_loops(program.jaxpr) & matrices

    assert not matrices_cast_in_loops()
    monkeypatch.setattr(sampler, "cast_matrices", lambda params, compute: params)
    # The head is still cast before the loop.
    assert matrices_cast_in_loops() == matrices - {policy.params["embedding"].shape}


def test_the_decoding_dtype_sets_the_rounding(policy):
    """Of the first token, and of later ones, whose keys and values come from the cache."""
    prompts, keys = prompts_and_keys()
    exact = policy.sample(prompts, keys, 1.0)
    for dtype in ("bf16_matmul", "bfloat16"):
        model = Transformer(policy.config, compute(decoding_dtype=dtype), "tokens")
        sample = partial(generate, model, length=LENGTH, temperature=1.0, eos_id=EOS)
        rounded = jax.jit(sample)(policy.params, prompts, keys)
        # As long as all previous tokens agree, the distributions agree up to rounding.
        same = np.cumprod(rounded.responses == exact.responses, axis=1).astype(
            bool
        ) & np.asarray(exact.mask)
        gaps = np.abs(rounded.logprobs - exact.logprobs) * same
        assert same[:, 1:].sum() > 10
        for column in (gaps[:, 0], gaps[:, 1:]):
            assert 1e-5 < column.max() < 0.15


def test_responses_of_at_most_one_token(policy):
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
