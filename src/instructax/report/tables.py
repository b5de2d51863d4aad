"""The tables of a report: rows of text, in aligned columns or as HTML."""

from html import escape

from instructax.evals.intervals import mean_estimate
from instructax.report import paper
from instructax.report.agreement import agreements
from instructax.report.judging import (
    HELD_OUT,
    LABELER,
    TRUTH,
    Reading,
    best_of_kl,
    wins_estimate,
)
from instructax.report.results import BEST_OF, REWARD_RUNS, Size
from instructax.simulation.public_tasks import TASKS

NO_DATA = "no data"
WAVERING = dict(
    zip(REWARD_RUNS, ("as they are", "who never waver"), strict=True)
)  # run → its labelers
HEADS = (
    "size",
    "policy",
    "true utility",
    "win rate (labelers)",
    "win rate (held-out)",
    "win rate (truth)",
    "score",
    "KL",
)
Row = tuple[str, ...]


def table_of(reading: Reading) -> list[Row]:
    """A row of figures for each size and policy, below HEADS."""
    rows = []
    for (size, policy), answers in reading.answers.items():
        wins = [
            wins_estimate(reading, size, policy, by) for by in (LABELER, HELD_OUT, TRUTH)
        ]
        estimates = [
            mean_estimate(answers.opinions[TRUTH]),
            *wins,
            mean_estimate(answers.scores),
        ]
        n = next(one.best_of for one in reading.experiment.sizes if one.name == size)
        kl = f"≤ {best_of_kl(n):.2f}" if policy == BEST_OF else f"{answers.kl.mean():.2f}"
        rows.append((size, policy, *map(str, estimates), kl))
    return rows


def console_table(reading: Reading) -> str:
    """The table in aligned columns; 95% intervals in brackets."""
    rows = [HEADS, *table_of(reading)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def html_table(heads: Row, rows: list[Row]) -> str:
    """A table; cells are text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def public_table(sizes: list[Size]) -> str:
    """Every figure of every public task."""
    rows = [
        (
            size.name,
            f"{task} ({TASKS[task].counterpart})",
            TASKS[task].metric,
            condition,
            policy,
            str(figure.estimate),
        )
        for size in sizes
        for policy, tasks in size.public.items()
        for task, conditions in tasks.items()
        for condition, figure in conditions.items()
    ]
    if not rows:
        return ""
    heads = ("size", "task", "metric", "condition", "policy", "figure [95%]")
    return f"<details><summary>All figures of the public tasks</summary>{html_table(heads, rows)}</details>"


def agreement_table(readings: list[Reading]) -> str:
    """How often two labelers agree, run by run, and the paper's."""
    rows = []
    for reading in readings:
        for name, (estimate, pairs) in agreements(reading.experiment).items():
            value, half = paper.AGREEMENT.get(name, (None, None))
            theirs = f"{value:.3f} ± {half:.3f}" if value else "–"
            rows.append(
                (
                    reading.experiment.name,
                    name,
                    str(pairs),
                    str(estimate) if pairs else NO_DATA,
                    theirs,
                )
            )
    return html_table(
        ("run", "two labelers", "pairs", "ordered alike [95%]", "the paper"), rows
    )


def noise_table(readings: list[Reading]) -> str:
    """Held-out accuracy of the reward models of labelers as they are and of labelers
    without noise, run by run."""
    rows = []
    for reading in readings:
        for run, labelers in WAVERING.items():
            last = reading.experiment.reward_runs[run]
            accuracy, pairs = last.get("held_out_accuracy"), last.get("held_out_pairs")
            shown = (
                (NO_DATA, "–")
                if accuracy is None or not pairs
                else (f"{accuracy:.3f}", f"{pairs:.0f}")
            )
            rows.append((reading.experiment.name, run, labelers, *shown))
    return html_table(
        ("run", "reward model", "labelers", "held-out accuracy", "pairs"), rows
    )
