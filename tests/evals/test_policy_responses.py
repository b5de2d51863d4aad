"""The ways a policy is asked: behind examples, and for the best of several answers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.stages.test_evaluate import network, parts, responses_of
from tests.support import stages

from instructax import generation, rng
from instructax.data.batches import evaluation_rows, prompt_batch
from instructax.evals.policy_responses import (
    PolicyEvaluator,
    prepend_prefix,
    truncate_at_stops,
)
from instructax.experiment import samples_of, summary_of
from instructax.types import Prompts, Rollouts

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")


def test_a_prefix_stands_right_before_each_prompt():
    prompts = Prompts(
        tokens=np.array([[0, 5, 6], [7, 8, 9]]),
        mask=np.array([[False, True, True], [True, True, True]]),
    )
    asked = prepend_prefix(np.array([1, 2]), prompts, 3)
    assert asked.tokens.tolist() == [[0, 0, 1, 2, 5, 6], [0, 1, 2, 7, 8, 9]]
    assert asked.mask.tolist() == [
        [False, False, True, True, True, True],
        [False, True, True, True, True, True],
    ]


def test_an_answer_ends_at_the_first_stop():
    stops = jnp.arange(10) == 4
    rollouts = Rollouts(
        prompts=Prompts(tokens=jnp.zeros((3, 1), jnp.int32), mask=jnp.ones((3, 1), bool)),
        responses=jnp.array(
            [[5, 4, 6, 4], [5, 6, 7, 8], [5, 9, 4, 4]]
        ),  # 9 is the end token
        mask=jnp.array([[True] * 4, [True] * 4, [True, True, False, False]]),
        logprobs=jnp.full((3, 4), -1.5),
        ended=jnp.array([False, False, True]),
    )
    cut, kept = truncate_at_stops(rollouts, stops, 9)
    assert cut.responses[0].tolist() == [5, 9, 9, 9]
    assert cut.responses[1].tolist() == [5, 6, 7, 8]
    assert cut.mask.tolist() == [
        [True, True, False, False],
        [True] * 4,
        [True, True, False, False],
    ]
    assert kept.tolist() == [
        [True, False, False, False],
        [True] * 4,
        [True, True, False, False],
    ]
    assert cut.ended.tolist() == [True, False, True]
    assert cut.logprobs[0].tolist() == [-1.5, 0, 0, 0]


@cache
def draws_of(chain, count: int) -> list[Rollouts]:
    """`count` draws of what the SFT policy answers to the first 16 held-out prompts."""
    config, tokenizer, data = parts(chain)
    model, params = network(chain, "sft", "tokens")
    limits, source = config.data.limits, data["prompts"].sources["validation"]
    rows = next(evaluation_rows(len(source), 16))
    prompts = prompt_batch(source, rows, limits.prompt_tokens)

    @jax.jit
    def sample(draw):
        keys = rng.sample_keys(
            rng.step_key(config.seed, "evaluate", draw), jnp.asarray(rows, jnp.int32)
        )
        return generation.generate(
            model,
            params,
            prompts,
            keys,
            length=limits.response_tokens,
            temperature=1.0,
            eos_id=tokenizer.eos_id,
        )

    return [sample(draw) for draw in range(count)]


def test_best_of_n_is_the_best_scored_of_n_draws(chain):
    config, tokenizer, _ = parts(chain)
    drawn = draws_of(chain, config.best_of)
    scores = np.array(
        [
            stages.plain_scores(
                *network(chain, "reward", "scalar"), stages.responses_of(rollouts)
            )
            for rollouts in drawn
        ]
    )
    best = responses_of(chain, "best-of-n")
    np.testing.assert_allclose(
        [answer["score"] for answer in best], scores.max(axis=0), rtol=1e-4, atol=1e-5
    )
    assert len(set(scores.argmax(axis=0))) > 1
    for row, draw in enumerate(scores.argmax(axis=0)):
        mask = np.asarray(drawn[draw].mask[row])
        assert best[row]["response"] == tokenizer.decode(
            np.asarray(drawn[draw].responses[row])[mask]
        )
    plain = responses_of(chain, "SFT")
    assert all(ours["score"] >= one["score"] for ours, one in zip(best, plain, strict=True))


def test_a_prompted_policy_reads_examples_and_is_scored_without_them(chain):
    config, tokenizer, data = parts(chain)
    (model, params), (_, ref_params), (scorer, reward_params) = (
        network(chain, *of)
        for of in (("pretrain", "tokens"), ("sft", "tokens"), ("reward", "scalar"))
    )
    sampling = {"temperature": 1.0, "batch_size": 16, "seed": 0}
    mesh, limits = stages.mesh_of(), config.data.limits
    answering = PolicyEvaluator(
        model, scorer, mesh, tokenizer, limits, ref_params, reward_params, **sampling
    )
    prefix = tokenizer.encode("Name a tool.\n\nSaw.\n\n")
    source = data["prompts"].sources["validation"]
    ((real, answers),) = answering.batches(params, source, 16, prefix, 1)
    assert real.all()
    rollouts, rows = answers.rollouts, range(16)
    documents = stages.responses_of(rollouts)
    np.testing.assert_allclose(
        answers.scores,
        stages.plain_scores(scorer, reward_params, documents),
        rtol=1e-4,
        atol=1e-5,
    )
    behind_prefix = [np.concatenate([prefix, tokens]) for tokens in documents]
    ours = stages.plain_logprobs(model, params, behind_prefix)
    theirs = stages.plain_logprobs(model, ref_params, documents)
    sampled = [
        rollouts.mask[row] & (rollouts.logprobs[row] != 0) for row in rows
    ]  # without the end put in place
    assert any(mask.sum() < rollouts.mask[row].sum() for row, mask in enumerate(sampled))
    for row, mask in enumerate(sampled):
        length = rollouts.mask[row].sum()
        gaps = (ours[row][-length:] - theirs[row][-length:])[: mask.sum()]
        np.testing.assert_allclose(answers.token_kl[row][mask], gaps, atol=2e-4)
        assert not answers.token_kl[row][~mask].any()


def test_prompted_answers_are_lines_behind_demonstrations(chain):
    prefix = summary_of(chain / "evaluate")["prefixes"]["GPT prompted"]
    assert prefix.endswith("\n\n")
    answers, plain = responses_of(chain, "GPT prompted"), responses_of(chain, "GPT")
    assert [answer["prompt"] for answer in answers] == [
        answer["prompt"] for answer in plain
    ]
    assert [answer["response"] for answer in answers] != [
        answer["response"] for answer in plain
    ]
    assert not any("\n" in answer["response"] for answer in answers)
    assert all(
        len(answer["pieces"]) == len(answer["token_kl"]) == answer["tokens"]
        for answer in answers
    )


def test_the_kl_of_an_answer_is_the_sum_over_its_tokens(chain):
    for answer in samples_of(chain / "evaluate"):
        assert sum(answer["token_kl"]) == pytest.approx(
            answer["kl"], abs=1e-3 + 6e-5 * answer["tokens"]
        )
