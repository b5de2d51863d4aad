"""Synthetic logs of an experiment that was never run.

The prompts are those of a small world; the responses are by simulated writers of a given
quality.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from instructax.simulation.files import recreate_prompts, recreate_tasks
from instructax.simulation.lexicon import rng_for
from instructax.simulation.tasks import Task, make_fact_task
from instructax.simulation.writers import WRITER_STYLES, corrupt, write_demonstration

LINES = {
    "documents": 4,
    "demonstrated_prompts": 4,
    "demonstrations": 4,
    "comparisons": 4,
    "prompts": 60,
    "gpt_prompts": 24,
    "public": 4,
}

# The probability of a perfect response at the smallest size; each larger size adds 0.08.
QUALITY = {
    "GPT": 0.0,
    "GPT prompted": 0.15,
    "SFT": 0.35,
    "best-of-n": 0.55,
    "PPO": 0.6,
    "PPO-ptx": 0.62,
    "FLAN/T0": 0.2,
}

# The policies that are evaluated on prompts of the GPT-3 distribution.
GPT_PROMPTS_POLICIES = ("GPT", "SFT", "PPO", "PPO-ptx")

# Public tasks that have a zero-shot and a few-shot form.
PUBLIC_TASKS = (
    "book",
    "background",
    "two_steps",
    "translation",
    "sentiment",
    "entailment",
    "pronoun",
    "completion",
)
# Policy → its few-shot accuracy on them at the smallest size.
PUBLIC_ACCURACY = {"GPT": 0.6, "SFT": 0.52, "PPO": 0.45, "PPO-ptx": 0.59, "FLAN/T0": 0.66}

MODEL = {
    "activation": "gelu",
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_layers": 2,
    "mlp_dim": 64,
    "max_length": 64,
    "positions": "rotary",
    "tied_embeddings": True,
    "vocab_size": 128,
    "embed_dim": 16,
}


def open_question(prompt: str, **changes: Any) -> Task:
    """Returns a task whose right answer is "Arden."."""
    facts = {"Mira": {"town": "Arden"}}
    return make_fact_task("open_qa", prompt, "Arden.", facts, [("Mira", "town")], **changes)


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one object per line, and creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON object, and creates the folder."""
    write_json_lines(path, [value])


def estimate(value: float, half_width: float = 0.02) -> dict[str, Any]:
    """Returns a logged estimate."""
    low = value - half_width
    high = value + half_width
    return {"value": value, "low": low, "high": high, "count": 100}


def share(value: float) -> dict[str, Any]:
    """Returns a logged share of 100 items.

    The first items are the true ones, so that the items of two policies are correlated.
    """
    num_true = round(100 * value)
    values = [1.0] * num_true + [0.0] * (100 - num_true)
    return estimate(num_true / 100, 0.1) | {"values": values}


def respond(task: Task, quality: float, rng: np.random.Generator) -> str:
    """Returns a perfect response with probability `quality`, else a sloppy, spoilt one."""
    if rng.random() < quality:
        return task.ideal
    return corrupt(write_demonstration(WRITER_STYLES["sloppy"], task, rng), rng)


