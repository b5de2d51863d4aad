"""Curves over the steps of a run: over-optimization in PPO, overfitting in SFT."""

import dataclasses

import numpy as np

from instructax.report.judging import true_utilities
from instructax.report.logs import read_log
from instructax.report.results import (
    ExperimentResults,
    SizeResults,
    check_prompts,
    response_text,
)
from instructax.simulation.judge import judge


@dataclasses.dataclass(frozen=True)
class PpoCurve:
    """Metrics of a PPO run at its t logged iterations with samples."""

    sqrt_kl: np.ndarray  # f[t], √KL from the SFT policy
    utility: np.ndarray  # f[t], mean true utility of the iteration's samples
    scores: np.ndarray  # f[t], mean reward model score


def load_ppo_curve(
    results: ExperimentResults, size: SizeResults, run: str
) -> PpoCurve | None:
    """Reads the PPO run of a size in its folder `run`; None unless it has finished."""
    folder = size.folder / run
    if not (folder / "summary.json").exists():
        return None

    # A run logs some samples of some iterations; they are judged here for the first time.
    samples = read_log(folder / "samples.jsonl")
    prompts = [record["prompt"].strip() for record in samples]
    check_prompts(results.tasks, prompts, folder)
    tasks = [results.tasks[prompt] for prompt in prompts]
    judgements = []
    for task, record in zip(tasks, samples, strict=True):
        judgements.append(judge(task, response_text(record)))
    utility = true_utilities(tasks, judgements)  # f[number of samples]
    # i[number of samples]
    steps = np.array([record["step"] for record in samples])

    # A metric is null if it was not finite; such iterations are left out.
    sampled_steps = set(steps.tolist())
    lines = []
    for line in read_log(folder / "metrics.jsonl"):
        is_finite = line.get("kl") is not None and line.get("scores") is not None
        if line["step"] in sampled_steps and is_finite:
            lines.append(line)
    if not lines:
        return None

    # All three are f[t], over the kept lines of the log.
    return PpoCurve(
        # An estimate of the KL can be slightly negative near the start.
        sqrt_kl=np.sqrt([max(line["kl"], 0.0) for line in lines]),
        utility=np.array([utility[steps == line["step"]].mean() for line in lines]),
        scores=np.array([line["scores"] for line in lines]),
    )


def best_of_n_kl(n: int) -> float:
    """Returns an upper bound of the KL of best-of-n from the sampling policy, in nats."""
    return float(np.log(n) - (n - 1) / n)


def load_overfitting(size: SizeResults) -> tuple[dict[int, float], dict[int, np.ndarray]]:
    """Reads the SFT run that trains for many epochs, and its evaluation.

    Returns:
      Step → validation loss, in nats per token.
      Evaluated step → reward model score of each response, f[n]; the prompts are the same
      at every step. Both are {} unless the run and its evaluation have finished.
    """
    run = size.folder / "sft-overfit"
    evaluation = size.folder / "evaluate-overfit"
    for folder in (run, evaluation):
        if not (folder / "summary.json").exists():
            return {}, {}

    # The loss is logged at every evaluation step of training.
    losses = {}
    for line in read_log(run / "metrics.jsonl"):
        if "demonstrations_loss" in line:
            losses[line["step"]] = line["demonstrations_loss"]

    # The evaluation names each checkpoint of the run as a policy, "step 300".
    scores: dict[int, list[float]] = {}
    for record in read_log(evaluation / "samples.jsonl"):
        if record["policy"].startswith("step "):
            step = int(record["policy"].removeprefix("step "))
            scores.setdefault(step, []).append(record["score"])
    return losses, {step: np.array(scores[step]) for step in sorted(scores)}
