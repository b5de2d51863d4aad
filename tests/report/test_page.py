"""The report of an experiment: what its logs hold, a page that stands alone, mistakes in
one line."""

import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support import report_logs

from instructax import cli, report
from instructax.report.browser import browser, embedded, samples_of
from instructax.report.claims import CLAIMS, findings_of, overall
from instructax.report.judging import TRUTH, asked_about, best_of_kl, curve_of, read
from instructax.report.page import check_seeds
from instructax.report.results import (
    estimate_of,
    in_words,
    load,
    overfitting_of,
    parameters_of,
    public_figures,
)
from instructax.report.tables import agreement_table, html_table, noise_table, table_of

pytest_plugins = ("tests.support.report_fixtures",)

INF = math.inf
ROOT = Path(__file__).resolve().parents[2]


def test_what_the_logs_hold(family, reading):
    assert reading.names == ["micro", "milli", "centi"]
    assert list(reading.experiment.sizes[0].samples) == list(report_logs.QUALITY)
    assert parameters_of(report_logs.MODEL) == 16 * 128 + 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert [in_words(n) for n in (160_000, 124_439_808, 1_300_000_000)] == [
        "0.16M",
        "124M",
        "1.3B",
    ]
    losses, scores = overfitting_of(reading.experiment.sizes[1])
    assert list(losses) == list(scores) == [100, 200, 300, 400]
    assert overfitting_of(reading.experiment.sizes[0]) == ({}, {})
    curve = curve_of(reading.experiment, reading.experiment.sizes[0], "ppo")
    np.testing.assert_allclose(curve.distance[:3], np.sqrt([0.0, 0.3, 0.6]))
    assert curve_of(reading.experiment, reading.experiment.sizes[0], "flan") is None
    assert best_of_kl(16) == pytest.approx(1.83509, abs=1e-5)


def test_null_is_a_bound_that_is_not_there():
    found = estimate_of({"value": None, "low": None, "high": None, "count": 0})
    assert math.isnan(found.value) and (found.low, found.high) == (-INF, INF)


def test_bleu_counts_to_one_hundred_and_is_drawn_as_a_share():
    record = report_logs.estimate(40.0, 2.0)
    figures = public_figures(
        {
            "policies": {
                "GPT": {"translation": {"few-shot": record}, "book": {"few-shot": record}}
            }
        }
    )
    assert figures["GPT"]["translation"]["few-shot"].estimate.value == pytest.approx(0.4)
    assert figures["GPT"]["book"]["few-shot"].estimate.value == 40.0


def test_a_size_of_few_policies_is_read(tmp_path, capsys):
    root = report_logs.write_one_size(tmp_path / "few")
    path = report.write([root], tmp_path / "out")
    assert (
        "GPT" in capsys.readouterr().out
        and (tmp_path / "out" / "figure-1.png").stat().st_size > 10_000
    )
    reading = read(load(root))
    assert [row[:2] for row in table_of(reading)][:2] == [
        ("0.0082M", "GPT"),
        ("0.0082M", "SFT"),
    ]
    c1 = findings_of(CLAIMS[0], [reading])
    assert [finding.what for finding in c1] == [
        "0.0082M: SFT − GPT",
        "0.0082M: PPO − SFT",
        "0.0082M: GPT prompted",
    ]
    text = path.read_text()
    assert text.count("<td>no data</td><td>–</td>") == 2  # of reward models
    assert "Prompts of the GPT-3 distribution: no data." in text
    assert overall(findings_of(CLAIMS[14], [reading])) == "no data"


def test_the_tables_of_the_reward_model(reading):
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", agreement_table([reading]))
    assert [row.split("</td><td>")[-1] for row in rows] == [
        "0.726 ± 0.015",
        "0.773 ± 0.013",
        "–",
    ]
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", noise_table([reading]))
    assert [row.split("</td><td>")[2:] for row in rows] == [
        ["as they are", "0.720", "480"],
        ["who never waver", "0.810", "480"],
    ]
    alone = [dataclasses.replace(size, samples={}) for size in reading.experiment.sizes]
    nothing = dataclasses.replace(
        reading, experiment=dataclasses.replace(reading.experiment, prompts=[], sizes=alone)
    )
    assert agreement_table([nothing]).count("<td>0</td><td>no data</td>") == 3


class Outside(html.parser.HTMLParser):
    """Collects what a page would fetch, and the scripts it holds."""

    def __init__(self):
        super().__init__()
        self.fetched, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        self.fetched += [tag] if tag in ("link", "iframe", "object") else []


def test_the_page_stands_alone(page):
    text, outside = page.read_text(), Outside()
    outside.feed(text)
    assert outside.fetched == []
    assert outside.scripts == 2 and "@import" not in text and "url(" not in text
    figures = sorted(path.stem for path in page.parent.glob("*.png"))
    assert figures == sorted(path.stem for path in page.parent.glob("*.svg"))
    assert len(figures) == text.count("<figure id=") == 10
    assert "prefers-color-scheme: dark" in text


