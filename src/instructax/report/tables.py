"""The tables of a report: rows of text, for the console and for the page."""

import dataclasses

from instructax.evals.intervals import mean_estimate
from instructax.report import paper_values
from instructax.report.agreement import labeler_agreement
from instructax.report.claims import Finding
from instructax.report.judging import (
    HELD_OUT_GROUP,
    TRAINING_GROUP,
    TRUE_UTILITY,
    JudgedExperiment,
    win_rate_estimate,
)
from instructax.report.results import BEST_OF, REWARD_RUNS, SizeResults
from instructax.report.training_curves import best_of_n_kl
from instructax.simulation.public_tasks import PUBLIC_TASKS

NO_DATA = "no data"
EMPTY = "–"  # a cell that has no value

# The labels that each of REWARD_RUNS is trained and measured on.
LABEL_NOISE = dict(zip(REWARD_RUNS, ("as usual", "none"), strict=True))


@dataclasses.dataclass(frozen=True)
class Table:
    """Column titles and rows of text."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    title: str = ""


def policy_table(judged: JudgedExperiment) -> Table:
    """Lists the metrics of each policy at each size."""
    # Size → n of best-of-n.
    best_of = {size.name: size.best_of for size in judged.results.sizes}
    # One row for each policy, from the smallest to the largest size.
    rows = []
    for (size, policy), responses in judged.responses.items():
        estimates = [
            mean_estimate(responses.opinions[TRUE_UTILITY]),
            win_rate_estimate(judged, size, policy, TRAINING_GROUP),
            win_rate_estimate(judged, size, policy, HELD_OUT_GROUP),
            win_rate_estimate(judged, size, policy, TRUE_UTILITY),
            mean_estimate(responses.scores),
        ]
        # The KL of best-of-n is only known to be below a bound.
        if policy == BEST_OF:
            kl = f"≤ {best_of_n_kl(best_of[size]):.2f}"
        else:
            kl = f"{responses.kl.mean():.2f}"
        rows.append((size, policy, *map(str, estimates), kl))
    columns = (
        "size",
        "policy",
        "true utility",
        "win rate (labelers)",
        "win rate (held-out)",
        "win rate (truth)",
        "score",
        "KL",
    )
    return Table(columns, rows, title=judged.results.name)


def console_text(table: Table) -> str:
    """Formats a table in aligned columns."""
    widths = []
    for column in zip(table.columns, *table.rows, strict=True):
        widths.append(max(map(len, column)))

    # Columns are as wide as their widest cell.
    rule = tuple("-" * width for width in widths)
    lines = []
    for row in (table.columns, rule, *table.rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def findings_table(findings: list[Finding]) -> Table:
    """Lists the measurements behind a claim."""
    rows = []
    for finding in findings:
        measured = str(finding.estimate) if finding.estimate else EMPTY
        rows.append((finding.run, finding.quantity, measured, finding.verdict))
    return Table(("run", "quantity", "measured [95%]", "verdict"), rows)


def public_tasks_table(sizes: list[SizeResults]) -> Table:
    """Lists every metric of every public task."""
    # A row for each leaf of `SizeResults.public_tasks`.
    rows = []
    for size in sizes:
        for policy, tasks in size.public_tasks.items():
            for task, conditions in tasks.items():
                title = f"{task} ({PUBLIC_TASKS[task].counterpart})"
                name = PUBLIC_TASKS[task].metric
                for condition, metric in conditions.items():
                    value = str(metric.estimate)
                    rows.append((size.name, title, name, condition, policy, value))
    columns = ("size", "task", "metric", "condition", "policy", "value [95%]")
    return Table(columns, rows)


def agreement_table(experiments: list[JudgedExperiment]) -> Table:
    """Lists how often two labelers agree in each run, and in the paper."""
    # Without a pair that both labelers order, there is no share.
    rows = []
    for judged in experiments:
        for name, agreement in labeler_agreement(judged.results).items():
            # The paper does not state the agreement between the groups.
            published = EMPTY
            if name in paper_values.AGREEMENT:
                value, half_width = paper_values.AGREEMENT[name]
                published = f"{value:.3f} ± {half_width:.3f}"
            measured = str(agreement.share) if agreement.pairs else NO_DATA
            pairs = str(agreement.pairs)
            rows.append((judged.results.name, name, pairs, measured, published))
    columns = ("run", "two labelers", "pairs", "same order [95%]", "the paper")
    return Table(columns, rows)


def label_noise_table(experiments: list[JudgedExperiment]) -> Table:
    """Lists validation accuracies of reward models with and without label noise."""
    rows = []
    for judged in experiments:
        for run, noise in LABEL_NOISE.items():
            summary = judged.results.reward_runs[run]
            accuracy = summary.get("validation_accuracy")
            pairs = summary.get("validation_pairs")
            if accuracy is None or not pairs:
                cells = (NO_DATA, EMPTY)  # not run, or without a validation pair
            else:
                cells = (f"{accuracy:.3f}", f"{pairs:.0f}")
            rows.append((judged.results.name, run, noise, *cells))
    columns = ("run", "reward model", "label noise", "validation accuracy", "pairs")
    return Table(columns, rows)
