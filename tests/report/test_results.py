"""Reading logs: their contents, and one-line errors for unusable logs."""

import math

import numpy as np
import pytest
from tests.support import report_logs

from instructax import cli, report
from instructax.report.logs import logged_estimate
from instructax.report.results import (
    count_parameters,
    format_parameter_count,
    load_experiment,
    public_results,
)
from instructax.report.training_curves import best_of_n_kl, load_overfitting, load_ppo_curve

pytest_plugins = ("tests.support.report_fixtures",)


def test_sizes_are_ordered_and_policies_are_complete(judged):
    assert judged.size_names == ["micro", "milli", "centi"]
    assert list(judged.results.sizes[0].samples) == list(report_logs.QUALITY)


def test_parameters_are_counted_from_the_config():
    per_layer = 4 * 16 * 16 + 2 * 16 * 64
    assert count_parameters(report_logs.MODEL) == 16 * 128 + 2 * per_layer


def test_logs_of_an_earlier_version_are_read_in_the_names_of_this_one(tmp_path):
    root = report_logs.write_one_size(tmp_path / "one-size")
    path = root / "evaluate" / "config.json"
    for new, old in (("num_layers", "layers"), ("tied_embeddings", "tied_head")):
        path.write_text(path.read_text().replace(f'"{new}"', f'"{old}"'))
    summary = {"stage": "reward", "held_out_accuracy": 0.72, "held_out_pairs": 480.0}
    report_logs.write_json(root / "reward" / "summary.json", summary)

    results = load_experiment(root)
    assert results.sizes[0].num_parameters == count_parameters(report_logs.MODEL)
    assert results.reward_runs["reward"]["validation_accuracy"] == 0.72
    assert results.reward_runs["reward"]["validation_pairs"] == 480.0


@pytest.mark.parametrize(
    ("count", "expected"),
    [(160_000, "0.16M"), (124_439_808, "124M"), (1_300_000_000, "1.3B")],
)
def test_parameter_counts_are_shortened(count, expected):
    assert format_parameter_count(count) == expected


def test_overfitting_runs_are_read_where_they_exist(judged):
    losses, scores = load_overfitting(judged.results.sizes[1])
    assert list(losses) == list(scores) == [100, 200, 300, 400]
    assert load_overfitting(judged.results.sizes[0]) == ({}, {})


def test_ppo_curves_are_read_where_they_exist(judged):
    size = judged.results.sizes[0]
    curve = load_ppo_curve(judged.results, size, "ppo")
    np.testing.assert_allclose(curve.sqrt_kl[:3], np.sqrt([0.0, 0.3, 0.6]))
    assert load_ppo_curve(judged.results, size, "flan") is None


def test_kl_of_best_of_n():
    assert best_of_n_kl(16) == pytest.approx(1.83509, abs=1e-5)


def test_null_is_an_infinite_bound():
    record = {"value": None, "low": None, "high": None, "count": 0}
    estimate = logged_estimate(record)
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_bleu_is_logged_in_percent_and_read_as_a_share():
    conditions = {"few-shot": report_logs.estimate(40.0, 2.0)}
    tasks = {"translation": conditions, "book": conditions}
    results = public_results({"policies": {"GPT": tasks}})["GPT"]
    assert results["translation"]["few-shot"].estimate.value == pytest.approx(0.4)
    assert results["book"]["few-shot"].estimate.value == 40.0


def remove_a_sample(root):
    path = root / "micro" / "evaluate" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def change_world(root):
    report_logs.write_world(root, seed=7)


def drop_world_settings(root):
    config = {"seed": 0, "lines": {"prompts": 3}}
    report_logs.write_json(root / "world" / "config.json", config)


def remove_world(root):
    (root / "world" / "config.json").unlink()


def rename_baseline(root, run="evaluate"):
    path = root / "centi" / run / "samples.jsonl"
    path.write_text(path.read_text().replace('"policy": "SFT"', '"policy": "sft"'))


def rename_baseline_on_gpt_prompts(root):
    rename_baseline(root, "evaluate-gpt")


def truncate_samples(root):
    path = root / "milli" / "evaluate" / "samples.jsonl"
    path.write_text(path.read_text()[:-9])


def remove_summaries(root):
    for path in root.glob("*/evaluate/summary.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (remove_a_sample, "micro/evaluate: GPT was evaluated on other prompts"),
        (change_world, "centi/evaluate belongs to a different world"),
        (drop_world_settings, "written by another version of this project"),
        (remove_world, "contains no world"),
        (rename_baseline, "centi/evaluate has no policy SFT"),
        (rename_baseline_on_gpt_prompts, "centi/evaluate-gpt has no policy SFT"),
        (
            truncate_samples,
            "milli/evaluate/samples.jsonl, line 21, is not valid JSON: run the stage again",
        ),
        (remove_summaries, "contains no finished evaluation"),
    ],
)
def test_unusable_logs_are_a_one_line_error_with_code_2(tmp_path, capsys, fault, message):
    root = report_logs.write_family(tmp_path / "family", count=3)
    fault(root)
    out = tmp_path / "out"
    assert cli.guarded(lambda: report.write_report([root], out)) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_ppo_on_prompts_of_another_world_is_a_one_line_error(tmp_path, capsys):
    root = report_logs.write_family(tmp_path / "family", count=3)
    path = root / "micro" / "ppo" / "samples.jsonl"
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "Elsewhere: ', 1))
    out = tmp_path / "out"
    assert cli.guarded(lambda: report.write_report([root], out)) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert "micro/ppo belongs to a different world" in error
    assert error.count("\n") == 1
    assert not (out / "index.html").exists()
