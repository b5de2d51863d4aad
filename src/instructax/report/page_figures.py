"""All figures of a page with their names and captions, in the order of the page."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from instructax.report import paper_values, response_figures, task_figures
from instructax.report.judging import (
    TRAINING_GROUP,
    TRUE_UTILITY,
    JudgedExperiment,
    likert_estimate,
    win_rate_estimate,
)
from instructax.report.tables import NO_DATA
from instructax.report.training_curves import load_ppo_curve
from instructax.report.win_rate_figures import plot_metric_by_size, plot_win_rates

# (file name, caption, figure); the figure is None if there is nothing to draw.
Figures = Iterator[tuple[str, str, Any]]


def policy_figures(experiments: list[JudgedExperiment]) -> Figures:
    """Draws all figures of policies: first those of all seeds, then those of each seed."""
    # Figures of all seeds.
    ylabel = "win rate against the largest SFT"
    yield (
        "figure-1",
        "Win rate against the largest SFT, by training labelers (the paper's figure 1).",
        plot_metric_by_size(
            experiments,
            partial(win_rate_estimate, by=TRAINING_GROUP),
            ylabel,
            paper_values.WIN_RATES,
        ),
    )

    caption = (
        "Win rate by prompts and labelers, against the largest SFT on the same prompts "
        "(figure 3)."
    )
    # Say that a row is missing, and why.
    if not any(judged.on_gpt_prompts for judged in experiments):
        caption += f" Prompts of the GPT-3 distribution: {NO_DATA}."
    yield "figure-3", caption, plot_win_rates(experiments)

    # The paper has no such figure: only a simulation knows the truth.
    yield (
        "truth",
        "Win rate by the true utility, which no training stage sees.",
        plot_metric_by_size(
            experiments, partial(win_rate_estimate, by=TRUE_UTILITY), ylabel, None
        ),
    )
    yield (
        "figure-31",
        "Grades by training labelers (figure 31).",
        plot_metric_by_size(
            experiments,
            partial(likert_estimate, by=TRAINING_GROUP),
            "grade (1 … 7)",
            paper_values.LIKERT,
        ),
    )
    # Figures of one seed each: they pool or pair responses to the prompts of one world.
    yield from _by_seed(experiments, _policy_figures_of_seed)


def reward_figures(experiments: list[JudgedExperiment]) -> Figures:
    """Draws all figures of the reward model, seed by seed."""
    yield from _by_seed(experiments, _reward_figures_of_seed)


def _by_seed(
    experiments: list[JudgedExperiment], draw: Callable[[JudgedExperiment], Figures]
) -> Figures:
    """Draws the figures of each seed; of several seeds, they are numbered and named."""
    if len(experiments) == 1:
        yield from draw(experiments[0])
        return
    # Names are those of files, so each seed needs its own.
    for number, judged in enumerate(experiments):
        for name, caption, figure in draw(judged):
            yield f"{name}-{number}", f"{caption} Run {judged.results.name}.", figure


def _policy_figures_of_seed(judged: JudgedExperiment) -> Figures:
    sizes = judged.results.sizes
    yield (
        "figure-4",
        "Yes-no questions of table 3, sizes pooled (figure 4); diamonds: the paper.",
        response_figures.plot_flag_shares(judged),
    )

    # Policy → the folder of its run.
    curves = {}
    for size in sizes:
        for policy, folder in (("PPO", "ppo"), ("PPO-ptx", "ppo-ptx")):
            curve = load_ppo_curve(judged.results, size, folder)
            if curve is not None:
                curves[size.name, policy] = curve
    yield (
        "over-optimisation",
        "PPO: each point is an iteration, each line a moving average of "
        f"{response_figures.WINDOW}. Where score and true utility diverge, the policy "
        "exploits the reward model. Star: the best of n samples from SFT, at the upper "
        "bound of its KL; it is measured on validation prompts, the curves on training "
        "prompts.",
        response_figures.plot_overoptimization(judged, curves),
    )

    yield (
        "alignment-tax",
        "Public tasks: changes by fine-tuning (figures 28, 29; table 14).",
        task_figures.plot_alignment_tax(sizes),
    )
    yield (
        "harm",
        "Truthfulness, toxicity and stereotypes (figures 6, 7, 32).",
        task_figures.plot_harm(sizes),
    )
    yield (
        "sft-overfit",
        "SFT for many epochs (sections 3.5, C.1).",
        task_figures.plot_sft_overfitting(sizes),
    )


def _reward_figures_of_seed(judged: JudgedExperiment) -> Figures:
    yield (
        "reward-model",
        "The reward model on validation comparisons; diamonds: the paper (section 4.1).",
        task_figures.plot_reward_model(judged.results.sizes),
    )
