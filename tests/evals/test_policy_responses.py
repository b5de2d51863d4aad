"""Few-shot and best-of responses, their scores and their KL."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.stages.test_evaluate import network, parts, responses_of
from tests.support import stages
from tests.support.run_logs import read_samples

from instructax import rng
from instructax.data.batches import evaluation_rows, prompt_batch
from instructax.evals.policy_responses import PolicyEvaluator, truncate_at_stops
from instructax.generation.sampler import generate
from instructax.runtime.metric_log import read_summary
from instructax.types import Prompts, Rollouts

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")


def test_a_response_is_truncated_at_its_first_stop_token():
    stop_token_mask = jnp.arange(10) == 4
    eos_id = 9
    rollouts = Rollouts(
        prompts=Prompts(tokens=jnp.zeros((3, 1), jnp.int32), mask=jnp.ones((3, 1), bool)),
        responses=jnp.array([[5, 4, 6, 4], [5, 6, 7, 8], [5, 9, 4, 4]]),
        mask=jnp.array([[True] * 4, [True] * 4, [True, True, False, False]]),
        logprobs=jnp.full((3, 4), -1.5),
        ended=jnp.array([False, False, True]),
    )
    truncated, kept = truncate_at_stops(rollouts, stop_token_mask, eos_id)
    two = [True, True, False, False]
    assert truncated.responses[0].tolist() == [5, 9, 9, 9]
    assert truncated.responses[1].tolist() == [5, 6, 7, 8]
    assert truncated.mask.tolist() == [two, [True] * 4, two]
    assert kept.tolist() == [[True, False, False, False], [True] * 4, two]
    assert truncated.ended.tolist() == [True, False, True]
    assert truncated.logprobs[0].tolist() == [-1.5, 0, 0, 0]


@cache
def sft_rollouts(chain, num_samples: int) -> list[Rollouts]:
    """Samples of the SFT policy for the first 16 validation prompts, one batch per draw."""
    config, tokenizer, data = parts(chain)
    model, params = network(chain, "sft", "tokens")
    source = data["prompts"].sources["validation"]
    rows = next(evaluation_rows(len(source), 16))
    prompts = prompt_batch(source, rows, config.data.limits.prompt_tokens)

    @jax.jit
    def sample(draw):
        step_key = rng.step_key(config.seed, "evaluate", draw)
        return generate(
            model,
            params,
            prompts,
            rng.sample_keys(step_key, jnp.asarray(rows, jnp.int32)),
            length=config.data.limits.response_tokens,
            temperature=1.0,
            eos_id=tokenizer.eos_id,
        )

    return [sample(draw) for draw in range(num_samples)]


def test_best_of_n_is_the_best_scored_of_n_samples(chain):
    config, tokenizer, _ = parts(chain)
    all_rollouts = sft_rollouts(chain, config.best_of)
    reward_model = network(chain, "reward", "scalar")
    scores = []
    for rollouts in all_rollouts:
        texts = stages.responses_of(rollouts)
        scores.append(stages.plain_scores(*reward_model, texts))
    scores = np.array(scores)  # [n, 16]
    best_draws = scores.argmax(axis=0)
    assert len(set(best_draws)) > 1

    best = responses_of(chain, "best-of-n")
    np.testing.assert_allclose(
        [response["score"] for response in best], scores.max(axis=0), rtol=1e-4, atol=1e-5
    )
    for row, draw in enumerate(best_draws):
        rollouts = all_rollouts[draw]
        mask = np.asarray(rollouts.mask[row])
        tokens = np.asarray(rollouts.responses[row])[mask]
        assert best[row]["response"] == tokenizer.decode(tokens)
    for one, plain in zip(best, responses_of(chain, "SFT"), strict=True):
        assert one["score"] >= plain["score"]


def test_a_few_shot_policy_reads_examples_but_is_scored_without_them(chain):
    config, tokenizer, data = parts(chain)
    model, params = network(chain, "pretrain", "tokens")
    _, ref_params = network(chain, "sft", "tokens")
    reward_model, reward_params = network(chain, "reward", "scalar")
    evaluator = PolicyEvaluator(
        model,
        reward_model,
        stages.mesh_of(),
        tokenizer,
        config.data.limits,
        ref_params,
        reward_params,
        temperature=1.0,
        batch_size=16,
        seed=0,
    )
    prefix = tokenizer.encode("Name a tool.\n\nSaw.\n\n")
    source = data["prompts"].sources["validation"]
    ((real, responses),) = evaluator.batches(
        params, source, 16, prefix=prefix, num_samples=1
    )
    assert real.all()

    # The reward model and the reference read prompt and response alone.
    rollouts = responses.rollouts
    texts = stages.responses_of(rollouts)
    scores = stages.plain_scores(reward_model, reward_params, texts)
    np.testing.assert_allclose(responses.scores, scores, rtol=1e-4, atol=1e-5)

    prefixed = [np.concatenate([prefix, tokens]) for tokens in texts]
    logprobs = stages.plain_logprobs(model, params, prefixed)
    ref_logprobs = stages.plain_logprobs(model, ref_params, texts)
    num_truncated = 0
    for row in range(16):
        # Without the end token that truncation inserted.
        sampled = rollouts.mask[row] & (rollouts.logprobs[row] != 0)
        length = rollouts.mask[row].sum()
        num_truncated += sampled.sum() < length
        log_ratios = logprobs[row][-length:] - ref_logprobs[row][-length:]
        np.testing.assert_allclose(
            responses.token_kl[row][sampled], log_ratios[: sampled.sum()], atol=2e-4
        )
        assert not responses.token_kl[row][~sampled].any()
    assert num_truncated > 0


def test_few_shot_responses_are_single_lines(chain):
    prefix = read_summary(chain / "evaluate")["prefixes"]["GPT prompted"]
    assert prefix.endswith("\n\n")
    few_shot = responses_of(chain, "GPT prompted")
    plain = responses_of(chain, "GPT")

    def values(responses, name):
        return [response[name] for response in responses]

    assert values(few_shot, "prompt") == values(plain, "prompt")
    assert values(few_shot, "response") != values(plain, "response")
    for response in few_shot:
        assert "\n" not in response["response"]
        assert len(response["pieces"]) == response["tokens"]
        assert len(response["token_kl"]) == response["tokens"]


def test_the_kl_of_a_response_is_the_sum_over_its_tokens(chain):
    for response in read_samples(chain / "evaluate"):
        # Each token's KL is rounded to four decimals.
        tolerance = 1e-3 + 6e-5 * response["tokens"]
        assert sum(response["token_kl"]) == pytest.approx(response["kl"], abs=tolerance)
