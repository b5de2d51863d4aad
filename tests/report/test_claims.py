"""The paper's claims: the rule of verdicts, claims of logs like the paper's, planted
faults."""

import dataclasses
import math

import numpy as np
import pytest
from tests.support import report_logs

from instructax.evals.intervals import Estimate
from instructax.report.claims import (
    CLAIMS,
    MORE,
    NO_LESS,
    Finding,
    findings_of,
    overall,
    verdict,
)
from instructax.report.effects import public_change
from instructax.report.figures import figure_3
from instructax.report.judging import (
    LABELER,
    asked_about,
    mean_of,
    minus,
    read,
    wins_estimate,
)
from instructax.report.metric_figures import public_of, tax_tasks
from instructax.report.results import load

pytest_plugins = ("tests.support.report_fixtures",)

INF = math.inf


@pytest.mark.parametrize(
    ("low", "high", "region", "expected"),
    [
        (0.01, 0.2, MORE, "seen"),
        (0.0, 0.2, MORE, "undecided"),
        (0.0, 0.0, MORE, "not seen"),
        (-0.1, 0.2, MORE, "undecided"),
        (-0.2, -0.01, MORE, "not seen"),
        (-INF, INF, MORE, "undecided"),
        (-0.04, 0.1, NO_LESS, "seen"),
        (-0.06, 0.1, NO_LESS, "undecided"),
        (-0.2, -0.06, NO_LESS, "not seen"),
        (-0.05, 0.05, (-0.1, 0.1), "seen"),
        (0.05, 0.15, (-0.1, 0.1), "undecided"),
        (0.11, 0.15, (-0.1, 0.1), "not seen"),
        (0.01, 0.04, (0.0, 0.05), "seen"),
    ],
)
def test_the_rule_of_verdicts(low, high, region, expected):
    middle = (low + high) / 2 if math.isfinite(low) else 0.1
    assert verdict(Estimate(middle, low, high, 10), region) == expected


def test_nothing_measured_is_no_data():
    assert (
        verdict(None, MORE) == verdict(Estimate(math.nan, -INF, INF, 0), MORE) == "no data"
    )


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
def test_a_claim_is_as_good_as_its_worst_figure(verdicts, expected):
    assert overall([Finding("seed", "what", None, name) for name in verdicts]) == expected


def test_claims_of_a_family_that_is_like_the_paper(reading):
    found = {claim.name: findings_of(claim, [reading]) for claim in CLAIMS}
    assert list(found) == [f"C{i}" for i in range(1, 16)]
    assert {name for name in found if overall(found[name]) == "seen"} >= {
        "C3",
        "C5",
        "C6",
        "C7",
        "C8",
        "C9",
        "C10",
        "C11",
    }
    assert not [name for name in found if overall(found[name]) == "no data"]
    loss, score = (finding.measured for finding in found["C6"])
    # 0.1 above the lowest, less the margin; the scores are paired: no spread.
    np.testing.assert_allclose([loss.value, score.value, score.low], [0.09, 0.2, 0.2])
    (change,) = {round(finding.measured.value, 6) for finding in found["C7"]}
    assert change == 0.15  # 0.60 − 0.45, BLEU's too


def test_public_tasks_are_paired_by_item(reading):
    size = reading.experiment.sizes[0]
    tasks = tax_tasks([size])
    ours, theirs = (
        [public_of(size, policy, task, "few-shot") for task in tasks]
        for policy in ("GPT", "PPO")
    )
    paired = public_change(size, "GPT", "PPO")
    apart = mean_of(
        [minus(a.estimate, b.estimate) for a, b in zip(ours, theirs, strict=True)]
    )
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.8 * (apart.high - apart.low)


def test_what_gpt_makes_up_and_policies_do_not_counts_for_them(reading):
    closed = asked_about(reading.experiment, "hallucinates")
    shares = {
        p: reading.answers["micro", p].flags["hallucinates"][closed].mean()
        for p in ("GPT", "PPO", "PPO-ptx")
    }
    found = {
        f.what: f.measured.value
        for claim in CLAIMS[12:]
        for f in findings_of(claim, [reading])
    }
    for policy in ("PPO", "PPO-ptx"):
        assert found[f"micro: hallucinates, GPT − {policy}"] == pytest.approx(
            shares["GPT"] - shares[policy]
        )
    kept = [
        reading.answers["centi", policy].flags["appropriate"].mean()
        for policy in ("PPO-ptx", "GPT")
    ]
    assert found["centi: appropriate, PPO-ptx − GPT"] == pytest.approx(kept[0] - kept[1])


