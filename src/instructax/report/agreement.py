"""How often two labelers order the same responses alike (the paper's section 3.4), among
what policies answered."""

import itertools
from collections.abc import Mapping

import numpy as np

from instructax.evals.intervals import Estimate, ratio_estimate
from instructax.report.judging import HELD_OUT, LABELER
from instructax.report.results import Experiment, response_of
from instructax.simulation.labelers import Labeler, draw_labelers, rank
from instructax.simulation.lexicon import generator
from instructax.simulation.prompts import LABELER_COUNT
from instructax.simulation.tasks import Task

PAIRS = {
    "training labelers": (LABELER, LABELER),
    "held-out labelers": (HELD_OUT, HELD_OUT),
    "a training and a held-out labeler": (LABELER, HELD_OUT),
}  # the groups of the two labelers
Asked = tuple[Task, list[str]]  # a task and different responses to it
Agreement = tuple[
    Estimate, int
]  # share ordered alike, and the pairs that both labelers order


def agreements(experiment: Experiment) -> dict[str, Agreement]:
    """The agreement of each of PAIRS on the evaluated responses; the same each time for the
    same logs."""
    crews = {
        group: draw_labelers(experiment.seed, group, LABELER_COUNT)
        for group in (LABELER, HELD_OUT)
    }
    return agreements_on(
        responses_of(experiment), crews, generator(experiment.seed, "report agreement")
    )


def responses_of(experiment: Experiment) -> list[Asked]:
    """What all policies of the largest size answered to each prompt; what several of them
    said stands once."""
    policies = experiment.sizes[-1].samples.values()
    return [
        (
            experiment.tasks[prompt],
            list(dict.fromkeys(response_of(record).strip() for record in records)),
        )
        for prompt, *records in zip(experiment.prompts, *policies, strict=True)
    ]


def agreements_on(
    asked: list[Asked], crews: Mapping[str, list[Labeler]], rng: np.random.Generator
) -> dict[str, Agreement]:
    """Of each of PAIRS the share of the pairs of responses that both labelers order
    strictly which they order alike.

    Two labelers of each group, drawn anew for each prompt, rank its responses; intervals
    are over prompts.
    """
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in PAIRS}
    for task, responses in asked:
        ranks = {
            group: [
                rank(crew[i], task, responses, rng) for i in rng.permutation(len(crew))[:2]
            ]
            for group, crew in crews.items()
        }
        for name, (first, second) in PAIRS.items():
            counts[name].append(alike(ranks[first][0], ranks[second][1]))
    found = {
        name: np.array(pairs, float).reshape(-1, 2).T for name, pairs in counts.items()
    }
    return {
        name: (ratio_estimate(same, both), int(both.sum()))
        for name, (same, both) in found.items()
    }


def alike(first: list[int], second: list[int]) -> tuple[int, int]:
    """(pairs that both ranks order alike, pairs that neither leaves as a tie)."""
    strict = [
        (first[i] < first[j]) == (second[i] < second[j])
        for i, j in itertools.combinations(range(len(first)), 2)
        if first[i] != first[j] and second[i] != second[j]
    ]
    return sum(strict), len(strict)
