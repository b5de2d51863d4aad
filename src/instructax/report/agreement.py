"""Agreement of two labelers on the responses of the evaluated policies (section 3.4)."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from instructax.evals.intervals import Estimate, ratio_estimate
from instructax.report.judging import HELD_OUT_GROUP, TRAINING_GROUP
from instructax.report.results import ExperimentResults, response_text
from instructax.simulation.labelers import Labeler, create_labelers, rank_responses
from instructax.simulation.lexicon import rng_for
from instructax.simulation.prompts import LABELERS_PER_GROUP
from instructax.simulation.tasks import Task

# The groups of the first and of the second labeler.
LABELER_PAIRS = {
    "training labelers": (TRAINING_GROUP, TRAINING_GROUP),
    "held-out labelers": (HELD_OUT_GROUP, HELD_OUT_GROUP),
    "a training and a held-out labeler": (TRAINING_GROUP, HELD_OUT_GROUP),
}

TaskResponses = tuple[Task, list[str]]  # a task and distinct responses to it


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often two labelers give the same order to a pair of responses."""

    share: Estimate  # of the pairs that both labelers order strictly
    pairs: int  # the number of those pairs


def labeler_agreement(results: ExperimentResults) -> dict[str, Agreement]:
    """Measures the agreement of LABELER_PAIRS on the evaluated responses.

    The same results always give the same agreement.
    """
    # The same people who judge the evaluation.
    labelers = {}
    for group in (TRAINING_GROUP, HELD_OUT_GROUP):
        labelers[group] = create_labelers(results.seed, group, LABELERS_PER_GROUP)
    # A generator of its own: the judgements do not change if this one draws more.
    rng = rng_for(results.seed, "report agreement")
    return measure_agreement(distinct_responses(results), labelers, rng)


def distinct_responses(results: ExperimentResults) -> list[TaskResponses]:
    """Returns the distinct responses to each prompt by the policies of the largest size."""
    policies = results.sizes[-1].samples.values()
    # Policies often give the same response, above all short ones: each counts once.
    all_responses = []
    for prompt, *records in zip(results.prompts, *policies, strict=True):
        texts = [response_text(record).strip() for record in records]
        distinct = list(dict.fromkeys(texts))  # in the order of the policies
        all_responses.append((results.tasks[prompt], distinct))
    return all_responses


def measure_agreement(
    task_responses: list[TaskResponses],
    labelers: Mapping[str, list[Labeler]],
    rng: np.random.Generator,
) -> dict[str, Agreement]:
    """Measures how often two labelers agree, for each of LABELER_PAIRS.

    Args:
      task_responses: tasks with the responses that labelers rank.
      labelers: group → its labelers, at least two.
      rng: draws two labelers of each group for each task, and their noise.

    Returns:
      Name in LABELER_PAIRS → agreement; intervals are over tasks.
    """
    # Per task: (pairs that both order alike, pairs that both order strictly).
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in LABELER_PAIRS}
    for task, responses in task_responses:
        # Two labelers of each group rank the responses; the pairs share these rankings.
        ranks = {}
        for group, members in labelers.items():
            drawn = rng.permutation(len(members))[:2]
            ranks[group] = [rank_responses(members[i], task, responses, rng) for i in drawn]
        for name, (first_group, second_group) in LABELER_PAIRS.items():
            # Within a group these are two different labelers.
            counts[name].append(
                count_agreements(ranks[first_group][0], ranks[second_group][1])
            )

    # The pairs of one task are not independent of each other: tasks are the units.
    agreements = {}
    for name, per_task in counts.items():
        alike, strict = np.array(per_task, float).reshape(-1, 2).T
        agreements[name] = Agreement(ratio_estimate(alike, strict), int(strict.sum()))
    return agreements


def count_agreements(first: list[int], second: list[int]) -> tuple[int, int]:
    """Compares two rankings of the same responses, pair by pair.

    Returns:
      The number of pairs that both rankings order alike, and the number of pairs that
      neither ranking leaves as a tie.
    """
    alike = 0
    strict = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        if first[i] == first[j] or second[i] == second[j]:
            continue
        strict += 1
        if (first[i] < first[j]) == (second[i] < second[j]):
            alike += 1
    return alike, strict
