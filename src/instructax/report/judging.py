"""Judgements of all responses by the world and its simulated labelers.

Judgements are arrays over the prompts, so that policies can be compared prompt by prompt.

Departure from the paper: the labeler of a prompt forms one opinion of each distinct
response, whichever policies gave it, and preferences follow from these opinions. The
paper's labelers are shown one pair at a time. Equal responses therefore tie exactly.
"""

import dataclasses
import itertools

import numpy as np

from instructax.evals.intervals import Estimate, mean_estimate, share_estimate
from instructax.report.logs import JsonObject
from instructax.report.results import ExperimentResults, response_text
from instructax.simulation.judge import Judgement, judge, likert_grade
from instructax.simulation.labelers import LABELER_GROUPS, TIE_THRESHOLD, create_labelers
from instructax.simulation.lexicon import rng_for
from instructax.simulation.prompts import LABELERS_PER_GROUP
from instructax.simulation.tasks import Task

# Who judges: the world itself, or one of the labelers' LABELER_GROUPS.
TRUE_UTILITY = "true utility"
TRAINING_GROUP = "labeler"
HELD_OUT_GROUP = "held-out"

# Yes-no questions of the paper's table 3, as named in `Judgement`.
FLAGS = ("attempts", "constraint", "hallucinates", "appropriate", "truthful")


@dataclasses.dataclass(frozen=True)
class JudgedResponses:
    """Judgements of the responses of one policy; n is the number of prompts."""

    scores: np.ndarray  # f[n], of the reward model
    kl: np.ndarray  # f[n], log(π / π_SFT) of the whole response
    flags: dict[str, np.ndarray]  # one of FLAGS → b[n], as set by the training labelers
    opinions: dict[str, np.ndarray]  # TRUE_UTILITY or group → f[n], how good it is
    likert: dict[str, np.ndarray]  # group → f[n], grades from 1 to 7


@dataclasses.dataclass(frozen=True)
class JudgedExperiment:
    """An experiment and the judgements of its responses."""

    results: ExperimentResults
    responses: dict[tuple[str, str], JudgedResponses]  # keyed by (size, policy)
    # The same sizes, evaluated on prompts of the GPT-3 distribution.
    on_gpt_prompts: "JudgedExperiment | None" = None

    @property
    def size_names(self) -> list[str]:
        """The sizes, from the smallest to the largest."""
        return [size.name for size in self.results.sizes]

    def win_scores(
        self, size: str, policy: str, by: str, baseline: tuple[str, str] | None = None
    ) -> np.ndarray | None:
        """Compares the responses of a policy with those of a baseline, prompt by prompt.

        Args:
          size: model size of the policy.
          policy: one of POLICIES.
          by: who judges: TRUE_UTILITY, TRAINING_GROUP or HELD_OUT_GROUP.
          baseline: size and policy to compare with; by default SFT of the largest size.

        Returns:
          f[n] with 1 for a win, ½ for a tie and 0 for a loss; None if either was not
          evaluated.
        """
        ours = self.responses.get((size, policy))
        theirs = self.responses.get(baseline or (self.size_names[-1], "SFT"))
        if ours is None or theirs is None:
            return None
        # The world distinguishes any two utilities; labelers do not.
        tie = 0.0 if by == TRUE_UTILITY else TIE_THRESHOLD
        return compare_utilities(ours.opinions[by], theirs.opinions[by], tie)


def compare_utilities(ours: np.ndarray, theirs: np.ndarray, tie: float) -> np.ndarray:
    """Returns 1 where `ours` f[n] is better than `theirs` f[n], ½ for a tie, else 0.

    Utilities tie if they are equal or less than `tie` apart.
    """
    gap = ours - theirs
    # Equal utilities tie even if `tie` is 0.
    is_tie = (gap == 0) | (np.abs(gap) < tie)
    return np.where(is_tie, 0.5, (gap > 0).astype(float))


def win_rate_estimate(
    judged: JudgedExperiment, size: str, policy: str, by: str
) -> Estimate | None:
    """Returns the win rate against SFT of the largest size."""
    scores = judged.win_scores(size, policy, by)
    return None if scores is None else mean_estimate(scores)


def likert_estimate(
    judged: JudgedExperiment, size: str, policy: str, by: str
) -> Estimate | None:
    """Returns the mean grade that a group of labelers gives."""
    responses = judged.responses.get((size, policy))
    return None if responses is None else mean_estimate(responses.likert[by])


