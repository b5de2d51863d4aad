"""The paper's claims: verdicts, claims on logs like the paper's, planted faults."""

import math

import numpy as np
import pytest
from tests.support import report_logs

from instructax.evals.intervals import Estimate
from instructax.report.claim_measurements import public_task_difference
from instructax.report.claims import (
    CLAIMS,
    NOT_WORSE,
    POSITIVE,
    Finding,
    check_claim,
    decide,
    overall_verdict,
)
from instructax.report.estimates import mean_of_estimates, subtract_estimates
from instructax.report.judging import (
    TRAINING_GROUP,
    applicable_prompts,
    judge_experiment,
    win_rate_estimate,
)
from instructax.report.results import few_shot_tasks, load_experiment

pytest_plugins = ("tests.support.report_fixtures",)

INF = math.inf
C15 = CLAIMS[14]  # the order on prompts of the GPT-3 distribution


def claims_with_verdict(findings, verdict):
    return {name for name in findings if overall_verdict(findings[name]) == verdict}


@pytest.mark.parametrize(
    ("low", "high", "region", "expected"),
    [
        (0.01, 0.2, POSITIVE, "seen"),
        (0.0, 0.2, POSITIVE, "undecided"),
        (0.0, 0.0, POSITIVE, "not seen"),
        (-0.1, 0.2, POSITIVE, "undecided"),
        (-0.2, -0.01, POSITIVE, "not seen"),
        (-INF, INF, POSITIVE, "undecided"),
        (-0.04, 0.1, NOT_WORSE, "seen"),
        (-0.06, 0.1, NOT_WORSE, "undecided"),
        (-0.2, -0.06, NOT_WORSE, "not seen"),
        (-0.05, 0.05, (-0.1, 0.1), "seen"),
        (0.05, 0.15, (-0.1, 0.1), "undecided"),
        (0.11, 0.15, (-0.1, 0.1), "not seen"),
        (0.01, 0.04, (0.0, 0.05), "seen"),
    ],
)
def test_verdict_of_an_interval(low, high, region, expected):
    middle = (low + high) / 2 if math.isfinite(low) else 0.1
    assert decide(Estimate(middle, low, high, 10), region) == expected


def test_missing_and_empty_estimates_are_no_data():
    assert decide(None, POSITIVE) == "no data"
    assert decide(Estimate(math.nan, -INF, INF, 0), POSITIVE) == "no data"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["seen", "seen"], "seen"),
        (["seen", "undecided"], "undecided"),
        (["seen", "no data", "undecided"], "no data"),
        (["seen", "not seen", "no data"], "not seen"),
        ([], "no data"),
    ],
)
def test_verdict_on_a_claim_is_that_of_its_worst_finding(verdicts, expected):
    findings = [Finding("run", "quantity", None, verdict) for verdict in verdicts]
    assert overall_verdict(findings) == expected


def test_claims_on_logs_like_the_papers(judged):
    findings = {claim.name: check_claim(claim, [judged]) for claim in CLAIMS}
    assert list(findings) == [f"C{i}" for i in range(1, 16)]
    seen = claims_with_verdict(findings, "seen")
    assert seen >= {"C3", "C5", "C6", "C7", "C8", "C9", "C10", "C11"}
    assert not claims_with_verdict(findings, "no data")

    # The loss ends 0.1 above its minimum, less the margin; the scores are paired, so they
    # have no spread.
    loss, score = (finding.estimate for finding in findings["C6"])
    np.testing.assert_allclose([loss.value, score.value, score.low], [0.09, 0.2, 0.2])

    # 0.60 − 0.45 at each size, for BLEU too.
    for finding in findings["C7"]:
        assert finding.estimate.value == pytest.approx(0.15)


def test_public_tasks_are_paired_by_item(judged):
    size = judged.results.sizes[0]
    unpaired = []
    for task in few_shot_tasks([size]):
        gpt = size.public_metric("GPT", task, "few-shot")
        ppo = size.public_metric("PPO", task, "few-shot")
        unpaired.append(subtract_estimates(gpt.estimate, ppo.estimate))
    unpaired_mean = mean_of_estimates(unpaired)
    paired_mean = public_task_difference(size, "GPT", "PPO")
    assert paired_mean.value == pytest.approx(unpaired_mean.value)
    paired_width = paired_mean.high - paired_mean.low
    assert paired_width < 0.8 * (unpaired_mean.high - unpaired_mean.low)


