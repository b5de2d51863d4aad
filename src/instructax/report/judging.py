"""What the world and its simulated labelers say of the responses: arrays over the prompts,
paired between policies.

Departure from the paper: a prompt's labeler forms one opinion of each different response,
whoever gave it, and prefers by those opinions, where the paper's labelers are shown one
pair at a time. Equal responses are thus at ½ exactly.
"""

import dataclasses
import itertools

import numpy as np

from instructax.evals.intervals import (
    Estimate,
    mean_estimate,
    share_difference,
    share_estimate,
)
from instructax.report.results import (
    Experiment,
    Record,
    Size,
    check_prompts,
    read_lines,
    response_of,
)
from instructax.simulation.judge import Judgement, judge
from instructax.simulation.labelers import GROUPS, TIE, draw_labelers, grade
from instructax.simulation.lexicon import generator
from instructax.simulation.prompts import LABELER_COUNT
from instructax.simulation.task_metrics import Figure
from instructax.simulation.tasks import Task

TRUTH, LABELER, HELD_OUT = (
    "true utility",
    "labeler",
    "held-out",
)  # by whom a win rate is; the latter two are GROUPS
FLAGS = (
    "attempts",
    "constraint",
    "hallucinates",
    "appropriate",
    "truthful",
)  # of Judgement


@dataclasses.dataclass(frozen=True)
class Judged:
    """One policy's responses, judged; every array is over the prompts."""

    scores: np.ndarray  # f[n], the reward model's
    kl: np.ndarray  # f[n], log(π / π_ref) of the response
    flags: dict[str, np.ndarray]  # name in FLAGS → b[n], as training labelers set them
    opinions: dict[
        str, np.ndarray
    ]  # TRUTH, LABELER, HELD_OUT → f[n], how good the response is
    likert: dict[str, np.ndarray]  # LABELER, HELD_OUT → f[n], grades from 1 to 7


