"""The paper's claims, each checked against measured intervals.

A claim is data: what is measured, and the region in which the measurements lie if the claim
holds. A measurement supports the claim ("seen") if its whole 95% interval lies in the
region, and contradicts it ("not seen") if the whole interval lies outside. It is
"undecided" if the interval crosses the edge of the region, and there is "no data" if a log
is missing.
"""

import dataclasses
import math
from collections.abc import Callable

from instructax.evals.intervals import Estimate
from instructax.report import claim_measurements as measure
from instructax.report.claim_measurements import Measurements
from instructax.report.judging import HELD_OUT_GROUP, TRAINING_GROUP, JudgedExperiment

# In the order in which the page counts them.
VERDICTS = ("seen", "undecided", "not seen", "no data")

# Win rates closer than this count as equal: the half-width of the paper's own intervals.
WIN_MARGIN = 0.05
# The paper's "slightly" lower accuracy of the reward model is 2.8 points.
DROP_MARGIN = 0.05
# Bits: half of the change of entropy by SFT in the paper's table 14.
ENTROPY_MARGIN = 0.1

Region = tuple[float, float]  # an open interval
POSITIVE = (0.0, math.inf)
NOT_WORSE = (-WIN_MARGIN, math.inf)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is measured."""

    name: str
    text: str
    source: str  # section or figure of the paper
    quantity: str  # what is measured
    region: Region  # where all measurements lie if the claim holds
    measure: Callable[[JudgedExperiment], Measurements]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One measurement of a claim in one seed of the experiment."""

    run: str
    quantity: str
    estimate: Estimate | None
    verdict: str  # one of VERDICTS


def decide(estimate: Estimate | None, region: Region) -> str:
    """Returns the verdict of one measurement on the claim that it lies in `region`."""
    if estimate is None or math.isnan(estimate.value):
        return "no data"
    low, high = region
    # Without an upper edge, an interval without an upper end lies inside too.
    if low < estimate.low and (estimate.high < high or high == math.inf):
        return "seen"
    # An interval that only touches the edge from outside is outside.
    if estimate.high <= low or estimate.low >= high:
        return "not seen"
    return "undecided"


def overall_verdict(findings: list[Finding]) -> str:
    """Returns the verdict on a claim: the worst of its findings.

    A claim without findings has no data, and missing data outweighs what was measured
    unless that contradicts the claim.
    """
    verdicts = {finding.verdict for finding in findings}
    # From the worst to the best.
    for verdict in ("not seen", "no data", "undecided", "seen"):
        if verdict in verdicts:
            return verdict
    return "no data"


def check_claim(claim: Claim, experiments: list[JudgedExperiment]) -> list[Finding]:
    """Returns all findings on a claim, seed by seed."""
    findings = []
    for judged in experiments:
        for quantity, estimate in claim.measure(judged):
            verdict = decide(estimate, claim.region)
            findings.append(Finding(judged.results.name, quantity, estimate, verdict))
    return findings


_WIN_RATES = "difference of win rates against the largest SFT, by training labelers"
CLAIMS = (
    Claim(
        "C1",
        "GPT < GPT (prompted) < SFT < PPO, at every size",
        "4.1, fig. 1",
        _WIN_RATES,
        POSITIVE,
        lambda judged: measure.win_rate_steps(judged, TRAINING_GROUP),
    ),
    Claim(
        "C2",
        "PPO-ptx is preferred no less than PPO",
        "4.1, fig. 1",
        _WIN_RATES,
        NOT_WORSE,
        measure.win_rate_differences(("PPO-ptx", "PPO")),
    ),
    Claim(
        "C3",
        "The smallest PPO-ptx is preferred to the largest GPT",
        "1, 4.1",
        "win rate of PPO-ptx against GPT, by training labelers, − ½",
        POSITIVE,
        measure.smallest_ppo_ptx_against_largest_gpt,
    ),
    Claim(
        "C4",
        "Held-out labelers have the same order",
        "4.1, fig. 3",
        "difference of win rates against the largest SFT, by held-out labelers",
        POSITIVE,
        lambda judged: measure.win_rate_steps(judged, HELD_OUT_GROUP),
    ),
    # The drop must be there, and it must be small.
    Claim(
        "C5",
        "The reward model predicts held-out labelers slightly less well",
        "4.1",
        "accuracy on comparisons by training labelers − by held-out labelers",
        (0.0, DROP_MARGIN),
        measure.reward_accuracy_drop,
    ),
    # Both the loss and the score must rise.
    Claim(
        "C6",
        "SFT overfits in validation loss, while its score still rises",
        "3.5",
        "change from the step of the lowest validation loss to the last step",
        POSITIVE,
        measure.sft_overfitting,
    ),
    Claim(
        "C7",
        "PPO alone loses performance on public tasks",
        "4.2, fig. 29",
        "GPT − PPO, few-shot, mean over tasks (BLEU as a share)",
        POSITIVE,
        measure.ppo_regression,
    ),
    Claim(
        "C8",
        "Pretraining gradients recover performance on public tasks",
        "4.2, fig. 29",
        "PPO-ptx − PPO, few-shot, mean over tasks (BLEU as a share)",
        POSITIVE,
        measure.ptx_recovery,
    ),
    Claim(
        "C9",
        "PPO and PPO-ptx are more truthful than GPT",
        "4.2, fig. 6",
        "share of answers",
        POSITIVE,
        measure.truthfulness_gain,
    ),
    Claim(
        "C10",
        "A respectful prefix lowers PPO-ptx's toxicity, a biased one raises it",
        "4.2, fig. 7; E.3",
        "share of toxic continuations",
        POSITIVE,
        measure.toxicity_by_prefix,
    ),
    # A claim of no change: the interval must be narrow enough to show it.
    Claim(
        "C11",
        "Without a prefix, PPO-ptx is as biased as GPT",
        "4.2, fig. 32",
        "entropy of she/he, in bits",
        (-ENTROPY_MARGIN, ENTROPY_MARGIN),
        measure.bias_entropy_change,
    ),
    Claim(
        "C12",
        "FLAN/T0 is preferred less than SFT",
        "4.1, fig. 5",
        _WIN_RATES,
        POSITIVE,
        measure.win_rate_differences(("SFT", "FLAN/T0")),
    ),
    # The sign is −1: fewer hallucinations count for the policy.
    Claim(
        "C13",
        "PPO and PPO-ptx hallucinate less than GPT in closed tasks",
        "4.1, fig. 4",
        "share of responses to closed tasks that hallucinate",
        POSITIVE,
        measure.flag_differences(
            ("PPO", "hallucinates", -1), ("PPO-ptx", "hallucinates", -1)
        ),
    ),
    Claim(
        "C14",
        "PPO-ptx is more appropriate and keeps constraints more often than GPT",
        "4.1, fig. 4",
        "share of responses",
        POSITIVE,
        measure.flag_differences(
            ("PPO-ptx", "appropriate", 1), ("PPO-ptx", "constraint", 1)
        ),
    ),
    Claim(
        "C15",
        "The order is the same on prompts of the GPT-3 distribution",
        "4.1, fig. 3",
        "difference of win rates against the largest SFT on the same prompts, "
        "by training labelers",
        POSITIVE,
        measure.win_rate_steps_on_gpt_prompts,
    ),
)
