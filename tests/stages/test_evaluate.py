"""Metrics of finished policies, each against a direct computation."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages
from tests.support.run_logs import read_samples
from tests.support.saved import load_newest_params

from instructax import rng, sharding
from instructax.checkpoints.parents import tokenizer_of
from instructax.data import loaders
from instructax.data.batches import evaluation_rows, lm_batch, prompt_batch
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.evals.intervals import share_estimate
from instructax.experiment import run_stage
from instructax.generation.sampler import generate
from instructax.models.init import init_params
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import read_summary

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

POLICIES = {"GPT": "pretrain", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ppo-ptx"}


@cache
def parts(chain):
    """(config, tokenizer, prepared data) of the chain's evaluation."""
    config = stages.config_with_kernel(stages.config_of(chain, "evaluate", {}))
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    return config, tokenizer, config.prepare_data(tokenizer, PLAIN_FORMAT)


@cache
def network(chain, run: str, head: str):
    """(model, parameters) of a finished run."""
    config = parts(chain)[0]
    model = Transformer(config.model, config.compute, head)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return model, load_newest_params(
        chain / run, sharding.abstract_arrays(shapes, stages.mesh_of())
    )


@cache
def rollouts_of(chain, run: str, temperature: float = 1.0):
    """A policy's responses to the first 16 validation prompts; one key per sample."""
    config, tokenizer, data = parts(chain)
    model, params = network(chain, run, "tokens")
    limits = config.data.limits
    source = data["prompts"].sources["validation"]
    rows = next(evaluation_rows(len(source), 16))
    prompts = prompt_batch(source, rows, limits.prompt_tokens)
    keys = rng.sample_keys(
        rng.step_key(config.seed, "evaluate", 0), jnp.asarray(rows, jnp.int32)
    )
    sample = partial(
        generate, model, length=limits.response_tokens, eos_id=tokenizer.eos_id
    )
    return jax.jit(partial(sample, temperature=temperature))(params, prompts, keys)