@dataclasses.dataclass(frozen=True)
class Reading:
    """An experiment and what is said of its responses."""

    experiment: Experiment
    answers: dict[tuple[str, str], Judged]  # (size, policy) →
    gpt: "Reading | None" = None  # the same on prompts of the GPT-3 distribution

    @property
    def names(self) -> list[str]:
        """The sizes, from the smallest to the largest."""
        return [size.name for size in self.experiment.sizes]

    def wins(
        self, size: str, policy: str, by: str, than: tuple[str, str] | None = None
    ) -> np.ndarray | None:
        """Whether each response is better than that of `than`, by default the largest SFT:
        f[n] of 0, ½ (a tie) and 1; None without such a policy."""
        ours, theirs = (
            self.answers.get((size, policy)),
            self.answers.get(than or (self.names[-1], "SFT")),
        )
        if ours is None or theirs is None:
            return None
        return preferences(
            ours.opinions[by], theirs.opinions[by], tie=0.0 if by == TRUTH else TIE
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """A PPO run, iteration by iteration."""

    distance: np.ndarray  # f[t], √KL from the SFT policy
    utility: np.ndarray  # f[t], mean true utility of the iteration's samples
    scores: np.ndarray  # f[t], mean score


def preferences(ours: np.ndarray, theirs: np.ndarray, tie: float) -> np.ndarray:
    """1 where `ours` f[n] is better than `theirs` f[n], ½ where they are equal or less than
    `tie` apart, else 0."""
    gap = ours - theirs
    return np.where((gap == 0) | (np.abs(gap) < tie), 0.5, (gap > 0).astype(float))


def wins_estimate(reading: Reading, size: str, policy: str, by: str) -> Estimate | None:
    """The win rate against the largest SFT."""
    wins = reading.wins(size, policy, by)
    return None if wins is None else mean_estimate(wins)


def likert_estimate(reading: Reading, size: str, policy: str, by: str) -> Estimate | None:
    """The mean grade of a group of labelers."""
    answers = reading.answers.get((size, policy))
    return None if answers is None else mean_estimate(answers.likert[by])


def asked_about(experiment: Experiment, flag: str) -> np.ndarray:
    """The prompts that a flag says something of: b[n]."""
    tasks = [experiment.tasks[prompt] for prompt in experiment.prompts]
    asked = {
        "constraint": [task.constrained for task in tasks],
        "hallucinates": [task.closed for task in tasks],
    }
    return np.array(asked.get(flag, [True] * len(tasks)))


def flag_estimate(reading: Reading, policy: str, flag: str) -> Estimate | None:
    """Share of the prompts that `flag` speaks of for which it is set, sizes pooled; prompts
    are the units."""
    per_size = [
        answers.flags[flag]
        for (_, name), answers in reading.answers.items()
        if name == policy
    ]
    if not per_size:
        return None
    return share_estimate(np.mean(per_size, axis=0)[asked_about(reading.experiment, flag)])


def mean_of(estimates: list[Estimate]) -> Estimate:
    """The mean of independent estimates; its interval reaches as far to each side as theirs
    in quadrature, by their number."""
    n, value = len(estimates), sum(x.value for x in estimates) / len(estimates)
    below, above = (
        np.sqrt(
            np.sum(
                [((x.value - x.low) ** 2, (x.high - x.value) ** 2) for x in estimates],
                axis=0,
            )
        )
        / n
    )
    return Estimate(
        float(value),
        float(value - below),
        float(value + above),
        sum(x.count for x in estimates),
    )


def minus(ours: Estimate | None, theirs: Estimate | None) -> Estimate | None:
    """The difference of independent estimates; None if either is missing. To each side its
    interval reaches as far as theirs in quadrature: below by what ours may be less and
    theirs more (Newcombe, 1998)."""
    if ours is None or theirs is None:
        return None
    value = ours.value - theirs.value
    below = np.hypot(ours.value - ours.low, theirs.high - theirs.value)
    above = np.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Estimate(
        value, float(value - below), float(value + above), min(ours.count, theirs.count)
    )


def change(ours: Figure | None, theirs: Figure | None) -> Estimate | None:
    """The difference of two figures of a public task, paired by item where both are means
    over the same items; None if either is missing."""
    if ours is None or theirs is None:
        return None
    x, y = ours.values, theirs.values
    if x is None or y is None:
        return minus(ours.estimate, theirs.estimate)
    return share_difference(x, y) if x.dtype == bool else mean_estimate(x - y)


def read(experiment: Experiment) -> Reading:
    """Judges every response; the same experiment is always judged the same."""
    gpt = Reading(experiment.gpt, _judged(experiment.gpt)) if experiment.gpt else None
    return Reading(experiment, _judged(experiment), gpt)


def _judged(experiment: Experiment) -> dict[tuple[str, str], Judged]:
    """(size, policy) → its responses, judged."""
    tasks = [experiment.tasks[prompt] for prompt in experiment.prompts]
    return {
        (size.name, policy): answers_of(tasks, records, experiment.seed)
        for size in experiment.sizes
        for policy, records in size.samples.items()
    }


def answers_of(tasks: list[Task], records: list[Record], seed: int) -> Judged:
    """One policy's responses, judged: prompt i by labeler i modulo their number, in each
    group. What a labeler's noise adds is a function of the prompt and the response."""
    texts = [response_of(record) for record in records]
    found = [judge(task, text) for task, text in zip(tasks, texts, strict=True)]
    opinions, likert = {TRUTH: utilities(tasks, found)}, {}
    flags = []
    for group in (LABELER, HELD_OUT):
        said = []
        crew = itertools.cycle(draw_labelers(seed, group, LABELER_COUNT))
        for labeler, task, text, judgement in zip(crew, tasks, texts, found, strict=False):
            rng = generator(seed, f"report {group} {task.prompt} {text}")
            liked = labeler.opinion(task, text, rng)
            said.append((liked, grade(liked)))
            if group == LABELER:
                flags.append(labeler.flags(judgement, rng))
        opinions[group], likert[group] = np.array(said, float).reshape(-1, 2).T
    return Judged(
        scores=np.array([record["score"] for record in records], float),
        kl=np.array([record["kl"] for record in records], float),
        flags={flag: np.array([answers[flag] for answers in flags]) for flag in FLAGS},
        opinions=opinions,
        likert=likert,
    )


def utilities(tasks: list[Task], found: list[Judgement]) -> np.ndarray:
    """The true utility at the caution of the training labelers: f[n]."""
    caution = GROUPS[LABELER].caution
    return np.array(
        [
            judgement.utility(task.harmful, caution)
            for task, judgement in zip(tasks, found, strict=True)
        ]
    )


def best_of_kl(n: int) -> float:
    """The most that the best of n samples can be away from the policy that drew them, in
    nats."""
    return float(np.log(n) - (n - 1) / n)


def curve_of(experiment: Experiment, size: Size, folder: str) -> Curve | None:
    """The finished PPO run in `folder` of a size; None without one."""
    if not (size.folder / folder / "summary.json").exists():
        return None
    samples = read_lines(size.folder / folder / "samples.jsonl")
    prompts = [record["prompt"].strip() for record in samples]
    check_prompts(experiment.tasks, prompts, size.folder / folder)
    tasks = [experiment.tasks[prompt] for prompt in prompts]
    utility = utilities(
        tasks,
        [judge(t, response_of(record)) for t, record in zip(tasks, samples, strict=True)],
    )
    steps = np.array([record["step"] for record in samples])
    sampled = set(steps.tolist())
    lines = [
        line
        for line in read_lines(size.folder / folder / "metrics.jsonl")
        if line["step"] in sampled
        and line.get("kl") is not None
        and line.get("scores") is not None
    ]
    if not lines:
        return None
    return Curve(
        distance=np.sqrt([max(line["kl"], 0.0) for line in lines]),
        utility=np.array([utility[steps == line["step"]].mean() for line in lines]),
        scores=np.array([line["scores"] for line in lines]),
    )
