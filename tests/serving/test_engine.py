"""The engine's samples equal the sampler's, and its scores those of an unpadded network."""

import dataclasses
import functools

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
from instructax.generation.sampler import advance_sampling, generate, start_sampling
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine, SampleRequest, ScoreRequest, _score

pytest_plugins = ("tests.support.pipeline_fixture",)

EOS_ID = 12  # both models sample it
VOCAB_SIZE = 23
BATCH_SIZE = 6
FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request):
    model = Transformer(FAMILIES[request.param], compute(), "tokens")
    return model, random_params(model)


@pytest.fixture(scope="module")
def engine(policy):
    """One engine for all tests of a model, so that its programs are compiled once."""
    return Engine(*policy, eos_id=EOS_ID, batch_size=BATCH_SIZE)


def make_requests(count, **changes):
    """Requests with prompts of 1, 4, 7, … tokens."""
    random = np.random.default_rng(1)
    max_new_tokens = (9, 1, 5, 12, 7, 3)
    temperatures = (1.0, 0.0, 0.7, 1.0, 1.3, 1.0)
    requests = []
    for i in range(count):
        request = SampleRequest(
            prompt=random.integers(VOCAB_SIZE, size=1 + 3 * i).astype(np.int32),
            seed=7 + i % 2,
            sample_index=i,
            temperature=temperatures[i],
            max_new_tokens=max_new_tokens[i],
        )
        requests.append(dataclasses.replace(request, **changes))
    return requests


def draw(engine, requests, stop_token_mask=None):
    """(tokens, whether it hit the end token) of each sample."""
    tokens = [[] for _ in requests]
    chunks = []
    for chunks in engine.stream(requests, stop_token_mask):
        for own, chunk in zip(tokens, chunks, strict=True):
            own.extend(chunk.tokens.tolist())
    assert all(chunk.done for chunk in chunks)
    return [(own, chunk.hit_eos) for own, chunk in zip(tokens, chunks, strict=True)]


@pytest.fixture(scope="module")
def draw_alone(policy):
    """A function that draws one request with the sampler, in one program."""
    model, params = policy

    @jax.jit
    def sample(prompts, keys, temperature, stop_token_mask):
        return generate(
            model,
            params,
            prompts,
            keys,
            length=12,
            temperature=temperature,
            eos_id=EOS_ID,
            stop_token_mask=stop_token_mask,
        )

    def draw_one(request, stop_token_mask):
        step_key = rng.step_key(request.seed, "evaluate", 0)
        keys = rng.sample_keys(step_key, jnp.array([request.sample_index]))
        prompts = left_pad([(0, request.prompt)], 1, 16)
        rollouts = sample(prompts, keys, jnp.float32(request.temperature), stop_token_mask)
        tokens = np.asarray(rollouts.responses[0])[np.asarray(rollouts.mask[0])]
        hit_eos = bool(rollouts.ended[0]) and len(tokens) <= request.max_new_tokens
        return tokens[: request.max_new_tokens].tolist(), hit_eos

    return draw_one


@pytest.mark.parametrize("stop_ids", [[], [10, 16]], ids=["no_stops", "stops"])
def test_streamed_samples_equal_the_sampler_on_each_request_alone(
    engine, draw_alone, stop_ids
):
    stop_token_mask = np.isin(np.arange(VOCAB_SIZE), stop_ids)
    requests = make_requests(6)
    batched = draw(engine, requests, stop_token_mask if stop_ids else None)
    assert batched == [draw_alone(request, stop_token_mask) for request in requests]
    assert {hit_eos for _, hit_eos in batched} == {True, False}

    # One row, and a batch that is not full, draw the same tokens.
    for request, expected in zip(requests, batched, strict=True):
        assert draw(engine, [request], stop_token_mask) == [expected]
    assert draw(engine, requests[2:5], stop_token_mask) == batched[2:5]


def test_sampling_in_steps_equals_one_program(policy):
    """There are more samples than slots, so slots are reused between and within steps."""
    model, params = policy
    prompts = ragged_prompts((6, 1, 3, 4), columns=6)
    keys = jax.random.split(jax.random.key(3), 8)

    @jax.jit
    def generate_all():
        return generate(
            model, params, prompts, keys, length=8, temperature=0.9, eos_id=EOS_ID
        )

    @jax.jit
    def start():
        return start_sampling(
            model,
            params,
            prompts,
            keys,
            length=8,
            max_new_tokens=jnp.full((8,), 8),
            temperature=jnp.full((8,), 0.9),
            eos_id=EOS_ID,
        )

    @jax.jit
    def advance(sampling, steps):
        return advance_sampling(model, params, sampling, steps=steps, eos_id=EOS_ID)

    whole = generate_all()
    sampling = start()
    for steps in (0, 1, 3, 2, 100):
        sampling = advance(sampling, jnp.int32(steps))
    assert whole.mask.sum() < whole.mask.size  # some ended early
    for name in ("responses", "mask", "ended"):
        np.testing.assert_array_equal(
            getattr(sampling.rollouts, name), getattr(whole, name)
        )
    np.testing.assert_allclose(sampling.rollouts.logprobs, whole.logprobs, atol=1e-5)
    stages.assert_trees_equal(sampling.rollouts.prompts, whole.prompts)