def responses_of(chain, name: str):
    return [
        sample for sample in read_samples(chain / "evaluate") if sample["policy"] == name
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_scores_and_kl_equal_a_direct_computation(chain, name):
    tokenizer = parts(chain)[1]
    rollouts = rollouts_of(chain, POLICIES[name])
    answers = responses_of(chain, name)
    mask = np.asarray(rollouts.mask)
    documents = stages.responses_of(rollouts)
    assert len(answers) == 16
    assert [a["response"] for a in answers] == [
        tokenizer.decode(response[real])
        for response, real in zip(np.asarray(rollouts.responses), mask, strict=True)
    ]
    assert [a["tokens"] for a in answers] == mask.sum(axis=1).tolist()
    assert [a["ended"] for a in answers] == np.asarray(rollouts.ended).tolist()
    scores = stages.plain_scores(*network(chain, "reward", "scalar"), documents)
    np.testing.assert_allclose([a["score"] for a in answers], scores, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        stages.plain_logprobs(*network(chain, run, "tokens"), documents)
        for run in (POLICIES[name], "sft")
    )
    kl = [
        (own - reference)[-real.sum() :].sum()
        for own, reference, real in zip(ours, theirs, mask, strict=True)
    ]
    np.testing.assert_allclose([a["kl"] for a in answers], kl, atol=2e-4)


def test_answers_and_kl_use_the_configs_temperature(chain, tmp_path):
    overrides = {
        "temperature": 0.5,
        "policies": (
            ("SFT", str(chain / "sft"), "plain"),
            ("PPO", str(chain / "ppo"), "plain"),
        ),
        "data.text": (),
        "data.comparisons": (),
    }
    assert run_stage(stages.config_of(chain, "evaluate", overrides), tmp_path / "run")
    answers = [
        sample for sample in read_samples(tmp_path / "run") if sample["policy"] == "PPO"
    ]
    rollouts = rollouts_of(chain, "ppo", temperature=0.5)
    tokenizer = parts(chain)[1]
    mask = np.asarray(rollouts.mask)
    documents = stages.responses_of(rollouts)
    assert [a["response"] for a in answers] == [
        tokenizer.decode(response[real])
        for response, real in zip(np.asarray(rollouts.responses), mask, strict=True)
    ]
    ours, theirs = (
        stages.plain_logprobs(*network(chain, run, "tokens"), documents, 0.5)
        for run in ("ppo", "sft")
    )
    kl = [
        (own - reference)[-real.sum() :].sum()
        for own, reference, real in zip(ours, theirs, mask, strict=True)
    ]
    np.testing.assert_allclose([a["kl"] for a in answers], kl, atol=4e-4)


def test_the_reference_against_itself(chain):
    metrics = read_summary(chain / "evaluate")["policies"]["SFT"]
    assert metrics["kl"]["value"] == metrics["kl"]["high"] == 0
    assert metrics["proxy_win_rate"]["value"] == metrics["proxy_win_rate"]["low"] == 0.5
    assert read_summary(chain / "evaluate")["policies"]["GPT"]["kl"]["value"] > 0.1


@pytest.mark.parametrize("name", POLICIES)
def test_metrics_are_means_over_answers(chain, name):
    metrics = read_summary(chain / "evaluate")["policies"][name]
    answers = responses_of(chain, name)
    for figure, field in (
        ("scores", "score"),
        ("kl", "kl"),
        ("response_length", "tokens"),
        ("ended_share", "ended"),
    ):
        values = np.array([float(answer[field]) for answer in answers])
        assert metrics[figure]["value"] == pytest.approx(values.mean(), abs=1e-9)
        high = values.mean() + 1.959964 * values.std(ddof=1) / 4
        if field == "ended":
            high = share_estimate(values).high
        assert metrics[figure]["high"] == pytest.approx(high, abs=1e-9)
    reference = responses_of(chain, "SFT")
    wins = sum(
        1 if own["score"] > other["score"] else 0.5 * (own["score"] == other["score"])
        for own, other in zip(answers, reference, strict=True)
    )
    assert metrics["proxy_win_rate"]["value"] == wins / 16
    assert [answer["prompt"] for answer in answers] == [
        answer["prompt"] for answer in reference
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_text_loss_equals_the_plain_computation(chain, name):
    config, _, data = parts(chain)
    source = data["text"].sources["validation"]
    rows = lm_batch(source, np.arange(len(source)), config.data.limits.sequence_tokens)
    wanted = stages.plain_loss(*network(chain, POLICIES[name], "tokens"), rows)
    figure = read_summary(chain / "evaluate")["policies"][name]["text_loss"]
    assert figure["value"] == pytest.approx(wanted, rel=1e-5)
    assert figure["count"] == len(source)
    assert figure["low"] < figure["value"] < figure["high"]


def test_ranking_accuracy_equals_scoring_every_pair_alone(chain):
    config, _, data = parts(chain)
    model, params = network(chain, "reward", "scalar")
    source = data["comparisons.labelers"].sources["validation"]
    batch = loaders.read_comparisons(source, np.arange(len(source)), config.data.limits)
    correct = longer = unlike = count = 0
    for row in range(len(source)):
        prompt = batch.prompts.tokens[row][batch.prompts.mask[row]]
        answers = [
            batch.responses[row, k][batch.mask[row, k]]
            for k in np.flatnonzero(batch.valid[row])
        ]
        scores = stages.plain_scores(
            model, params, [np.concatenate([prompt, answer]) for answer in answers]
        )
        for better, worse in itertools.permutations(range(len(answers)), 2):
            if batch.ranks[row, better] < batch.ranks[row, worse]:
                correct += scores[better] > scores[worse]
                longer += len(answers[better]) > len(answers[worse])
                unlike += len(answers[better]) != len(answers[worse])
                count += 1
    metrics = read_summary(chain / "evaluate")["reward_model"]["labelers"]
    assert metrics["pairs"] == count > 50 and count > unlike > 20
    # The order of two nearly equal scores may differ by rounding.
    assert metrics["accuracy"]["value"] == pytest.approx(correct / count, abs=1.5 / count)
    assert metrics["longer_wins"]["value"] == pytest.approx(longer / unlike)


def test_an_answer_does_not_depend_on_its_batch(chain, tmp_path):
    overrides = {
        "batch_size": 5,  # the last batch has empty rows
        "prompts": 12,
        "policies": (("SFT", str(chain / "sft"), "plain"),),
        "data.text": (),
        "data.comparisons": (),
    }
    assert run_stage(stages.config_of(chain, "evaluate", overrides), tmp_path / "run")
    wanted = responses_of(chain, "SFT")
    got = read_samples(tmp_path / "run")
    assert len(got) == 12
    for ours, theirs in zip(got, wanted, strict=False):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4, abs=1e-5)
        assert {**ours, "step": 0, "score": 0} == {**theirs, "step": 0, "score": 0}
    summary = read_summary(tmp_path / "run")
    assert set(summary["policies"]["SFT"]) == {
        "scores",
        "kl",
        "response_length",
        "ended_share",
        "proxy_win_rate",
    }
    assert summary["reward_model"] == {}
    assert not run_stage(stages.config_of(chain, "evaluate", overrides), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"reference": "T0"},
            "config: reference = 'T0' must be one of the policies .'GPT', 'GPT "
            "prompted', 'SFT', ",
        ),
        (
            {"policies": (("SFT", "nowhere", "plain"),)},
            "config.policies.SFT = 'nowhere' is not a finished run",
        ),
        (
            {"policies": (("SFT", "nowhere", "twice"),)},
            "config: policies.SFT is asked 'twice': allowed are plain, few-shot, best-of",
        ),
        (
            {"policies": (("SFT", "a", "plain"), ("SFT", "b", "plain"))},
            "config: policies has 'SFT' twice",
        ),
        (
            {"data.demonstrations": ()},
            "config: data.demonstrations must be given: a policy is asked few-shot",
        ),
        (
            {"shots": 9999},
            "config.shots = 9999 is more than the [0-9]+ plain demonstrations: lower "
            "it, or give more",
        ),
        (
            {"data.comparisons": (("labelers", ("a",)), ("labelers", ("b",)))},
            "config: data.comparisons has 'labelers' twice",
        ),
        ({"batch_size": 0}, "config: batch_size = 0 must be at least 1"),
        ({"best_of": 0}, "config: best_of = 0 must be at least 1"),
        ({"prompts": 0}, "config: prompts = 0 must be at least 1"),
        (
            {"data.prompts": ()},
            "config: data.prompts, reward_parent and the workdir of every policy "
            "must be given",
        ),
        (
            {"reward_model.embed_dim": 64},
            "config.reward_parent = .* has another model: .*embed_dim: 32 .* != 64 .given.",
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message) as error:
        run_stage(stages.config_of(chain, "evaluate", overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
