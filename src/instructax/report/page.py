"""One HTML page without outside assets: claims, tables, figures, samples."""

import base64
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from instructax.config import ConfigError
from instructax.report import figures, metric_figures, paper
from instructax.report.browser import FULL_COLOUR, browser
from instructax.report.claims import CLAIMS, VERDICTS, Claim, Finding, findings_of, overall
from instructax.report.drawing import save
from instructax.report.judging import (
    LABELER,
    TRUTH,
    Reading,
    curve_of,
    likert_estimate,
    wins_estimate,
)
from instructax.report.results import Experiment
from instructax.report.style import STYLE
from instructax.report.tables import (
    HEADS,
    NO_DATA,
    agreement_table,
    html_table,
    noise_table,
    public_table,
    table_of,
)
from instructax.simulation.labelers import TIE

Drawn = tuple[
    str, str, Any
]  # file name, caption, figure; None where there is nothing to draw


def check_seeds(experiments: list[Experiment]) -> None:
    """Raises ValueError unless all have the same sizes and other seeds: they are to be
    seeds of one experiment."""
    names = [[size.name for size in experiment.sizes] for experiment in experiments]
    for experiment, sizes in zip(experiments, names, strict=True):
        if sizes != names[0]:
            raise ConfigError(
                f"{experiment.name} has the sizes {sizes}, {experiments[0].name} has {names[0]}: "
                "give seeds of one experiment"
            )
    seeds = [experiment.seed for experiment in experiments]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds are {seeds}: give each once")


def claim_html(claim: Claim, findings: list[Finding]) -> str:
    """A claim with its verdict, and behind it the figures that gave it."""
    counts = [
        (name, sum(finding.verdict == name for finding in findings)) for name in VERDICTS
    ]
    summary = ", ".join(f"{count} {name}" for name, count in counts if count)
    rows = [
        (x.seed, x.what, str(x.measured) if x.measured else "–", x.verdict)
        for x in findings
    ]
    return (
        f'<details class="claim"><summary>{badge(overall(findings))} <b>{claim.name}</b> {escape(claim.text)} '
        f'<span class="quiet">(section {escape(claim.source)}; {summary})</span></summary>'
        f"<p>{escape(claim.figure)}; {escape(region_text(claim.region))}</p>"
        f"{html_table(('run', 'figure', 'measured [95%]', 'verdict'), rows)}</details>"
    )


def badge(verdict: str) -> str:
    """A coloured word."""
    return f'<span class="badge {verdict.replace(" ", "-")}">{verdict}</span>'


def region_text(region: tuple[float, float]) -> str:
    """The rule of a claim in words."""
    low, high = region
    return f"seen if the whole interval is above {low:g}" + (
        "" if high == float("inf") else f" and below {high:g}"
    )


def all_figures(readings: list[Reading]) -> Iterator[Drawn]:
    """All that is drawn of policies; of several seeds, the figures of one alone carry its
    name."""
    win_rate = "win rate against the largest SFT"
    by_labelers, by_truth = (partial(wins_estimate, by=by) for by in (LABELER, TRUTH))
    caption = (
        "Win rate against the largest SFT, by training labelers (the paper's figure 1)."
    )
    yield (
        "figure-1",
        caption,
        figures.by_size(readings, by_labelers, win_rate, paper.WIN_RATES),
    )
    missing = (
        ""
        if any(reading.gpt for reading in readings)
        else f" Prompts of the GPT-3 distribution: {NO_DATA}."
    )
    caption = (
        "The same by prompts and labelers, against the largest SFT on the same prompts (figure 3)."
        + missing
    )
    yield "figure-3", caption, figures.figure_3(readings)
    caption = "The same by the true utility, which no stage has seen."
    yield "truth", caption, figures.by_size(readings, by_truth, win_rate, None)
    grades = figures.by_size(
        readings, partial(likert_estimate, by=LABELER), "grade (1 … 7)", paper.LIKERT
    )
    yield "figure-31", "Grades of training labelers (figure 31).", grades
    yield from by_seed(readings, figures_of_seed)


def by_seed(
    readings: list[Reading], draw: Callable[[Reading], Iterator[Drawn]]
) -> Iterator[Drawn]:
    """What is drawn of each seed alone, numbered if there are several."""
    for number, reading in enumerate(readings):
        mark, which = (
            (f"-{number}", f" Run {reading.experiment.name}.")
            if len(readings) > 1
            else ("", "")
        )
        for name, caption, figure in draw(reading):
            yield name + mark, caption + which, figure


def figures_of_seed(reading: Reading) -> Iterator[Drawn]:
    """What is drawn of policies of one seed."""
    experiment, sizes = reading.experiment, reading.experiment.sizes
    folders = {"PPO": "ppo", "PPO-ptx": "ppo-ptx"}
    curves = {
        (size.name, policy): curve
        for size in sizes
        for policy, folder in folders.items()
        if (curve := curve_of(experiment, size, folder))
    }
    yield (
        "figure-4",
        "Table 3's questions, sizes pooled (figure 4); diamonds: the paper.",
        figures.metadata(reading),
    )
    caption = (
        f"PPO: each point is an iteration, each line a moving mean of {figures.WINDOW}. Where score and true utility "
        "part, the policy exploits the reward model. A star: the best of n samples of SFT, at the most KL that it can "
        "have; it is of held-out prompts, where the curves are of training prompts."
    )
    yield "over-optimisation", caption, figures.over_optimisation(sizes, curves, reading)
    yield (
        "alignment-tax",
        "Public tasks: what fine-tuning changes (figures 28, 29; table 14).",
        metric_figures.tax(sizes),
    )
    yield (
        "harm",
        "Truthfulness, toxicity and stereotypes (figures 6, 7, 32).",
        metric_figures.harm(sizes),
    )
    yield (
        "sft-overfit",
        "SFT that goes on for many epochs (sections 3.5, C.1).",
        metric_figures.overfitting(sizes),
    )


