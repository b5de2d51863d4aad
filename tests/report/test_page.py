"""The report page: it is self-contained, escapes all text, and is reproducible."""

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import report_logs

from instructax import report
from instructax.config import ConfigError
from instructax.report.claims import CLAIMS, check_claim, overall_verdict
from instructax.report.judging import judge_experiment
from instructax.report.page import PageContent, check_seeds, render
from instructax.report.results import load_experiment
from instructax.report.samples import page_samples
from instructax.report.tables import Table, agreement_table, label_noise_table, policy_table

pytest_plugins = ("tests.support.report_fixtures",)

ROOT = Path(__file__).resolve().parents[2]


def content_of(samples, table):
    """Returns the content of a page with nothing but samples and a table."""
    return PageContent(
        title="<i>title</i>",
        claims=[],
        policy_tables=[table],
        figures=[],
        public_tasks_tables=[],
        reward_figures=[],
        agreement=Table((), []),
        label_noise=Table((), []),
        samples=samples,
    )


def embedded_samples(page_text):
    """Returns the samples that a page's script reads."""
    found = re.search(r'id="samples-data">(.*?)</script>', page_text, re.DOTALL)
    return json.loads(found.group(1))


def test_an_experiment_of_one_size_has_a_page(tmp_path, capsys):
    root = report_logs.write_one_size(tmp_path / "one-size")
    path = report.write_report([root], tmp_path / "out")
    assert "GPT" in capsys.readouterr().out
    assert (tmp_path / "out" / "figure-1.png").stat().st_size > 10_000

    judged = judge_experiment(load_experiment(root))
    rows = [row[:2] for row in policy_table(judged).rows]
    assert rows[:2] == [("0.0082M", "GPT"), ("0.0082M", "SFT")]
    quantities = [finding.quantity for finding in check_claim(CLAIMS[0], [judged])]
    assert quantities == [
        "0.0082M: SFT − GPT",
        "0.0082M: PPO − SFT",
        "0.0082M: GPT prompted",
    ]
    assert overall_verdict(check_claim(CLAIMS[14], [judged])) == "no data"

    text = path.read_text()
    assert text.count("<td>no data</td><td>–</td>") == 2  # the reward models
    assert "Prompts of the GPT-3 distribution: no data." in text


def test_tables_of_the_reward_model(judged):
    agreement = agreement_table([judged])
    assert [row[-1] for row in agreement.rows] == ["0.726 ± 0.015", "0.773 ± 0.013", "–"]
    label_noise = label_noise_table([judged])
    assert [row[2:] for row in label_noise.rows] == [
        ("as usual", "0.720", "480"),
        ("none", "0.810", "480"),
    ]


def test_without_responses_there_is_no_agreement(judged):
    sizes = [dataclasses.replace(size, samples={}) for size in judged.results.sizes]
    results = dataclasses.replace(judged.results, prompts=[], sizes=sizes)
    agreement = agreement_table([dataclasses.replace(judged, results=results)])
    assert [row[2:4] for row in agreement.rows] == [("0", "no data")] * 3


class PageParser(html.parser.HTMLParser):
    """Collects everything that a browser would fetch, and counts scripts."""

    def __init__(self):
        super().__init__()
        self.fetched = []
        self.num_scripts = 0

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.num_scripts += 1
        if tag in ("link", "iframe", "object"):
            self.fetched.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.fetched.append(value)


def test_the_page_needs_no_other_file(page):
    text = page.read_text()
    parser = PageParser()
    parser.feed(text)
    assert parser.fetched == []
    assert parser.num_scripts == 2
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_figure_is_on_the_page_and_in_two_files(page):
    names = sorted(path.stem for path in page.parent.glob("*.png"))
    assert names == sorted(path.stem for path in page.parent.glob("*.svg"))
    assert len(names) == page.read_text().count("<figure id=") == 10


def test_a_response_cannot_leave_its_place_in_the_page(judged):
    evil = "</script><script>alert(1)</script><!--"
    size = judged.results.sizes[0]
    records = []
    for record in size.samples["PPO"]:
        records.append(dict(record, response=evil, pieces=[evil], token_kl=[0.0]))
    evil_size = dataclasses.replace(size, samples={**size.samples, "PPO": records})
    sizes = [evil_size, *judged.results.sizes[1:]]
    results = dataclasses.replace(judged.results, sizes=sizes)
    samples = page_samples([dataclasses.replace(judged, results=results)])

    text = render(content_of(samples, Table((), [])))
    assert text.count("</script>") == 2
    assert "<!--" not in text
    first_prompt = embedded_samples(text)["runs"][0]["prompts"][0]
    pieces = {response["pieces"][0] for response in first_prompt["responses"]}
    assert evil in pieces


def test_tables_and_titles_are_escaped():
    samples = {"fullColorNats": 3.0, "text": "<&'\">"}
    text = render(content_of(samples, Table(("<a>",), [('<b>&"',)], title="<u>")))
    assert "<th>&lt;a&gt;</th>" in text
    assert "<td>&lt;b&gt;&amp;&#34;</td>" in text
    assert "<h3>&lt;u&gt;</h3>" in text
    assert "<title>instructax: &lt;i&gt;title&lt;/i&gt;</title>" in text
    assert embedded_samples(text) == samples


def test_the_same_logs_give_the_same_page(tmp_path):
    roots = []
    for seed, name in enumerate(("first", "second")):
        roots.append(report_logs.write_one_size(tmp_path / name, seed))
    pages = []
    for name in ("a", "b"):
        pages.append(report.write_report(roots, tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert (tmp_path / "a" / "figure-4-1.png").exists()
    assert "second" in pages[0].decode()


def test_seeds_must_be_different_seeds_of_one_experiment(tmp_path, family):
    one_size = load_experiment(report_logs.write_one_size(tmp_path / "one-size"))
    message = r"one-size has the sizes .* give seeds of one experiment"
    with pytest.raises(ConfigError, match=message):
        check_seeds([load_experiment(family), one_size])
    with pytest.raises(ConfigError, match=r"the seeds are \[0, 0\]: give each seed once"):
        check_seeds([one_size, one_size])


def test_the_command_needs_folders_and_out():
    done = subprocess.run(
        [sys.executable, "scripts/report.py", "runs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--out" in done.stderr
