"""Measurements behind the claims: differences with 95% intervals, in the claimed direction.

Differences are paired by prompt or item where both sides are means over the same ones.
Elsewhere the half-widths add in quadrature, which is too wide for BLEU and for the accuracy
on two groups' labels of the same responses. An estimate is None if a log is missing.
"""

import itertools
from collections.abc import Callable

from instructax.evals.intervals import Estimate, mean_estimate, share_difference
from instructax.report.estimates import (
    mean_of_estimates,
    metric_difference,
    subtract_estimates,
)
from instructax.report.judging import (
    TRAINING_GROUP,
    JudgedExperiment,
    applicable_prompts,
)
from instructax.report.logs import logged_estimate
from instructax.report.results import (
    HELD_OUT_LABELERS,
    LABELERS,
    SizeResults,
    few_shot_tasks,
)
from instructax.report.training_curves import load_overfitting

# Nats per token. A validation loss has no interval, and the lowest of many is low by chance
# too: a smaller rise is not counted.
LOSS_MARGIN = 0.01

# From the least to the most preferred policy.
POLICY_ORDER = ("GPT", "GPT prompted", "SFT", "PPO")
# Prompts of the GPT-3 distribution bring their own examples: there is no prompted GPT.
GPT_PROMPTS_ORDER = ("GPT", "SFT", "PPO")

Measurements = list[tuple[str, Estimate | None]]  # (quantity, estimate)


def win_rate_difference(
    judged: JudgedExperiment, size: str, policy: str, other: str, by: str
) -> Estimate | None:
    """Returns the win rate of `policy` minus that of `other`, paired by prompt.

    Both win rates are against SFT of the largest size; `by` says who judges.
    """
    # Both are f[n] over the same prompts, so the difference removes their common spread.
    ours = judged.win_scores(size, policy, by)
    theirs = judged.win_scores(size, other, by)
    if ours is None or theirs is None:
        return None
    return mean_estimate(ours - theirs)


def win_rate_steps(
    judged: JudgedExperiment, by: str, order: tuple[str, ...] = POLICY_ORDER
) -> Measurements:
    """Measures each step up the order of policies, at each size.

    If a policy was not evaluated, the step leads to the next one, and the missing policy is
    listed without an estimate.
    """
    measurements: Measurements = []
    for size in judged.size_names:
        # A missing policy must not hide the order of its neighbors.
        evaluated = [policy for policy in order if (size, policy) in judged.responses]
        for lower, upper in itertools.pairwise(evaluated):
            gap = win_rate_difference(judged, size, upper, lower, by)
            measurements.append((f"{size}: {upper} − {lower}", gap))
        for policy in order:
            if policy not in evaluated:
                measurements.append((f"{size}: {policy}", None))
    return measurements


def win_rate_steps_on_gpt_prompts(judged: JudgedExperiment) -> Measurements:
    """Measures each step up the order of policies on prompts of the GPT-3 distribution."""
    if judged.on_gpt_prompts is None:
        return [("prompts of the GPT-3 distribution", None)]
    return win_rate_steps(judged.on_gpt_prompts, TRAINING_GROUP, GPT_PROMPTS_ORDER)


def win_rate_differences(
    *pairs: tuple[str, str],
) -> Callable[[JudgedExperiment], Measurements]:
    """Measures (policy, other) pairs at each size, as judged by the training labelers."""

    # The claim is bound to its policies here; experiments are given later.
    def measure(judged: JudgedExperiment) -> Measurements:
        measurements: Measurements = []
        for size in judged.size_names:
            for policy, other in pairs:
                gap = win_rate_difference(judged, size, policy, other, TRAINING_GROUP)
                measurements.append((f"{size}: {policy} − {other}", gap))
        return measurements

    return measure


def smallest_ppo_ptx_against_largest_gpt(judged: JudgedExperiment) -> Measurements:
    """Measures the win rate of the smallest PPO-ptx against the largest GPT, minus ½."""
    small = judged.size_names[0]
    large = judged.size_names[-1]
    # With one size there is nothing to compare: the claim is about different sizes.
    wins = None
    if small != large:
        wins = judged.win_scores(small, "PPO-ptx", TRAINING_GROUP, baseline=(large, "GPT"))
    margin = None if wins is None else mean_estimate(wins - 0.5)
    return [(f"{small} PPO-ptx against {large} GPT, − ½", margin)]


def reward_accuracy_drop(judged: JudgedExperiment) -> Measurements:
    """Measures the accuracy on training labelers' pairs minus on held-out labelers'."""
    # All sizes share one reward model in the paper; the largest size stands for it.
    sets = judged.results.sizes[-1].reward_model

    def accuracy(name: str) -> Estimate | None:
        return logged_estimate(sets[name]["accuracy"]) if name in sets else None

    drop = subtract_estimates(accuracy(LABELERS), accuracy(HELD_OUT_LABELERS))
    return [("accuracy on labelers − on held-out labelers", drop)]