def test_fewer_hallucinations_than_gpt_count_for_a_policy(judged):
    estimates = {}
    for claim in CLAIMS[12:]:
        for finding in check_claim(claim, [judged]):
            estimates[finding.quantity] = finding.estimate.value

    closed = applicable_prompts(judged.results, "hallucinates")

    def hallucinations(policy):
        return judged.responses["micro", policy].flags["hallucinates"][closed].mean()

    for policy in ("PPO", "PPO-ptx"):
        assert estimates[f"micro: hallucinates, GPT − {policy}"] == pytest.approx(
            hallucinations("GPT") - hallucinations(policy)
        )

    ours = judged.responses["centi", "PPO-ptx"].flags["appropriate"].mean()
    theirs = judged.responses["centi", "GPT"].flags["appropriate"].mean()
    gap = estimates["centi: appropriate, PPO-ptx − GPT"]
    assert gap == pytest.approx(ours - theirs)


def test_planted_faults_are_not_seen(tmp_path):
    report_logs.write_world(tmp_path)
    prompts = report_logs.last_tasks(tmp_path, "prompts", 60)
    gpt_prompts = report_logs.last_tasks(tmp_path, "gpt_prompts", 60)
    # The reverse of the claimed order.
    qualities = {
        "GPT": 1.0,
        "GPT prompted": 0.5,
        "SFT": 0.2,
        "PPO": 0.0,
        "PPO-ptx": 0.0,
        "FLAN/T0": 1.0,
    }
    report_logs.write_evaluation(tmp_path, prompts, qualities, 16)
    report_logs.write_evaluation(tmp_path, gpt_prompts, qualities, 16, "evaluate-gpt")
    # SFT that does not overfit.
    report_logs.write_overfitting(tmp_path, losses=[0.9, 0.8], scores=[0.1, 0.2])

    judged = judge_experiment(load_experiment(tmp_path))
    findings = {claim.name: check_claim(claim, [judged]) for claim in CLAIMS}
    not_seen = claims_with_verdict(findings, "not seen")
    assert not_seen >= {"C1", "C4", "C6", "C12", "C15"}
    # There is only one size, and there are no public tasks.
    no_data = claims_with_verdict(findings, "no data")
    assert no_data == {"C3", "C7", "C8", "C9", "C10", "C11"}


def test_prompts_of_the_gpt_distribution_are_judged_separately(judged):
    gpt = judged.on_gpt_prompts
    assert gpt.results.name == "family, GPT-3 prompts"
    assert gpt.size_names == judged.size_names
    assert len(gpt.results.prompts) == 24
    assert not set(gpt.results.prompts) & set(judged.results.prompts)
    assert {policy for _, policy in gpt.responses} == {"GPT", "SFT", "PPO", "PPO-ptx"}
    baseline = win_rate_estimate(gpt, "centi", "SFT", TRAINING_GROUP)
    assert baseline == Estimate(0.5, 0.5, 0.5, 24)


def test_order_on_prompts_of_the_gpt_distribution(judged):
    findings = check_claim(C15, [judged])
    quantities = []
    for size in judged.size_names:
        quantities += [f"{size}: SFT − GPT", f"{size}: PPO − SFT"]
    assert [finding.quantity for finding in findings] == quantities
    assert {finding.run for finding in findings} == {"family"}

    wins = []
    for policy in ("GPT", "SFT", "PPO"):
        scores = judged.on_gpt_prompts.win_scores("micro", policy, TRAINING_GROUP)
        wins.append(scores.mean())
    steps = [finding.estimate.value for finding in findings[:2]]
    np.testing.assert_allclose(steps, np.diff(wins))


def test_sizes_that_were_not_evaluated_on_gpt_prompts_have_no_data(tmp_path):
    root = report_logs.write_family(tmp_path / "family", count=3)
    (root / "micro" / "evaluate-gpt" / "summary.json").unlink()
    findings = check_claim(C15, [judge_experiment(load_experiment(root))])
    quantities = [finding.quantity for finding in findings[:3]]
    assert quantities == ["micro: GPT", "micro: SFT", "micro: PPO"]
    has_no_data = [finding.verdict == "no data" for finding in findings]
    assert has_no_data == [True] * 3 + [False] * 4

    # Without the largest size there is no baseline for the others.
    (root / "centi" / "evaluate-gpt" / "summary.json").unlink()
    assert load_experiment(root).on_gpt_prompts is None
