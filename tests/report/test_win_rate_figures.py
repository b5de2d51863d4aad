"""The figure of win rates by prompts and labelers."""

import dataclasses

import numpy as np

from instructax.report.win_rate_figures import plot_win_rates

pytest_plugins = ("tests.support.report_fixtures",)

TITLES = [
    "training labelers, here",
    "training labelers, the paper",
    "held-out labelers, here",
    "held-out labelers, the paper",
]


def test_there_is_a_row_for_each_distribution_of_prompts(judged):
    without_gpt_prompts = dataclasses.replace(judged, on_gpt_prompts=None)
    for experiment, rows in ((judged, 2), (without_gpt_prompts, 1)):
        axes = plot_win_rates([experiment]).axes
        assert [axis.get_title() for axis in axes] == TITLES * rows
        row_labels = [axis.get_ylabel().split()[0] for axis in axes[::4]]
        assert row_labels == ["InstructGPT", "GPT-3"][:rows]
        num_policies = []
        for axis in axes[::4]:
            num_policies.append(len({line.get_color() for line in axis.lines}))
        assert num_policies == [7, 4][:rows]


def test_the_papers_values_are_drawn_beside_ours(judged):
    # PPO-ptx is the fourth policy; held-out labelers, prompts of the GPT-3 distribution.
    axis = plot_win_rates([judged]).axes[7]
    lines = [line for line in axis.lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(lines[3].get_ydata(), [0.565, 0.554, 0.624])