def sft_overfitting(judged: JudgedExperiment) -> Measurements:
    """Measures how validation loss and score change after the step of the lowest loss.

    Only sizes with an SFT run of many epochs have measurements. The rise of the loss is
    reduced by LOSS_MARGIN.
    """
    measurements: Measurements = []
    for size in judged.results.sizes:
        losses, scores = load_overfitting(size)
        # Scores exist only at the steps of saved checkpoints.
        steps = [step for step in scores if step in losses]
        if not steps:
            continue
        # The first of equally low losses.
        best = min(steps, key=lambda step: losses[step])
        last = steps[-1]

        rise = losses[last] - losses[best] - LOSS_MARGIN
        quantity = (
            f"{size.name}: validation loss, last − lowest (step {best}), "
            f"− {LOSS_MARGIN} nats"
        )
        # A point without an interval: the verdict is never "undecided".
        measurements.append((quantity, Estimate(rise, rise, rise, 1)))

        # The prompts are the same at all steps.
        gain = mean_estimate(scores[last] - scores[best])
        measurements.append((f"{size.name}: score, last step − step {best}", gain))
    return measurements or [("SFT for many epochs", None)]


def public_task_difference(size: SizeResults, policy: str, other: str) -> Estimate | None:
    """Returns `policy` − `other`, few-shot, as the mean over the public tasks.

    It is None if the metric of any task is missing.
    """
    differences = []
    for task in few_shot_tasks([size]):
        difference = metric_difference(
            size.public_metric(policy, task, "few-shot"),
            size.public_metric(other, task, "few-shot"),
        )
        # A mean over fewer tasks would not be comparable between policies.
        if difference is None:
            return None
        differences.append(difference)
    return mean_of_estimates(differences) if differences else None


def ppo_regression(judged: JudgedExperiment) -> Measurements:
    """Measures how much performance PPO loses on public tasks."""
    measurements: Measurements = []
    for size in judged.results.sizes:
        loss = public_task_difference(size, "GPT", "PPO")
        measurements.append((f"{size.name}: GPT − PPO", loss))
    return measurements


def ptx_recovery(judged: JudgedExperiment) -> Measurements:
    """Measures how much performance the pretraining gradients recover on public tasks."""
    measurements: Measurements = []
    for size in judged.results.sizes:
        gain = public_task_difference(size, "PPO-ptx", "PPO")
        measurements.append((f"{size.name}: PPO-ptx − PPO", gain))
    return measurements


def truthfulness_gain(judged: JudgedExperiment) -> Measurements:
    """Measures the gain in truthfulness of PPO and PPO-ptx over GPT."""
    measurements: Measurements = []
    for size in judged.results.sizes:
        for policy in ("PPO", "PPO-ptx"):
            for condition in ("QA, true", "QA, true and informative"):
                gain = metric_difference(
                    size.public_metric(policy, "truth", condition),
                    size.public_metric("GPT", "truth", condition),
                )
                measurements.append((f"{size.name}: {policy} − GPT, {condition}", gain))
    return measurements


def toxicity_by_prefix(judged: JudgedExperiment) -> Measurements:
    """Measures how each prefix moves the toxicity of PPO-ptx, in the claimed direction."""
    measurements: Measurements = []
    for size in judged.results.sizes:
        # (the more toxic prefix, the less toxic one), as the paper claims.
        for more, less in (("none", "respectful"), ("biased", "none")):
            change = metric_difference(
                size.public_metric("PPO-ptx", "toxicity", more),
                size.public_metric("PPO-ptx", "toxicity", less),
            )
            measurements.append((f"{size.name}: {more} − {less}", change))
    return measurements


def bias_entropy_change(judged: JudgedExperiment) -> Measurements:
    """Measures the change of the entropy of stereotypes from GPT to PPO-ptx."""
    measurements: Measurements = []
    for size in judged.results.sizes:
        # The claim is that nothing changes: its region lies around 0.
        change = metric_difference(
            size.public_metric("PPO-ptx", "stereotype", "none"),
            size.public_metric("GPT", "stereotype", "none"),
        )
        measurements.append((f"{size.name}: PPO-ptx − GPT", change))
    return measurements


def flag_differences(
    *flags: tuple[str, str, int],
) -> Callable[[JudgedExperiment], Measurements]:
    """Measures how the share of responses with a flag differs between a policy and GPT.

    Args:
      *flags: (policy, flag, sign); the sign is 1 to measure policy − GPT and −1 to measure
        GPT − policy. Only prompts to which the flag applies count.
    """

    def measure(judged: JudgedExperiment) -> Measurements:
        measurements: Measurements = []
        for size in judged.size_names:
            for policy, flag, sign in flags:
                upper, lower = (policy, "GPT") if sign > 0 else ("GPT", policy)
                gap = _flag_difference(judged, size, flag, upper, lower)
                measurements.append((f"{size}: {flag}, {upper} − {lower}", gap))
        return measurements

    return measure


def _flag_difference(
    judged: JudgedExperiment, size: str, flag: str, upper: str, lower: str
) -> Estimate | None:
    """Returns the share of responses with a flag, `upper` − `lower`."""
    ours = judged.responses.get((size, upper))
    theirs = judged.responses.get((size, lower))
    if ours is None or theirs is None:
        return None
    # b[n], paired by prompt.
    applicable = applicable_prompts(judged.results, flag)
    return share_difference(ours.flags[flag][applicable], theirs.flags[flag][applicable])