def test_planted_faults_are_seen(tmp_path):
    report_logs.write_world(tmp_path)
    prompts, gpt_prompts = (
        report_logs.asked(tmp_path, name, 60) for name in ("prompts", "gpt_prompts")
    )
    worse = {
        "GPT": 1.0,
        "GPT prompted": 0.5,
        "SFT": 0.2,
        "PPO": 0.0,
        "PPO-ptx": 0.0,
        "FLAN/T0": 1.0,
    }
    report_logs.write_evaluation(tmp_path, prompts, worse, width=16)
    report_logs.write_evaluation(tmp_path, gpt_prompts, worse, 16, "evaluate-gpt")
    report_logs.write_overfit(
        tmp_path, losses=[0.9, 0.8], scores=[0.1, 0.2]
    )  # it does not overfit
    verdicts = {
        claim.name: overall(findings_of(claim, [read(load(tmp_path))])) for claim in CLAIMS
    }
    assert {name for name, found in verdicts.items() if found == "not seen"} >= {
        "C1",
        "C4",
        "C6",
        "C12",
        "C15",
    }
    # One size alone, and no public tasks.
    assert {name for name, found in verdicts.items() if found == "no data"} == {
        "C3",
        "C7",
        "C8",
        "C9",
        "C10",
        "C11",
    }


def test_prompts_of_the_gpt_distribution_are_judged_by_themselves(reading):
    gpt = reading.gpt
    assert gpt.experiment.name == "family, GPT-3 prompts" and gpt.names == reading.names
    assert len(gpt.experiment.prompts) == 24 and not set(gpt.experiment.prompts) & set(
        reading.experiment.prompts
    )
    assert {policy for _, policy in gpt.answers} == {"GPT", "SFT", "PPO", "PPO-ptx"}
    assert wins_estimate(gpt, "centi", "SFT", LABELER) == Estimate(0.5, 0.5, 0.5, 24)
    wins = [gpt.wins("micro", policy, LABELER).mean() for policy in ("GPT", "SFT", "PPO")]
    found = findings_of(CLAIMS[14], [reading])
    assert [finding.what for finding in found] == [
        f"{size}: {step}" for size in reading.names for step in ("SFT − GPT", "PPO − SFT")
    ]
    np.testing.assert_allclose(
        [finding.measured.value for finding in found[:2]], np.diff(wins)
    )
    assert {finding.seed for finding in found} == {"family"}


def test_figure_3_has_a_row_for_each_distribution_of_prompts(reading):
    titles = [
        f"{who} labelers, {where}"
        for who in ("training", "held-out")
        for where in ("here", "the paper")
    ]
    for given, rows in ((reading, 2), (dataclasses.replace(reading, gpt=None), 1)):
        axes = figure_3([given]).axes
        assert [axis.get_title() for axis in axes] == titles * rows
        assert [axis.get_ylabel().split()[0] for axis in axes[::4]] == [
            "InstructGPT",
            "GPT-3",
        ][:rows]
        shown = [{line.get_color() for line in axis.lines} for axis in axes[::4]]
        assert len(shown[0]) == 7 and all(len(colours) == 4 for colours in shown[1:])
    (theirs,) = [
        line for line in figure_3([reading]).axes[7].lines if line.get_linestyle() == "-"
    ][3:4]
    np.testing.assert_allclose(
        theirs.get_ydata(), [0.565, 0.554, 0.624]
    )  # PPO-ptx, held-out, GPT-3 prompts


def test_a_size_without_gpt_prompts_is_no_data_and_so_is_all_without_the_largest(tmp_path):
    root = report_logs.write_family(tmp_path / "family", count=3)
    (root / "micro" / "evaluate-gpt" / "summary.json").unlink()
    found = findings_of(CLAIMS[14], [read(load(root))])
    assert [finding.what for finding in found[:3]] == [
        "micro: GPT",
        "micro: SFT",
        "micro: PPO",
    ]
    assert [finding.verdict == "no data" for finding in found] == [True] * 3 + [False] * 4
    (root / "centi" / "evaluate-gpt" / "summary.json").unlink()
    assert load(root).gpt is None
