"""The public-tasks stage: metrics against a direct computation from the policies and their
answers."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.support import stages
from tests.support.run_logs import read_samples
from tests.support.saved import load_newest_params

from instructax import experiment
from instructax.checkpoints.parents import tokenizer_of
from instructax.evals.text_metrics import bleu, first_line, token_f1
from instructax.experiment import RunSpec, run_stage
from instructax.models.init import abstract_params
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import read_summary
from instructax.simulation.public_items import TaskItem
from instructax.simulation.public_tasks import PUBLIC_TASKS, create_contexts, create_items
from instructax.simulation.task_metrics import is_rude, judge_truthfulness
from instructax.simulation.world import create_world

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

POLICIES = {"GPT": "pretrain", "PPO": "ppo"}
WORLD = create_world(0)


def config_of(chain, **overrides: Any) -> dict[str, Any]:
    """The tiny config with two policies of the chain."""
    own = {
        "policies": tuple((name, str(chain / run)) for name, run in POLICIES.items()),
        "world": str(chain / "world"),
        "tokenizer": str(chain / "world" / "tokenizer.json"),
    }
    return experiment.load_config(
        RunSpec("tasks", "configs/public_tasks.py:tiny", {**own, **overrides})
    )


@pytest.fixture(scope="module")
def finished_run(chain, tmp_path_factory):
    """The workdir of the finished run."""
    workdir = tmp_path_factory.mktemp("tasks") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stages.use_devices(monkeypatch, 1)
        run_stage(config_of(chain), workdir)
    return workdir


@cache
def network(chain, run: str):
    """(model, parameters, tokenizer) of a finished run."""
    config = stages.config_with_kernel(config_of(chain))
    model = Transformer(config.model, config.compute, "tokens")
    shapes = abstract_params(model, stages.mesh_of())
    return (
        model,
        load_newest_params(chain / run, shapes),
        tokenizer_of(config.tokenizer, config.model),
    )


def metrics_of(finished_run, policy: str) -> dict[str, Any]:
    return read_summary(finished_run)["policies"][policy]


def test_every_policy_has_metrics_for_every_task_and_condition(finished_run):
    for policy in POLICIES:
        metrics = metrics_of(finished_run, policy)
        assert list(metrics) == list(PUBLIC_TASKS)
        for name, task in PUBLIC_TASKS.items():
            suffixes = (
                (", true", ", true and informative") if task.metric == "truthful" else ("",)
            )
            assert list(metrics[name]) == [
                f"{form}{suffix}" for form in task.conditions for suffix in suffixes
            ]
            for figure in metrics[name].values():
                values = figure.pop("values", None)
                assert (
                    set(figure) == {"value", "low", "high", "count"}
                    and figure["count"] == 8
                )
                assert (values is None) == (task.metric == "bleu")
                assert values is None or figure["value"] == pytest.approx(
                    np.mean(values), abs=1e-6
                )
                assert figure["low"] <= figure["value"] <= figure["high"]
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert set(manifest["parents"]) == {f"policies.{name}" for name in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
def test_text_metrics_equal_those_of_the_samples(finished_run, policy):
    samples = [
        sample for sample in read_samples(finished_run) if sample["policy"] == policy
    ]
    for name, task in PUBLIC_TASKS.items():
        if task.metric in ("accuracy", "entropy"):
            assert not [sample for sample in samples if sample["task"] == name]
            continue
        for form in task.conditions:
            some = [
                sample
                for sample in samples
                if (sample["task"], sample["form"]) == (name, form)
            ]
            items = create_items(WORLD, 0, name, 8)
            assert [sample["context"] for sample in some] == create_contexts(
                WORLD, 0, name, items, form
            )
            assert [sample["answers"] for sample in some] == [
                list(item.answers) for item in items
            ]
            answers = [first_line(sample["completion"]) for sample in some]
            wanted = expected(task.metric, items, answers)
            got = {
                f: x["value"]
                for f, x in metrics_of(finished_run, policy)[name].items()
                if f.split(",")[0] == form
            }
            assert list(got.values()) == pytest.approx(wanted)


def expected(metric: str, items: list[TaskItem], answers: list[str]) -> list[float]:
    pairs = list(zip(items, answers, strict=True))
    if metric == "bleu":
        return [bleu(answers, [item.answers for item in items])]
    if metric == "f1":
        return [float(np.mean([token_f1(answer, item.answers) for item, answer in pairs]))]
    if metric == "toxicity":
        return [float(np.mean([is_rude(answer) for answer in answers]))]
    return np.mean(
        [judge_truthfulness(item, answer) for item, answer in pairs], axis=0
    ).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_completions_are_the_likeliest_tokens(chain, finished_run, policy):
    model, params, tokenizer = network(chain, POLICIES[policy])
    chosen = {"task": "toxicity", "form": "none", "policy": policy}
    samples = [
        sample for sample in read_samples(finished_run) if chosen.items() <= sample.items()
    ]
    texts = contexts = tokenizer.encode_batch(sample["context"] for sample in samples)
    for _ in range(12):
        logits = stages.plain_outputs(model, params, texts)
        texts = [
            np.append(text, logits[i, len(text) - 1].argmax())
            for i, text in enumerate(texts)
        ]
    for context, text, sample in zip(contexts, texts, samples, strict=True):
        answer = text[len(context) :].tolist()
        # The end token is left out; a line break is the last token kept.
        ends = [i for i, token in enumerate(answer) if token == tokenizer.eos_id]
        ends += [
            i + 1 for i, token in enumerate(answer) if "\n" in tokenizer.decode([token])
        ]
        whole = min(ends, default=None)
        completion = tokenizer.decode(answer[:whole])
        assert (
            sample["completion"] == completion
            if whole is not None
            else sample["completion"].startswith(completion)
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_choices_equal_a_plain_computation(chain, finished_run, policy):
    model, params, tokenizer = network(chain, POLICIES[policy])
    right = bits = 0.0
    for name in ("pronoun", "stereotype"):
        for item in create_items(WORLD, 0, name, 8):
            context, *candidates = tokenizer.encode_batch([item.context, *item.choices])
            documents = [np.concatenate([context, candidate]) for candidate in candidates]
            logprobs = [
                row[len(context) :]
                for row in stages.plain_logprobs(model, params, documents)
            ]
            right += (
                name == "pronoun"
                and item.answers[0] == item.choices[np.argmax([x.mean() for x in logprobs])]
            )
            odds = np.exp([x.sum() for x in logprobs]) / np.sum(
                np.exp([x.sum() for x in logprobs])
            )
            bits -= (name == "stereotype") * float(np.sum(odds * np.log2(odds)))
    metrics = metrics_of(finished_run, policy)
    assert metrics["pronoun"]["zero-shot"]["value"] == pytest.approx(right / 8)
    assert metrics["stereotype"]["none"]["value"] == pytest.approx(bits / 8, rel=1e-4)


def test_a_finished_run_is_left_alone_and_a_smaller_batch_changes_nothing(
    chain, finished_run, tmp_path
):
    assert not run_stage(config_of(chain), finished_run)
    policies = (("PPO", str(chain / "ppo")),)
    assert run_stage(config_of(chain, policies=policies, batch_size=3), tmp_path / "run")
    ours = metrics_of(tmp_path / "run", "PPO")
    theirs = metrics_of(finished_run, "PPO")
    assert ours["toxicity"] == theirs["toxicity"] and ours["book"] == theirs["book"]
    stages.assert_trees_close(
        ours["stereotype"], theirs["stereotype"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"items": 0}, "config: items = 0 must be at least 1"),
        (
            {"policies": ()},
            "config: world, policies and the workdir of every policy must be given",
        ),
        (
            {"policies": (("SFT", ""),)},
            "config: world, policies and the workdir of every policy must be given",
        ),
        (
            {"policies": (("SFT", "nowhere"),)},
            "config.policies.SFT = 'nowhere' is not a finished run",
        ),
        ({"world": "nowhere"}, "nowhere is not a finished world"),
        (
            {"context_tokens": 20},
            "a context has .* tokens; between 1 and 20 are possible: change it, or "
            "context_tokens",
        ),
        (
            {"answer_tokens": 1},
            "a candidate has .* tokens; between 1 and 1 are possible: change it, or "
            "answer_tokens",
        ),
        (
            {"model.positions": "learned"},
            "config.context_tokens [+] config.answer_tokens = 240 is above "
            "config.model.max_length = .* position table",
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message) as error:
        run_stage(config_of(chain, **overrides), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_policy_is_not_a_world(chain, tmp_path):
    with pytest.raises(ValueError, match="sft is not a finished world"):
        run_stage(config_of(chain, world=str(chain / "sft")), tmp_path / "run")


def test_dry_run(chain):
    assert experiment.dry_run(config_of(chain)) == "nothing is trained"
    with pytest.raises(
        ValueError, match=r"config\.batch_size = 3 rows must be a positive multiple of 2"
    ):
        experiment.dry_run(config_of(chain, **{"batch_size": 3, "mesh.fsdp": 2}))
