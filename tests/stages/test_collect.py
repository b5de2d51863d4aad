"""Collecting comparisons of sampled responses: what is compared, by which labelers, and
reproducibility."""

import gzip
import json

import numpy as np
import pytest
from tests.support import stages

from instructax.config import ConfigError
from instructax.data.schema import Comparison, read_jsonl
from instructax.experiment import run_stage
from instructax.runtime.metric_log import read_summary
from instructax.simulation.files import recreate_prompts
from instructax.simulation.judge import judge
from instructax.stages.collect import draw_compared

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")


def records_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_distinct_responses_are_compared_and_single_ones_left_out():
    responses = [["a", "b", "a", " "], ["a", "a"], [""], [str(i) for i in range(20)]]
    compared = draw_compared(responses, np.random.default_rng(0))
    assert set(compared) == {0, 3}
    assert sorted(compared[0]) == ["a", "b"]
    counts = {
        len(draw_compared(responses, np.random.default_rng(seed))[3]) for seed in range(40)
    }
    assert counts == set(range(4, 10))
    assert set(compared[3]) <= set(responses[3]) and len(set(compared[3])) == len(
        compared[3]
    )


def test_both_labeler_groups_rank_the_same_responses(chain):
    ours, theirs = (
        records_of(chain / "collect" / f"{name}.jsonl.gz")
        for name in ("comparisons", "held_out")
    )
    assert [(a["prompt"], a["completions"]) for a in ours] == [
        (b["prompt"], b["completions"]) for b in theirs
    ]
    assert {a["labeler"].rsplit("-", 1)[0] for a in ours} == {"labeler"}
    assert {b["labeler"].rsplit("-", 1)[0] for b in theirs} == {"held-out"}
    assert any(a["ranks"] != b["ranks"] for a, b in zip(ours, theirs, strict=True))
    assert len(
        list(read_jsonl([chain / "collect" / "comparisons.jsonl.gz"], Comparison))
    ) == len(ours)
    figures = read_summary(chain / "collect")
    assert figures["prompts"] == len(ours) and figures["answers"] == sum(
        len(a["completions"]) for a in ours
    )
    assert {parent["stage"] for parent in figures["parents"].values()} == {
        "pretrain",
        "sft",
        "ppo",
    }


def test_labelers_without_noise_rank_by_true_utility(chain, tmp_path):
    assert run_stage(stages.config_of(chain, "collect", {"noise": 0.0}), tmp_path / "quiet")
    quiet, ours = (
        records_of(folder / "comparisons.jsonl.gz")
        for folder in (tmp_path / "quiet", chain / "collect")
    )
    assert [a["completions"] for a in quiet] == [a["completions"] for a in ours]
    tasks = {
        simulated.task.prompt: simulated.task
        for simulated in recreate_prompts(chain / "world", "comparisons")
    }

    def agreement(records):
        right = []
        for record in records:
            task = tasks[record["prompt"]]
            truth = [
                judge(task, text).utility(task.harmful, 0.3)
                for text in record["completions"]
            ]
            right += [
                (truth[i] - truth[j]) * winner > 0
                for i, j, winner in record["pairs"]
                if truth[i] != truth[j]
            ]
        return np.mean(right)

    assert agreement(quiet) > agreement(ours) + 0.03


def test_same_seed_same_bytes(chain, tmp_path):
    assert run_stage(stages.config_of(chain, "collect", {}), tmp_path / "again")
    for name in ("comparisons", "held_out"):
        path = f"{name}.jsonl.gz"
        assert (tmp_path / "again" / path).read_bytes() == (
            chain / "collect" / path
        ).read_bytes()
    assert run_stage(stages.config_of(chain, "collect", {"seed": 1}), tmp_path / "other")
    assert (tmp_path / "other" / path).read_bytes() != (
        chain / "collect" / path
    ).read_bytes()


def test_another_round_on_the_same_prompts_samples_other_responses(chain, tmp_path):
    ours = records_of(chain / "collect" / "comparisons.jsonl.gz")
    assert run_stage(stages.config_of(chain, "collect", {"round": 2}), tmp_path / "next")
    theirs = records_of(tmp_path / "next" / "comparisons.jsonl.gz")
    our_responses = {(a["prompt"], text) for a in ours for text in a["completions"]}
    their_responses = {(a["prompt"], text) for a in theirs for text in a["completions"]}
    assert len(our_responses & their_responses) < 0.2 * len(our_responses)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"policies": ()}, r"config: policies = \(\) must be one at least"),
        (
            {"policies": (("x", 0),)},
            "must be one at least, each with one response at least",
        ),
        ({"world": "nowhere"}, "nowhere is not a finished world: write it first"),
        ({"noise": -1.0}, "config: noise = -1.0 must be at least 0"),
        (
            {"prompt_tokens": 90},
            "config.prompt_tokens [+] config.response_tokens = 102 is above the 96 "
            "tokens of a policy",
        ),
        (
            {"prompt_tokens": 1},
            "no prompt of .* has two different responses: raise config.prompt_tokens = 1 ",
        ),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    with pytest.raises((ConfigError, ValueError), match=message):
        run_stage(stages.config_of(chain, "collect", overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