def applicable_prompts(results: ExperimentResults, flag: str) -> np.ndarray:
    """Returns a mask b[n] of the prompts to which a flag applies.

    Constraints apply to prompts that state one, hallucinations to closed tasks, all other
    flags to every prompt.
    """
    tasks = [results.tasks[prompt] for prompt in results.prompts]
    if flag == "constraint":
        return np.array([task.has_constraint for task in tasks])
    if flag == "hallucinates":
        return np.array([task.closed_domain for task in tasks])
    return np.ones(len(tasks), bool)


def flag_estimate(judged: JudgedExperiment, policy: str, flag: str) -> Estimate | None:
    """Returns the share of applicable prompts for which `flag` is set, pooled over sizes.

    The interval takes prompts as the independent units: each contributes its mean over
    sizes.
    """
    per_size = []  # b[n] of each size
    for (_, name), responses in judged.responses.items():
        if name == policy:
            per_size.append(responses.flags[flag])
    if not per_size:
        return None
    # The responses of several sizes to one prompt are not independent of each other.
    pooled = np.mean(per_size, axis=0)  # f[n]
    return share_estimate(pooled[applicable_prompts(judged.results, flag)])


def judge_experiment(results: ExperimentResults) -> JudgedExperiment:
    """Judges every response; the same results always give the same judgements."""
    on_gpt_prompts = None
    if results.on_gpt_prompts is not None:
        on_gpt_prompts = JudgedExperiment(
            results.on_gpt_prompts, _judge_policies(results.on_gpt_prompts)
        )
    return JudgedExperiment(results, _judge_policies(results), on_gpt_prompts)


def _judge_policies(results: ExperimentResults) -> dict[tuple[str, str], JudgedResponses]:
    tasks = [results.tasks[prompt] for prompt in results.prompts]
    # Policies in the order of tables, sizes from the smallest to the largest.
    judged = {}
    for size in results.sizes:
        for policy, records in size.samples.items():
            judged[size.name, policy] = judge_responses(tasks, records, results.seed)
    return judged


def judge_responses(
    tasks: list[Task], records: list[JsonObject], seed: int
) -> JudgedResponses:
    """Judges the responses of one policy.

    In each group, prompt i is judged by labeler i modulo the number of labelers. A
    labeler's noise is a function of the seed, the prompt and the response.

    Args:
      tasks: the task behind each prompt.
      records: the policy's sample for each prompt.
      seed: the seed of the world, from which the labelers are drawn.
    """
    # All lists and arrays below are over the prompts, in the order of `tasks`.
    texts = [response_text(record) for record in records]
    judgements = [judge(task, text) for task, text in zip(tasks, texts, strict=True)]
    opinions = {TRUE_UTILITY: true_utilities(tasks, judgements)}
    likert = {}
    answers = []  # of the training labelers, to all yes-no questions

    for group in (TRAINING_GROUP, HELD_OUT_GROUP):
        utilities = []
        grades = []
        labelers = itertools.cycle(create_labelers(seed, group, LABELERS_PER_GROUP))
        # `labelers` has no end: the prompts decide where this stops.
        for labeler, task, text, judgement in zip(
            labelers, tasks, texts, judgements, strict=False
        ):
            # The opinion of a response does not depend on the policy that gave it.
            rng = rng_for(seed, f"report {group} {task.prompt} {text}")
            utility = labeler.perceived_utility(task, text, rng)
            utilities.append(utility)
            grades.append(likert_grade(utility))
            # As in the paper, the flags are those of the training labelers.
            if group == TRAINING_GROUP:
                answers.append(labeler.label_flags(judgement, rng))
        opinions[group] = np.array(utilities, float)
        likert[group] = np.array(grades, float)

    flags = {}
    for flag in FLAGS:
        flags[flag] = np.array([answer[flag] for answer in answers])
    return JudgedResponses(
        scores=np.array([record["score"] for record in records], float),
        kl=np.array([record["kl"] for record in records], float),
        flags=flags,
        opinions=opinions,
        likert=likert,
    )


def true_utilities(tasks: list[Task], judgements: list[Judgement]) -> np.ndarray:
    """Returns the true utility of each response, f[n].

    Harmlessness is weighed against helpfulness as the training labelers do on average.
    """
    caution = LABELER_GROUPS[TRAINING_GROUP].caution
    utilities = []
    for task, judgement in zip(tasks, judgements, strict=True):
        utilities.append(judgement.utility(task.harmful, caution))
    return np.array(utilities)