def test_each_sample_has_its_own_token_limit(engine):
    requests = make_requests(6, temperature=1.0)
    for request, (tokens, hit_eos) in zip(requests, draw(engine, requests), strict=True):
        assert len(tokens) <= request.max_new_tokens
        assert hit_eos or len(tokens) == request.max_new_tokens


def test_few_programs_are_compiled(engine):
    # Prompts of 1 … 16 tokens and up to 12 new tokens share one padded shape.
    for request in make_requests(6):
        draw(engine, [request])
    draw(engine, make_requests(2))
    draw(engine, make_requests(4))
    # One program for a single row and one for all rows.
    assert engine._start._cache_size() == 2
    assert engine._advance._cache_size() == 2


# Gemma soft-caps its logits.
@pytest.mark.parametrize("config", [*FAMILIES.values(), gemma_config()])
def test_scores_equal_a_forward_pass_over_each_text_alone(config):
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)
    random = np.random.default_rng(0)
    requests = []
    for length, start in ((5, 1), (1, 0), (40, 30), (17, 2), (2, 1)):
        text = random.integers(VOCAB_SIZE, size=length).astype(np.int32)
        requests.append(ScoreRequest(tokens=text, start=start))
    found = Engine(model, params, eos_id=EOS_ID, batch_size=3).score(requests, top=3)

    texts = [request.tokens for request in requests]
    outputs = stages.plain_outputs(model, params, texts)
    for row, (request, scores) in enumerate(zip(requests, found, strict=True)):
        text = request.tokens
        logits = outputs[row, : len(text) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        of_text = np.array([0.0, *logprobs[np.arange(len(text) - 1), text[1:]]])
        scored = np.arange(len(text)) >= max(request.start, 1)
        np.testing.assert_allclose(
            scores.logprobs, np.where(scored, of_text, 0.0), atol=2e-5
        )
        np.testing.assert_array_equal(
            scores.greedy[1:], scored[1:] & (logits.argmax(axis=1) == text[1:])
        )
        best = np.argsort(-logprobs, axis=1)[:, :3]
        np.testing.assert_array_equal(scores.top_ids[1:], best)
        np.testing.assert_allclose(
            scores.top_logprobs[1:], np.take_along_axis(logprobs, best, axis=1), atol=2e-5
        )


def test_a_text_may_be_one_token_longer_than_the_context(policy, engine):
    """Its last token is only predicted."""
    model, params = policy
    text = np.random.default_rng(0).integers(VOCAB_SIZE, size=41).astype(np.int32)
    (whole,) = engine.score([ScoreRequest(tokens=text, start=1)])
    (most,) = engine.score([ScoreRequest(tokens=text[:40], start=1)])
    np.testing.assert_allclose(whole.logprobs[:40], most.logprobs, atol=2e-5)
    logits = stages.plain_outputs(model, params, [text[:40]])[0, 39]
    last = logits[text[40]] - np.log(np.exp(logits).sum())
    assert whole.logprobs[40] == pytest.approx(last, abs=2e-5)
    with pytest.raises(
        ConfigError, match="a text of 42 tokens cannot be scored: from 1 to 41 are possible"
    ):
        engine.score([ScoreRequest(tokens=np.zeros((42,), np.int32), start=1)])


def test_scoring_never_holds_the_logits_of_a_whole_text():
    model = Transformer(gpt_config(vocab_size=8191), compute(head_chunk=4), "tokens")
    params = jax.eval_shape(lambda: random_params(model))
    tokens = jax.ShapeDtypeStruct((2, 33), jnp.int32)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    for top in (0, 5):
        program = jax.jit(functools.partial(_score, model, top=top))
        compiled = program.lower(params, tokens, rows, rows).compile().as_text()
        assert max(vocabulary_buffers(compiled, 8191)) < 2 * 32 * 8191


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        (
            {"prompt": np.zeros((32,), np.int32)},
            1,
            "the prompt has 32 tokens; between 1 and 31 are possible",
        ),
        ({"prompt": np.zeros((0,), np.int32)}, 1, "the prompt has 0 tokens"),
        (
            {"max_new_tokens": 40},
            1,
            "max_new_tokens = 40 must be below the model's 40 tokens",
        ),
        ({}, BATCH_SIZE + 1, "7 requests at a time are more than 6"),
    ],
)
def test_requests_that_do_not_fit_are_refused(engine, changes, count, message):
    (request,) = make_requests(1, **changes)
    with pytest.raises(ConfigError, match=message):
        next(engine.stream([request] * count))
