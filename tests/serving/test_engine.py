"""Requests one by one or in company: the same tokens as the sampler, the same scores as a
network without padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages
from tests.support.programs import vocabulary_buffers
from tests.support.tiny_models import (
    compute,
    gemma_config,
    gpt_config,
    llama_config,
    ragged_prompts,
    random_params,
)

from instructax import rng
from instructax.config import ConfigError
from instructax.data.batches import left_pad
from instructax.generation import advance_sampling, generate, start_sampling
from instructax.models import Transformer
from instructax.serving import engine
from instructax.serving.engine import Draw, Engine

pytest_plugins = ("tests.support.pipeline_fixture",)

EOS = 12  # one that both draw
FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request):
    model = Transformer(FAMILIES[request.param], compute(), "tokens")
    return model, random_params(model)


def draws_of(count, **changes):
    rng = np.random.default_rng(1)
    limits, temperatures = (9, 1, 5, 12, 7, 3), (1.0, 0.0, 0.7, 1.0, 1.3, 1.0)
    draws = [
        Draw(
            prompt=rng.integers(23, size=1 + 3 * i).astype(np.int32),
            seed=7 + i % 2,
            number=i,
            temperature=temperatures[i],
            limit=limits[i],
        )
        for i in range(count)
    ]
    return [dataclasses.replace(draw, **changes) for draw in draws]


def drawn(engine_, draws, stops=None):
    """The tokens of each sample, and whether it ended."""
    tokens, last = [[] for _ in draws], []
    for last in engine_.stream(draws, stops):
        for own, piece in zip(tokens, last, strict=True):
            own.extend(piece.tokens.tolist())
    assert all(piece.over for piece in last)
    return [(own, piece.ended) for own, piece in zip(tokens, last, strict=True)]


def by_generate(policy, draws, stops):
    """What the sampler draws for each request alone, in one program, cut at its limit."""
    model, params = policy
    ends = {"eos_id": EOS, "stop_token_mask": None if stops is None else jnp.asarray(stops)}
    sample = jax.jit(
        lambda prompts, keys, t: generate(
            model, params, prompts, keys, length=12, temperature=t, **ends
        )
    )
    found = []
    for draw in draws:
        keys = rng.sample_keys(
            rng.step_key(draw.seed, "evaluate", 0), jnp.array([draw.number])
        )
        out = sample(
            left_pad([(0, draw.prompt)], 1, 16), keys, jnp.float32(draw.temperature)
        )
        kept = np.asarray(out.responses[0])[np.asarray(out.mask[0])]
        found.append(
            (kept[: draw.limit].tolist(), bool(out.ended[0]) and len(kept) <= draw.limit)
        )
    return found


@pytest.mark.parametrize("with_stops", [False, True])
def test_streamed_requests_are_what_the_sampler_draws_for_each_alone(policy, with_stops):
    stops = np.isin(np.arange(23), [10, 16]) if with_stops else None
    draws = draws_of(6)
    together = drawn(Engine(*policy, eos_id=EOS, rows=6), draws, stops)
    assert together == by_generate(policy, draws, stops)
    assert {ended for _, ended in together} == {True, False}
    alone = Engine(*policy, eos_id=EOS, rows=4)
    assert [drawn(alone, [draw], stops)[0] for draw in draws] == together
    assert drawn(alone, draws[2:5], stops) == together[2:5]


def test_a_sampling_in_pieces_is_that_of_one_program(policy):
    """With more samples than slots, so that slots change hands between the pieces and
    within them."""
    model, params = policy
    prompts = ragged_prompts((6, 1, 3, 4), columns=6)
    keys = jax.random.split(jax.random.key(3), 8)
    whole = jax.jit(
        lambda: generate(
            model, params, prompts, keys, length=8, temperature=0.9, eos_id=EOS
        )
    )()
    rules = {"limits": jnp.full((8,), 8), "temperature": jnp.full((8,), 0.9), "eos_id": EOS}
    sampling = jax.jit(
        lambda: start_sampling(model, params, prompts, keys, length=8, **rules)
    )()
    go_on = jax.jit(
        lambda sampling, steps: advance_sampling(
            model, params, sampling, steps=steps, eos_id=EOS
        )
    )
    for steps in (0, 1, 3, 2, 100):
        sampling = go_on(sampling, jnp.int32(steps))
    assert whole.mask.sum() < whole.mask.size  # some ended early
    for name in ("responses", "mask", "ended"):
        np.testing.assert_array_equal(
            getattr(sampling.rollouts, name), getattr(whole, name)
        )
    np.testing.assert_allclose(sampling.rollouts.logprobs, whole.logprobs, atol=1e-5)
    stages.assert_trees_equal(sampling.rollouts.prompts, whole.prompts)


def test_a_limit_is_a_samples_own(policy):
    draws = draws_of(6, temperature=1.0)
    for (tokens, ended), draw in zip(
        drawn(Engine(*policy, eos_id=EOS, rows=6), draws), draws, strict=True
    ):
        assert len(tokens) == draw.limit or (ended and len(tokens) <= draw.limit)


def test_few_programs_are_compiled(policy):
    engine_ = Engine(*policy, eos_id=EOS, rows=4)
    with jax.log_compiles(False):
        for draw in draws_of(
            6
        ):  # prompts of 1 … 16 tokens, and up to 12 new ones: one shape
            drawn(engine_, [draw])
        drawn(engine_, draws_of(2))
        drawn(engine_, draws_of(4))
    assert (
        engine_._start._cache_size() == engine_._advance._cache_size() == 2
    )  # one row, all rows


@pytest.mark.parametrize(
    "config", [*FAMILIES.values(), gemma_config()]
)  # the last one's scores are soft-capped
def test_scores_are_those_of_each_text_alone(config):
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)
    rng = np.random.default_rng(0)
    texts = [rng.integers(23, size=n).astype(np.int32) for n in (5, 1, 40, 17, 2)]
    firsts = (1, 0, 30, 2, 1)
    found = Engine(model, params, eos_id=EOS, rows=3).score(
        list(zip(texts, firsts, strict=True)), top=3
    )
    outputs = stages.plain_outputs(model, params, texts)
    for row, (text, first, scores) in enumerate(zip(texts, firsts, found, strict=True)):
        logits = outputs[row, : len(text) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted = np.array([0.0, *logprobs[np.arange(len(text) - 1), text[1:]]])
        asked = np.arange(len(text)) >= max(first, 1)
        np.testing.assert_allclose(scores.logprobs, np.where(asked, wanted, 0.0), atol=2e-5)
        np.testing.assert_array_equal(
            scores.greedy[1:], asked[1:] & (logits.argmax(axis=1) == text[1:])
        )
        best = np.argsort(-logprobs, axis=1)[:, :3]
        np.testing.assert_array_equal(scores.top_ids[1:], best)
        np.testing.assert_allclose(
            scores.top_logprobs[1:], np.take_along_axis(logprobs, best, axis=1), atol=2e-5
        )


def test_a_text_may_be_one_longer_than_the_model_whose_last_token_is_only_predicted(policy):
    model, params = policy
    text = np.random.default_rng(0).integers(23, size=41).astype(np.int32)
    engine_ = Engine(model, params, eos_id=EOS, rows=2)
    (whole,) = engine_.score([(text, 1)])
    (most,) = engine_.score([(text[:40], 1)])
    np.testing.assert_allclose(whole.logprobs[:40], most.logprobs, atol=2e-5)
    logits = stages.plain_outputs(model, params, [text[:40]])[0, 39]
    assert whole.logprobs[40] == pytest.approx(
        logits[text[40]] - np.log(np.exp(logits).sum()), abs=2e-5
    )
    with pytest.raises(
        ConfigError, match="a text of 42 tokens cannot be scored: from 1 to 41 are possible"
    ):
        engine_.score([(np.zeros((42,), np.int32), 1)])


def test_scoring_never_holds_the_scores_of_a_whole_text():
    model = Transformer(gpt_config(vocab_size=8191), compute(head_chunk=4), "tokens")
    shapes = jax.eval_shape(lambda: random_params(model))
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    for top in (0, 5):
        program = jax.jit(lambda *a, top=top: engine._score(model, *a, top=top))
        tokens = jax.ShapeDtypeStruct((2, 33), jnp.int32)
        compiled = program.lower(shapes, tokens, rows, rows).compile().as_text()
        assert max(vocabulary_buffers(compiled, 8191)) < 2 * 32 * 8191


def test_what_does_not_fit_is_one_line(policy):
    engine_ = Engine(*policy, eos_id=EOS, rows=2)
    (draw,) = draws_of(1)
    with pytest.raises(
        ConfigError, match="the prompt has 32 tokens; between 1 and 31 are possible"
    ):
        next(engine_.stream([dataclasses.replace(draw, prompt=np.zeros((32,), np.int32))]))
    with pytest.raises(ConfigError, match="the prompt has 0 tokens"):
        next(engine_.stream([dataclasses.replace(draw, prompt=np.zeros((0,), np.int32))]))
    with pytest.raises(
        ConfigError, match="length = 40 must be below the model's 40 tokens"
    ):
        next(engine_.stream([dataclasses.replace(draw, limit=40)]))
    with pytest.raises(ConfigError, match="3 requests at a time are more than 2"):
        next(engine_.stream([draw] * 3))
