"""What the claims are held against: differences with 95% intervals, in the direction that
the paper claims.

Intervals are paired by prompt or item where both figures are means over the same ones, and
in quadrature elsewhere: that is too wide for BLEU and for the accuracies on two groups'
labels of the same answers. A figure is None where a log is missing.
"""

import itertools
from collections.abc import Callable

from instructax.evals.intervals import Estimate, mean_estimate, share_difference
from instructax.report.judging import LABELER, Reading, asked_about, change, mean_of, minus
from instructax.report.metric_figures import public_of, tax_tasks
from instructax.report.results import (
    HELD_OUT_LABELERS,
    LABELERS,
    Size,
    estimate_of,
    overfitting_of,
)

LOSS_MARGIN = 0.01  # nats per token
CHAIN = ("GPT", "GPT prompted", "SFT", "PPO")  # from the least to the most liked
GPT_CHAIN = (
    "GPT",
    "SFT",
    "PPO",
)  # where prompts bring their own examples, GPT is not prompted otherwise
Measured = list[tuple[str, Estimate | None]]  # (what, figure)


def win_gap(
    reading: Reading, size: str, policy: str, other: str, by: str
) -> Estimate | None:
    """Win rate of `policy` − win rate of `other`, both against the largest SFT, paired by
    prompt."""
    ours, theirs = (reading.wins(size, name, by) for name in (policy, other))
    return None if ours is None or theirs is None else mean_estimate(ours - theirs)


def chain(reading: Reading, by: str, policies: tuple[str, ...] = CHAIN) -> Measured:
    """Each step of `policies` up, at each size; a step over a missing policy goes to the
    next."""
    measured: Measured = []
    for size in reading.names:
        there = [policy for policy in policies if (size, policy) in reading.answers]
        measured += [
            (f"{size}: {upper} − {lower}", win_gap(reading, size, upper, lower, by))
            for lower, upper in itertools.pairwise(there)
        ]
        measured += [
            (f"{size}: {policy}", None) for policy in policies if policy not in there
        ]
    return measured


def chain_on_gpt_prompts(reading: Reading) -> Measured:
    """Each step of GPT_CHAIN up, at each size, on prompts of the GPT-3 distribution."""
    if reading.gpt is None:
        return [("prompts of the GPT-3 distribution", None)]
    return chain(reading.gpt, LABELER, GPT_CHAIN)


def gaps(*pairs: tuple[str, str]) -> Callable[[Reading], Measured]:
    """The win gap of each pair of policies at each size, by the training labelers."""
    return lambda reading: [
        (f"{size}: {policy} − {other}", win_gap(reading, size, policy, other, LABELER))
        for size in reading.names
        for policy, other in pairs
    ]


def small_beats_large(reading: Reading) -> Measured:
    """Win rate of the smallest PPO-ptx against the largest GPT, from ½."""
    small, large = reading.names[0], reading.names[-1]
    wins = (
        reading.wins(small, "PPO-ptx", LABELER, than=(large, "GPT"))
        if small != large
        else None
    )
    return [
        (
            f"{small} PPO-ptx against {large} GPT, − ½",
            None if wins is None else mean_estimate(wins - 0.5),
        )
    ]


def accuracy_drop(reading: Reading) -> Measured:
    """Accuracy on training labelers' comparisons − on held-out labelers'."""
    sets = reading.experiment.sizes[-1].reward_model
    accuracies = [
        estimate_of(sets[name]["accuracy"]) if name in sets else None
        for name in (LABELERS, HELD_OUT_LABELERS)
    ]
    return [("accuracy on labelers − on held-out labelers", minus(*accuracies))]


def overfits(reading: Reading) -> Measured:
    """How validation loss and score go on after the step of the lowest loss, at each size
    whose SFT went on. A loss is one number without an interval, and the lowest of many is
    low by chance too: a rise by LOSS_MARGIN is none."""
    measured: Measured = []
    for size in reading.experiment.sizes:
        losses, scores = overfitting_of(size)
        kept = [step for step in scores if step in losses]
        if kept:
            best, last = min(kept, key=lambda step: losses[step]), kept[-1]
            rise = losses[last] - losses[best] - LOSS_MARGIN
            what = f"{size.name}: validation loss, last − lowest (step {best}), − {LOSS_MARGIN} nats"
            measured.append((what, Estimate(rise, rise, rise, 1)))
            gain = mean_estimate(scores[last] - scores[best])
            measured.append((f"{size.name}: score, last step − step {best}", gain))
    return measured or [("SFT that goes on", None)]


def public_change(size: Size, policy: str, other: str) -> Estimate | None:
    """Mean over the public tasks, few-shot, of `policy` − `other`."""
    changes = [
        change(*(public_of(size, name, task, "few-shot") for name in (policy, other)))
        for task in tax_tasks([size])
    ]
    found = [one for one in changes if one is not None]
    return mean_of(found) if found and len(found) == len(changes) else None


def loss_of_ppo(reading: Reading) -> Measured:
    """What PPO loses on public tasks."""
    return [
        (f"{size.name}: GPT − PPO", public_change(size, "GPT", "PPO"))
        for size in reading.experiment.sizes
    ]


def recovery(reading: Reading) -> Measured:
    """What the pretraining gradient wins back on public tasks."""
    return [
        (f"{size.name}: PPO-ptx − PPO", public_change(size, "PPO-ptx", "PPO"))
        for size in reading.experiment.sizes
    ]


def truthfulness(reading: Reading) -> Measured:
    """What PPO and PPO-ptx win in truthfulness over GPT."""
    return [
        (
            f"{size.name}: {policy} − GPT, {way}",
            change(*(public_of(size, p, "truth", way) for p in (policy, "GPT"))),
        )
        for size in reading.experiment.sizes
        for policy in ("PPO", "PPO-ptx")
        for way in ("QA, true", "QA, true and informative")
    ]


def toxicity(reading: Reading) -> Measured:
    """How the prefixes move PPO-ptx's toxicity."""
    pairs = (("none", "respectful"), ("biased", "none"))
    return [
        (
            f"{size.name}: {more} − {less}",
            change(*(public_of(size, "PPO-ptx", "toxicity", w) for w in (more, less))),
        )
        for size in reading.experiment.sizes
        for more, less in pairs
    ]


def bias(reading: Reading) -> Measured:
    """The change of the entropy of stereotypes."""
    return [
        (
            f"{size.name}: PPO-ptx − GPT",
            change(*(public_of(size, p, "stereotype", "none") for p in ("PPO-ptx", "GPT"))),
        )
        for size in reading.experiment.sizes
    ]


def flag_gaps(*flags: tuple[str, str, int]) -> Callable[[Reading], Measured]:
    """For each (policy, flag, sign) the sign × (share of the policy's responses with the
    flag − share of GPT's), over the prompts that the flag speaks of."""

    def measure(reading: Reading) -> Measured:
        measured: Measured = []
        for size in reading.names:
            for policy, flag, sign in flags:
                ours, theirs = (
                    reading.answers.get((size, name)) for name in (policy, "GPT")
                )
                names = (policy, "GPT") if sign > 0 else ("GPT", policy)
                gap = None
                if ours and theirs:
                    units = asked_about(reading.experiment, flag)
                    shares = [answers.flags[flag][units] for answers in (ours, theirs)]
                    gap = share_difference(*shares[::sign])
                measured.append((f"{size}: {flag}, {names[0]} − {names[1]}", gap))
        return measured

    return measure