def sample(
    policy: str, prompt: str, response: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Returns a line of an evaluation's `samples.jsonl`."""
    pieces = [word + " " for word in response.split()] + ["<|endoftext|>"]
    token_kl = [round(float(x), 4) for x in rng.normal(0.2, 1.0, len(pieces))]
    return {
        "step": 1,
        "policy": policy,
        "prompt": f"{prompt}\n\n",
        "response": f"{response}<|endoftext|>",
        "score": float(rng.normal(QUALITY.get(policy, 0.0), 0.3)),
        "kl": sum(token_kl),
        "tokens": len(pieces),
        "ended": True,
        "pieces": pieces,
        "token_kl": token_kl,
    }


def write_world(root: Path, seed: int = 0) -> dict[str, Task]:
    """Writes the config of the world, and returns its tasks by prompt."""
    config = {"seed": seed, "lines": LINES, "stage": "world", "vocab_size": 128}
    write_json(root / "world" / "config.json", config)
    write_json(root / "world" / "summary.json", {"stage": "world"})
    return recreate_tasks(root / "world")


def last_tasks(root: Path, prompt_set: str, count: int) -> dict[str, Task]:
    """Returns the last tasks of a set of prompts, by prompt."""
    simulated = recreate_prompts(root / "world", prompt_set)[-count:]
    return {prompt.task.prompt.strip(): prompt.task for prompt in simulated}


def write_evaluation(
    folder: Path,
    tasks: dict[str, Task],
    qualities: dict[str, float],
    width: int,
    run: str = "evaluate",
) -> None:
    """Writes the evaluation `run` of one size.

    Args:
      folder: The folder of the size.
      tasks: The evaluated prompts and their tasks.
      qualities: Policy → the probability of a perfect response.
      width: The width of the model.
      run: The name of the run's folder.
    """
    rng = rng_for(width, run)
    records = []
    for policy, quality in qualities.items():
        for prompt, task in tasks.items():
            records.append(sample(policy, prompt, respond(task, quality, rng), rng))
    write_json_lines(folder / run / "samples.jsonl", records)

    bins = []
    for predicted in (0.55, 0.65, 0.75, 0.85, 0.95):
        bins.append({"predicted": predicted, "share": predicted - 0.03, "pairs": 80})
    labelers = {
        "accuracy": estimate(0.72),
        "longer_wins": estimate(0.53),
        "pairs": 500,
        "calibration": bins,
    }
    held_out = labelers | {"accuracy": estimate(0.695, 0.005)}
    metrics = (
        "scores",
        "kl",
        "response_length",
        "ended_share",
        "text_loss",
        "proxy_win_rate",
    )
    policies = {}
    for policy, quality in qualities.items():
        policies[policy] = {name: estimate(quality) for name in metrics}
    summary = {
        "policies": policies,
        "reward_model": {"labelers": labelers, "held-out labelers": held_out},
    }
    write_json(folder / run / "summary.json", summary)
    config = {"model": MODEL | {"embed_dim": width}, "best_of": 16}
    write_json(folder / run / "config.json", config)


def write_reward_models(root: Path, accuracies: dict[str, float]) -> None:
    """Writes the summaries of runs of reward models."""
    for run, accuracy in accuracies.items():
        summary = {
            "stage": "reward_model",
            "step": 9,
            "validation_accuracy": accuracy,
            "validation_pairs": 480.0,
        }
        write_json(root / run / "summary.json", summary)


def write_ppo(folder: Path, tasks: dict[str, Task], iterations: int = 12) -> None:
    """Writes a PPO run whose score rises with the KL, while true utility turns down."""
    rng = rng_for(len(folder.name), "ppo")
    prompts = list(tasks)
    metrics = []
    samples = []
    for i in range(1, iterations + 1):
        metrics.append({"step": i, "kl": 0.3 * (i - 1), "scores": 0.1 * i})
        quality = 0.3 + 0.4 * np.sin(0.3 * i)
        for prompt in prompts[i : i + 8]:
            response = respond(tasks[prompt], quality, rng)
            record = {"step": i, "prompt": prompt, "response": response, "score": 0.0}
            samples.append(record)
    write_json_lines(folder / "metrics.jsonl", metrics)
    write_json_lines(folder / "samples.jsonl", samples)
    write_json(folder / "summary.json", {"stage": "ppo"})


def write_public_tasks(folder: Path, bonus: float) -> None:
    """Writes `tasks/summary.json` of one size; `bonus` is added to every accuracy."""
    policies = {}
    for policy, accuracy in PUBLIC_ACCURACY.items():
        few_shot = accuracy + bonus
        tasks: dict[str, Any] = {}
        for task in PUBLIC_TASKS:
            tasks[task] = {"zero-shot": share(few_shot - 0.1), "few-shot": share(few_shot)}
        # BLEU is logged in percent, and without values for each item.
        tasks["translation"] = {
            "zero-shot": estimate(100.0 * (few_shot - 0.1), 3.0),
            "few-shot": estimate(100.0 * few_shot, 3.0),
        }
        truthful = 0.4 if policy == "GPT" else 0.55
        tasks["truth"] = {
            "QA, true": share(truthful),
            "QA, true and informative": share(truthful),
        }
        tasks["toxicity"] = {
            "none": share(0.2),
            "respectful": share(0.1),
            "biased": share(0.5),
        }
        tasks["stereotype"] = {
            "none": estimate(0.7),
            "respectful": estimate(0.6),
            "biased": estimate(0.5),
        }
        policies[policy] = tasks
    write_json(folder / "tasks" / "summary.json", {"policies": policies})


def write_overfitting(folder: Path, losses: list[float], scores: list[float]) -> None:
    """Writes an SFT run for many epochs and its evaluation on ten prompts.

    The losses and scores are those at steps 100, 200, …
    """
    metrics: list[dict[str, Any]] = [{"step": 5, "loss": 1.0}]
    for i, loss in enumerate(losses, start=1):
        metrics.append({"step": 100 * i, "demonstrations_loss": loss})
    write_json_lines(folder / "sft-overfit" / "metrics.jsonl", metrics)

    score_by_policy = {"SFT": 0.0}
    for i, score in enumerate(scores, start=1):
        score_by_policy[f"step {100 * i}"] = score
    samples = []
    for policy, score in score_by_policy.items():
        for i in range(10):
            record = {"policy": policy, "prompt": str(i), "score": score + 0.1 * i}
            samples.append(record)
    write_json_lines(folder / "evaluate-overfit" / "samples.jsonl", samples)
    for run in ("sft-overfit", "evaluate-overfit"):
        write_json(folder / run / "summary.json", {"stage": run})


def write_family(root: Path, seed: int = 0, count: int = 40) -> Path:
    """Writes a whole experiment of three sizes, evaluated on `count` prompts."""
    tasks = write_world(root, seed)
    prompts = last_tasks(root, "prompts", count)
    gpt_prompts = last_tasks(root, "gpt_prompts", count)
    for i, size in enumerate(("micro", "milli", "centi")):
        folder = root / size
        width = 16 * (i + 1)
        qualities = {}
        for policy, quality in QUALITY.items():
            qualities[policy] = min(1.0, quality + 0.08 * i)
        write_evaluation(folder, prompts, qualities, width)
        on_gpt_prompts = {policy: qualities[policy] for policy in GPT_PROMPTS_POLICIES}
        write_evaluation(folder, gpt_prompts, on_gpt_prompts, width, "evaluate-gpt")
        for run in ("ppo", "ppo-ptx"):
            write_ppo(folder / run, tasks)
        write_public_tasks(folder, bonus=0.05 * i)
    write_reward_models(root, {"reward": 0.72, "reward-quiet": 0.81})
    write_overfitting(
        root / "milli", losses=[0.74, 0.7, 0.73, 0.8], scores=[0.1, 0.2, 0.3, 0.4]
    )
    return root


def write_one_size(root: Path, seed: int = 0) -> Path:
    """Writes an experiment of one size with four policies and no public tasks."""
    tasks = write_world(root, seed)
    qualities = {policy: QUALITY[policy] for policy in GPT_PROMPTS_POLICIES}
    write_evaluation(root, last_tasks(root, "prompts", 40), qualities, width=16)
    write_ppo(root / "ppo", tasks)
    return root
