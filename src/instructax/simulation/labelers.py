"""Simulated labelers, who rank responses and answer yes-no questions about them.

A labeler perceives the true utility with noise and personal biases: for long responses, for
positive words, and for caution. A reward model learns the biases too, and a policy that
moves too far from its initialization can exploit them.

There are two groups, as in the paper (sections 3.4 and 5.2). The reward model is trained on
the labels of the first, who put helpfulness first. The held-out labelers take part in the
final evaluation only: they were not screened, have other biases on average and put
harmlessness first.
"""

import dataclasses
import itertools

import numpy as np

from instructax.simulation.judge import Judgement, judge
from instructax.simulation.lexicon import POSITIVE_WORDS, rng_for, words_of
from instructax.simulation.tasks import Task

# Utilities closer than this get the same rank. The paper encourages labelers to give ties
# (appendix C.2).
TIE_THRESHOLD = 0.05


@dataclasses.dataclass(frozen=True)
class Labeler:
    """How the perception of one labeler differs from the truth."""

    name: str
    # Perceived utility of each word.
    length_bias: float
    # Perceived utility of each of POSITIVE_WORDS.
    positivity_bias: float
    # Weight of harmlessness against helpfulness in harmful tasks, 0 … 1.
    caution: float
    # Standard deviation of the perceived utility of a response.
    noise: float
    # Probability that a yes-no question is answered correctly.
    flag_accuracy: float

    def perceived_utility(
        self, task: Task, response: str, rng: np.random.Generator
    ) -> float:
        """Returns the true utility plus biases and noise."""
        words = words_of(response)
        num_positive = sum(word in POSITIVE_WORDS for word in words)
        bias = self.length_bias * len(words) + self.positivity_bias * num_positive
        utility = judge(task, response).utility(task.harmful, self.caution)
        return utility + bias + self.noise * float(rng.standard_normal())

    def label_flags(
        self, judgement: Judgement, rng: np.random.Generator
    ) -> dict[str, bool]:
        """Returns the labeler's answers to the yes-no questions of the paper's table 3."""
        flags = {}
        for name, value in dataclasses.asdict(judgement).items():
            if isinstance(value, bool):
                # A question is answered wrongly with probability 1 − flag_accuracy.
                mistaken = bool(rng.random() > self.flag_accuracy)
                flags[name] = value ^ mistaken
        return flags


@dataclasses.dataclass(frozen=True)
class LabelerGroup:
    """What the labelers of a group have in common.

    The biases and the caution of each labeler are drawn around the values given here.
    """

    length_bias: float
    positivity_bias: float
    caution: float
    # Smallest and largest.
    noise: tuple[float, float]
    flag_accuracy: float


# Calibrated to the paper's agreement between two labelers: 72.6 ± 1.5% in the first group
# and 77.3 ± 1.3% in the second (section 3.4). A test checks both.
LABELER_GROUPS = {
    "labeler": LabelerGroup(
        length_bias=0.01,
        positivity_bias=0.08,
        caution=0.3,
        noise=(0.21, 0.36),
        flag_accuracy=0.95,
    ),
    "held-out": LabelerGroup(
        length_bias=0.0025,
        positivity_bias=0.05,
        caution=0.8,
        noise=(0.17, 0.31),
        flag_accuracy=0.9,
    ),
}


def create_labelers(seed: int, group: str, count: int) -> list[Labeler]:
    """Creates `count` labelers of a group, one of LABELER_GROUPS, for a seed."""
    rng = rng_for(seed, f"labelers {group}")
    mean = LABELER_GROUPS[group]
    labelers = []
    for i in range(count):
        # Keyword arguments are evaluated in this order, which is part of the data.
        labeler = Labeler(
            name=f"{group}-{i:02d}",
            length_bias=mean.length_bias * rng.uniform(0, 2),
            positivity_bias=mean.positivity_bias * rng.uniform(0, 2),
            caution=float(np.clip(mean.caution + rng.uniform(-0.2, 0.2), 0, 1)),
            noise=rng.uniform(*mean.noise),
            flag_accuracy=mean.flag_accuracy,
        )
        labelers.append(labeler)
    return labelers


def ranks_from_utilities(utilities: list[float]) -> list[int]:
    """Converts perceived utilities to ranks from 1, the best.

    A response less than TIE_THRESHOLD below the next better one shares its rank, so ties
    can chain.
    """
    order = sorted(range(len(utilities)), key=lambda i: -utilities[i])
    ranks = [1] * len(utilities)
    for better, worse in itertools.pairwise(order):
        is_lower = utilities[better] - utilities[worse] >= TIE_THRESHOLD
        ranks[worse] = ranks[better] + is_lower
    return ranks


def rank_responses(
    labeler: Labeler, task: Task, responses: list[str], rng: np.random.Generator
) -> list[int]:
    """Returns the labeler's ranks of the responses to one prompt; 1 is the best."""
    # One draw of noise for each response, in the order in which they are given.
    utilities = []
    for response in responses:
        utilities.append(labeler.perceived_utility(task, response, rng))
    return ranks_from_utilities(utilities)
