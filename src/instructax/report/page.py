"""The report as one HTML page without outside assets: claims, tables, figures, samples.

The page's text and structure are in `page.html.jinja`, its style in `page.css`, and the
script that shows samples in `samples.js`.
"""

import base64
import collections
import dataclasses
import math
from pathlib import Path

from instructax.config import ConfigError
from instructax.report.claims import (
    CLAIMS,
    VERDICTS,
    Claim,
    Finding,
    Region,
    check_claim,
    overall_verdict,
)
from instructax.report.drawing import COLORS, save_figure
from instructax.report.judging import JudgedExperiment
from instructax.report.logs import JsonObject
from instructax.report.page_figures import Figures, policy_figures, reward_figures
from instructax.report.results import ExperimentResults
from instructax.report.samples import page_samples
from instructax.report.tables import (
    Table,
    agreement_table,
    findings_table,
    label_noise_table,
    policy_table,
    public_tasks_table,
)
from instructax.simulation.labelers import TIE_THRESHOLD

# The template, the style sheet and the script lie next to this file.
FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ClaimSection:
    """A claim as the page shows it."""

    name: str
    text: str
    source: str
    verdict: str
    counts: str  # the number of findings with each verdict
    quantity: str
    rule: str  # when a finding is "seen"
    findings: Table


@dataclasses.dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it."""

    name: str  # also the name of its files
    caption: str
    svg_base64: str


@dataclasses.dataclass(frozen=True)
class PageContent:
    """Everything on a page that depends on the experiments."""

    title: str
    claims: list[ClaimSection]
    policy_tables: list[Table]
    figures: list[PageFigure]
    public_tasks_tables: list[Table]
    reward_figures: list[PageFigure]
    agreement: Table
    label_noise: Table
    samples: JsonObject  # of `samples.page_samples`


def check_seeds(experiments: list[ExperimentResults]) -> None:
    """Raises ConfigError unless the experiments are different seeds of the same sizes."""
    # Figures show the sizes of the first seed, and their means over all seeds.
    first = experiments[0]
    first_sizes = [size.name for size in first.sizes]
    for experiment in experiments:
        sizes = [size.name for size in experiment.sizes]
        if sizes != first_sizes:
            raise ConfigError(
                f"{experiment.name} has the sizes {sizes}, {first.name} has {first_sizes}: "
                "give seeds of one experiment"
            )
    # The same world twice would only look like more evidence.
    seeds = [experiment.seed for experiment in experiments]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"the seeds are {seeds}: give each seed once")


def page_html(experiments: list[JudgedExperiment], out: Path) -> str:
    """Returns the page, and writes its figures into the folder `out`."""
    return render(page_content(experiments, out))


def page_content(experiments: list[JudgedExperiment], out: Path) -> PageContent:
    """Computes what is on the page, and writes its figures into the folder `out`."""
    # An experiment that was also evaluated on GPT-3 prompts is listed twice.
    by_prompts = []
    for judged in experiments:
        by_prompts.append(judged)
        if judged.on_gpt_prompts is not None:
            by_prompts.append(judged.on_gpt_prompts)

    # Claims look at the GPT-3 prompts themselves, through `on_gpt_prompts`.
    claims = []
    for claim in CLAIMS:
        claims.append(claim_section(claim, check_claim(claim, experiments)))

    public_tasks = []
    for judged in experiments:
        public_tasks.append(public_tasks_table(judged.results.sizes))

    return PageContent(
        title=", ".join(judged.results.name for judged in experiments),
        claims=claims,
        policy_tables=[policy_table(judged) for judged in by_prompts],
        figures=_save_all(policy_figures(experiments), out),
        public_tasks_tables=public_tasks,
        reward_figures=_save_all(reward_figures(experiments), out),
        agreement=agreement_table(experiments),
        label_noise=label_noise_table(experiments),
        samples=page_samples(by_prompts),
    )


def claim_section(claim: Claim, findings: list[Finding]) -> ClaimSection:
    """Returns a claim with its verdict and the findings behind it."""
    # One verdict for each measurement and seed.
    verdicts = collections.Counter(finding.verdict for finding in findings)
    # Such as "3 seen, 1 undecided".
    counts = []
    for verdict in VERDICTS:
        if verdicts[verdict]:
            counts.append(f"{verdicts[verdict]} {verdict}")
    return ClaimSection(
        name=claim.name,
        text=claim.text,
        source=claim.source,
        verdict=overall_verdict(findings),
        counts=", ".join(counts),
        quantity=claim.quantity,
        rule=region_rule(claim.region),
        findings=findings_table(findings),
    )


def region_rule(region: Region) -> str:
    """Describes when a measurement is seen to lie in a region."""
    low, high = region
    rule = f"seen if the whole interval is above {low:g}"
    if high == math.inf:
        return rule
    return f"{rule} and below {high:g}"


def _save_all(figures: Figures, out: Path) -> list[PageFigure]:
    """Writes the figures into the folder `out`, and returns those that have data."""
    saved = []
    for name, caption, figure in figures:
        if figure is None:
            continue
        # The page embeds the SVG; the files are for papers and slides.
        save_figure(figure, out, name)
        # Base64 keeps the SVG from being parsed as part of the page.
        svg = (out / f"{name}.svg").read_bytes()
        saved.append(PageFigure(name, caption, base64.b64encode(svg).decode()))
    return saved


def render(content: PageContent) -> str:
    """Returns the HTML of a page.

    All values are escaped. The samples are JSON in which `<`, `>` and `&` are escaped too:
    no sampled text can end the script element or begin a comment.
    """
    import jinja2
    import markupsafe

    # An undefined variable in the template is an error, not an empty string.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Compact JSON, in the given order; `tojson` still escapes what HTML would interpret.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
    }
    template = environment.get_template("page.html.jinja")
    return template.render(
        content=content,
        # Our own files are trusted.
        css=markupsafe.Markup((FOLDER / "page.css").read_text()),
        script=markupsafe.Markup((FOLDER / "samples.js").read_text()),
        policy_colors=COLORS,
        tie_margin=f"{TIE_THRESHOLD:g}",
    )