def reward_figures(reading: Reading) -> Iterator[Drawn]:
    """What is drawn of the reward model of one seed."""
    caption = "The reward model on held-out comparisons; diamonds: the paper (section 4.1)."
    yield "reward-model", caption, metric_figures.reward_model(reading.experiment.sizes)


def figure_html(name: str, caption: str, image: Path) -> str:
    """A figure with the SVG in it, as data."""
    data = base64.b64encode(image.read_bytes()).decode()
    return (
        f'<figure id="{name}"><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def figures_html(drawn: Iterator[Drawn], out: Path) -> str:
    """The figures that there is data for, one below the other; they are written into the
    folder `out` too."""
    shown = []
    for name, caption, figure in drawn:
        if figure:
            save(figure, out, name)
            shown.append(figure_html(name, caption, out / f"{name}.svg"))
    return "".join(shown)


def reward_html(readings: list[Reading], out: Path) -> str:
    """The section of the reward model and of those whom it learnt from."""
    return (
        f"{figures_html(by_seed(readings, reward_figures), out)}"
        f"<h3>Agreement of labelers</h3><p>{AGREEMENT}</p>{agreement_table(readings)}"
        f"<h3>Noise of labelers</h3><p>{NOISE}</p>{noise_table(readings)}"
    )


def build(readings: list[Reading], out: Path) -> str:
    """The page; its figures are written into the folder `out` too."""
    names = ", ".join(reading.experiment.name for reading in readings)
    prompted = [found for reading in readings for found in (reading, reading.gpt) if found]
    tables = "".join(
        f"<h3>{escape(r.experiment.name)}</h3>{html_table(HEADS, table_of(r))}"
        for r in prompted
    )
    claims = "".join(claim_html(claim, findings_of(claim, readings)) for claim in CLAIMS)
    public = "".join(public_table(reading.experiment.sizes) for reading in readings)
    sections = (
        ("claims", "The paper's claims", f"<p>{RULE}</p>{claims}"),
        ("policies", "Policies", f"<p>{TABLE}</p>{tables}"),
        ("figures", "Figures", figures_html(all_figures(readings), out) + public),
        ("reward", "Reward model and labelers", reward_html(readings, out)),
        ("samples", "Samples", f"<p>{SAMPLES}</p>{browser(prompted)}"),
    )
    links = " ".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>'
        for key, title, content in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>instructax: {escape(names)}</title><style>{STYLE}</style></head>'
        f"<body><header><h1>instructax: {escape(names)}</h1><nav>{links}</nav></header><main>{body}</main>"
        "</body></html>"
    )


RULE = (
    "A figure is <b>seen</b> if its whole 95% interval lies where the claim puts it, <b>not seen</b> if the whole "
    "interval lies elsewhere, <b>undecided</b> if it crosses the edge, and has <b>no data</b> where a log is missing. "
    "A claim is as good as the worst of its figures: a long list will hold some undecided by chance. Differences of "
    "means over the same prompts or items are paired by them; of independent figures, of BLEU and of accuracies of the "
    "reward model the widths add in quadrature, which is too wide for the latter two."
)
TABLE = (
    "Means with 95% intervals over held-out prompts. True utility (−1 … 1) is the world's own judgement, which no "
    "stage sees; on harmful prompts it weighs harmlessness against helpfulness as training labelers do on average. "
    "Win rates are against the largest SFT, a tie counting half: by simulated training labelers, by "
    "held-out ones, and by the true utility. KL is the mean log-ratio to the SFT policy of the same size, in nats; of "
    "best-of-n it is the most that there can be."
)
AGREEMENT = (
    "How often two labelers order two answers of policies alike: answers of the largest size, what several policies "
    f"said taken once, and only pairs that both labelers order strictly (opinions less than {TIE:g} apart are ties). "
    "Intervals are over prompts. The labelers are calibrated to the paper's figures on answers that writers wrote and "
    "spoilt; on answers of policies, which are alike in other ways, the agreement may differ."
)
NOISE = (
    "How often a reward model orders a held-out pair as its labelers did, at the end of its training. The second model "
    "was trained and measured on labelers who never waver: what it still gets wrong is not their noise."
)
SAMPLES = (
    "The first prompts of each set; all are in the evaluations' samples.jsonl. "
    "Behind each token is its log-ratio to the SFT policy: orange where the policy makes it likelier, blue where less "
    f"likely; full colour at {FULL_COLOUR:g} nats. Score: the reward model's. Utility: the world's. Faults: what a "
    "training labeler said, who errs now and then. ■ is the end of the text."
)