def test_what_a_response_says_cannot_leave_its_place(reading):
    evil = "</script><script>alert(1)</script><!--"
    size = reading.experiment.sizes[0]
    records = [
        dict(record, response=evil, pieces=[evil], token_kl=[0.0])
        for record in size.samples["PPO"]
    ]
    changed = dataclasses.replace(size, samples={**size.samples, "PPO": records})
    experiment = dataclasses.replace(
        reading.experiment, sizes=[changed, *reading.experiment.sizes[1:]]
    )
    shown = browser([dataclasses.replace(reading, experiment=experiment)])
    assert shown.count("</script>") == 2 and "<!--" not in shown
    data = re.search(r'id="samples">(.*?)</script>', shown, re.DOTALL).group(1)
    assert evil in {answer[4][0] for answer in json.loads(data)[0]["prompts"][0]["answers"]}
    assert html_table(("<a>",), [("<b>&",)]).count("&lt;") == 2
    assert json.loads(embedded({"a": "<"})) == {"a": "<"}


def test_samples_have_all_policies_and_few_enough_prompts(reading):
    data = samples_of(reading, 3)
    assert (
        len(data["prompts"]) == 3
        and len(data["columns"]) == len(data["prompts"][0]["answers"]) == 21
    )
    column, _, utility, faults, pieces, kl = data["prompts"][0]["answers"][0]
    answers = reading.answers[tuple(data["columns"][column])]
    assert utility == round(answers.opinions[TRUTH][0], 2) and len(pieces) == len(kl)
    assert ("fails the task" in faults) == (not answers.flags["attempts"][0])


def test_a_sample_is_accused_of_what_its_prompt_asks_for_alone(reading):
    experiment, data = (
        reading.experiment,
        samples_of(reading, len(reading.experiment.prompts)),
    )
    accused = {"constraint": "breaks the constraint", "hallucinates": "hallucinates"}
    for flag, words in accused.items():
        speaks = [
            any(words in answer[3] for answer in prompt["answers"])
            for prompt in data["prompts"]
        ]
        asked = asked_about(experiment, flag)
        assert 0 < sum(speaks) <= asked.sum() < len(asked)
        assert not any(np.array(speaks) & ~asked)


def test_several_seeds_of_the_same_logs_give_the_same_page(tmp_path, family):
    one, other = (
        report_logs.write_one_size(tmp_path / name, seed)
        for seed, name in enumerate(("one", "other"))
    )
    for name in ("a", "b"):
        report.write([one, other], tmp_path / name)
    assert (tmp_path / "a" / "index.html").read_bytes() == (
        tmp_path / "b" / "index.html"
    ).read_bytes()
    assert (tmp_path / "a" / "figure-4-1.png").exists() and "other" in (
        tmp_path / "a" / "index.html"
    ).read_text()
    with pytest.raises(
        ValueError, match=r"one has the sizes .* give seeds of one experiment"
    ):
        check_seeds([load(family), load(one)])
    with pytest.raises(ValueError, match=r"the seeds are \[0, 0\]: give each once"):
        check_seeds([load(one), load(one)])


def break_prompt(root):
    path = root / "micro" / "evaluate" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def break_world(root):
    report_logs.write_world(root, seed=7)


def break_lines(root):
    report_logs.write_json(
        root / "world" / "config.json", {"seed": 0, "lines": {"prompts": 3}}
    )


def break_reference(root, run="evaluate"):
    path = root / "centi" / run / "samples.jsonl"
    path.write_text(path.read_text().replace('"policy": "SFT"', '"policy": "sft"'))


def cut_line(root):
    path = root / "milli" / "evaluate" / "samples.jsonl"
    path.write_text(path.read_text()[:-9])


def break_gpt_reference(root):
    break_reference(root, "evaluate-gpt")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_prompt, "micro/evaluate: GPT answered other prompts"),
        (break_world, "centi/evaluate is of another world"),
        (break_lines, "of another version of this project"),
        (break_reference, "has no policy SFT"),
        (
            cut_line,
            "milli/evaluate/samples.jsonl, line 21, is no JSON: run the stage again",
        ),
        (break_gpt_reference, "centi/evaluate-gpt has no policy SFT"),
        (lambda root: (root / "world" / "config.json").unlink(), "holds no world"),
        (
            lambda root: [path.unlink() for path in root.glob("*/evaluate/summary.json")],
            "holds no finished run",
        ),
    ],
)
def test_logs_that_cannot_be_reported_are_one_line_and_code_2(
    tmp_path, capsys, fault, message
):
    root = report_logs.write_family(tmp_path / "family", count=3)
    fault(root)
    assert cli.guarded(lambda: report.write([root], tmp_path / "out")) == cli.USER
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ppo_on_other_prompts_is_one_line(tmp_path, capsys):
    root = report_logs.write_family(tmp_path / "family", count=3)
    path = root / "micro" / "ppo" / "samples.jsonl"
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "Elsewhere: ', 1))
    assert cli.guarded(lambda: report.write([root], tmp_path / "out")) == cli.USER
    error = capsys.readouterr().err
    assert "micro/ppo is of another world" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "index.html").exists()


def test_the_command_wants_folders_and_out():
    done = subprocess.run(
        [sys.executable, "scripts/report.py", "runs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--out" in done.stderr
