"""The simulated writers of demonstrations."""

import numpy as np
from tests.support.simulated_tasks import sample_tasks

from instructax.simulation.judge import judge
from instructax.simulation.lexicon import rng_for
from instructax.simulation.writers import WRITER_STYLES, write_demonstration


def test_demonstrations_are_far_from_perfect_and_the_good_writer_is_best():
    rng = rng_for(0, "test")
    tasks = sample_tasks(600)
    means = {}
    for name, style in WRITER_STYLES.items():
        rewards = []
        for task in tasks:
            rewards.append(judge(task, write_demonstration(style, task, rng)).helpfulness)
        means[name] = np.mean(rewards)
        assert len(set(np.round(rewards, 6))) > 25  # many levels
    assert means["good"] > max(means[name] for name in means if name != "good") + 0.25
    assert 0.45 < np.mean(list(means.values())) < 0.65
