"""Logs of an experiment that was never run: a world's prompts, answered by writers of a
given quality."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from instructax.simulation.files import asked_of, tasks_of
from instructax.simulation.labelers import STYLES, demonstrate, spoil
from instructax.simulation.lexicon import generator
from instructax.simulation.tasks import Task

LINES = {
    "documents": 4,
    "demonstrated_prompts": 4,
    "demonstrations": 4,
    "comparisons": 4,
    "prompts": 60,
    "gpt_prompts": 24,
    "public": 4,
}
# Probability of a perfect answer, for the smallest size; every size more adds 0.08.
QUALITY = {
    "GPT": 0.0,
    "GPT prompted": 0.15,
    "SFT": 0.35,
    "best-of-n": 0.55,
    "PPO": 0.6,
    "PPO-ptx": 0.62,
    "FLAN/T0": 0.2,
}
GPT_POLICIES = (
    "GPT",
    "SFT",
    "PPO",
    "PPO-ptx",
)  # those that answer prompts of the GPT-3 distribution
PUBLIC = (
    "book",
    "background",
    "two_steps",
    "translation",
    "sentiment",
    "entailment",
    "pronoun",
    "completion",
)
SHARE = {
    "GPT": 0.6,
    "SFT": 0.52,
    "PPO": 0.45,
    "PPO-ptx": 0.59,
    "FLAN/T0": 0.66,
}  # of public tasks done rightly
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


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """JSON lines, their folder made first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, value: Any) -> None:
    """One JSON object, its folder made first."""
    write_lines(path, [value])


def estimate(value: float, half: float = 0.02) -> dict[str, Any]:
    """A logged estimate."""
    return {"value": value, "low": value - half, "high": value + half, "count": 100}


def share(value: float) -> dict[str, Any]:
    """A logged share of 100 items: the first ones, so that the items of two policies are
    alike."""
    right = round(100 * value)
    return estimate(right / 100, 0.1) | {"values": [1.0] * right + [0.0] * (100 - right)}


def respond(task: Task, quality: float, rng: np.random.Generator) -> str:
    """A perfect answer with probability `quality`, else a sloppy one that is spoilt."""
    return (
        task.ideal
        if rng.random() < quality
        else spoil(demonstrate(STYLES["sloppy"], task, rng), rng)
    )


def sample(
    policy: str, prompt: str, response: str, rng: np.random.Generator
) -> dict[str, Any]:
    """A line of the evaluation's `samples.jsonl`."""
    words = [word + " " for word in response.split()] + ["<|endoftext|>"]
    token_kl = [round(float(x), 4) for x in rng.normal(0.2, 1.0, len(words))]
    line = {
        "step": 1,
        "policy": policy,
        "prompt": f"{prompt}\n\n",
        "response": f"{response}<|endoftext|>",
        "score": float(rng.normal(QUALITY.get(policy, 0.0), 0.3)),
        "kl": sum(token_kl),
        "tokens": len(words),
        "ended": True,
    }
    return line | {"pieces": words, "token_kl": token_kl}


def write_world(root: Path, seed: int = 0) -> dict[str, Task]:
    """The world's config; its tasks by prompt."""
    write_json(
        root / "world" / "config.json",
        {"seed": seed, "lines": LINES, "stage": "world", "vocab_size": 128},
    )
    write_json(root / "world" / "summary.json", {"stage": "world"})
    return tasks_of(root / "world")


def asked(root: Path, name: str, count: int) -> dict[str, Task]:
    """The last tasks of a set of prompts, by prompt."""
    return {
        one.task.prompt.strip(): one.task for one in asked_of(root / "world", name)[-count:]
    }


def write_evaluation(
    folder: Path,
    tasks: dict[str, Task],
    qualities: dict[str, float],
    width: int,
    run: str = "evaluate",
) -> None:
    """The run `evaluate/` or `evaluate-gpt/` of one size, on the prompts of `tasks`."""
    rng = generator(width, run)
    records = [
        sample(policy, prompt, respond(task, quality, rng), rng)
        for policy, quality in qualities.items()
        for prompt, task in tasks.items()
    ]
    write_lines(folder / run / "samples.jsonl", records)
    ranking = {"accuracy": estimate(0.72), "longer_wins": estimate(0.53), "pairs": 500}
    bins = [
        {"predicted": x, "share": x - 0.03, "pairs": 80}
        for x in (0.55, 0.65, 0.75, 0.85, 0.95)
    ]
    worse = ranking | {"accuracy": estimate(0.695, 0.005), "calibration": bins}
    sets = {"labelers": ranking | {"calibration": bins}, "held-out labelers": worse}
    names = (
        "scores",
        "kl",
        "response_length",
        "ended_share",
        "text_loss",
        "proxy_win_rate",
    )
    policies = {
        policy: {name: estimate(quality) for name in names}
        for policy, quality in qualities.items()
    }
    write_json(folder / run / "summary.json", {"policies": policies, "reward_model": sets})
    write_json(
        folder / run / "config.json", {"model": MODEL | {"embed_dim": width}, "best_of": 16}
    )


def write_reward(root: Path, accuracies: dict[str, float]) -> None:
    """The last figures of runs of reward models."""
    for run, accuracy in accuracies.items():
        figures = {"step": 9, "held_out_accuracy": accuracy, "held_out_pairs": 480.0}
        write_json(root / run / "summary.json", {"stage": "reward"} | figures)


def write_ppo(folder: Path, tasks: dict[str, Task], iterations: int = 12) -> None:
    """`ppo/` or `ppo-ptx/`: a score that rises with the KL, a true utility that turns."""
    rng, prompts = generator(len(folder.name), "ppo"), list(tasks)
    metrics = [
        {"step": i, "kl": 0.3 * (i - 1), "scores": 0.1 * i}
        for i in range(1, iterations + 1)
    ]
    samples = [
        {
            "step": i,
            "prompt": prompt,
            "response": respond(tasks[prompt], 0.3 + 0.4 * np.sin(0.3 * i), rng),
            "score": 0.0,
        }
        for i in range(1, iterations + 1)
        for prompt in prompts[i : i + 8]
    ]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    write_json(folder / "summary.json", {"stage": "ppo"})


def write_public(folder: Path, bonus: float) -> None:
    """`tasks/summary.json` of one size."""

    def shots(policy: str, scale: float) -> dict[str, Any]:
        few = SHARE[policy] + bonus
        if scale == 1.0:
            return {"zero-shot": share(few - 0.1), "few-shot": share(few)}
        return {
            "zero-shot": estimate(scale * (few - 0.1), 3.0),
            "few-shot": estimate(scale * few, 3.0),
        }

    policies = {
        policy: {
            task: shots(policy, 100.0 if task == "translation" else 1.0) for task in PUBLIC
        }
        | {
            "truth": {
                way: share(0.4 if policy == "GPT" else 0.55)
                for way in ("QA, true", "QA, true and informative")
            },
            "toxicity": {
                "none": share(0.2),
                "respectful": share(0.1),
                "biased": share(0.5),
            },
            "stereotype": {
                "none": estimate(0.7),
                "respectful": estimate(0.6),
                "biased": estimate(0.5),
            },
        }
        for policy in SHARE
    }
    write_json(folder / "tasks" / "summary.json", {"policies": policies})


def write_overfit(folder: Path, losses: list[float], scores: list[float]) -> None:
    """`sft-overfit/` and `evaluate-overfit/`: a loss and the scores of ten prompts at every
    hundredth step."""
    metrics = [
        {"step": 100 * i, "demonstrations_loss": loss}
        for i, loss in enumerate(losses, start=1)
    ]
    write_lines(
        folder / "sft-overfit" / "metrics.jsonl", [{"step": 5, "loss": 1.0}, *metrics]
    )
    samples = [
        {"policy": policy, "prompt": str(i), "score": score + 0.1 * i}
        for policy, score in [
            ("SFT", 0.0),
            *((f"step {100 * k}", score) for k, score in enumerate(scores, start=1)),
        ]
        for i in range(10)
    ]
    write_lines(folder / "evaluate-overfit" / "samples.jsonl", samples)
    for run in ("sft-overfit", "evaluate-overfit"):
        write_json(folder / run / "summary.json", {"stage": run})


def write_family(root: Path, seed: int = 0, count: int = 40) -> Path:
    """A whole experiment of three sizes."""
    tasks = write_world(root, seed)
    prompts, gpt_prompts = asked(root, "prompts", count), asked(root, "gpt_prompts", count)
    for i, size in enumerate(("micro", "milli", "centi")):
        folder = root / size
        qualities = {
            policy: min(1.0, quality + 0.08 * i) for policy, quality in QUALITY.items()
        }
        write_evaluation(folder, prompts, qualities, width=16 * (i + 1))
        plain = {policy: qualities[policy] for policy in GPT_POLICIES}
        write_evaluation(folder, gpt_prompts, plain, 16 * (i + 1), "evaluate-gpt")
        for run in ("ppo", "ppo-ptx"):
            write_ppo(folder / run, tasks)
        write_public(folder, bonus=0.05 * i)
    write_reward(root, {"reward": 0.72, "reward-quiet": 0.81})
    write_overfit(
        root / "milli", losses=[0.74, 0.7, 0.73, 0.8], scores=[0.1, 0.2, 0.3, 0.4]
    )
    return root


def write_one_size(root: Path, seed: int = 0) -> Path:
    """An experiment of one size: four policies, no public tasks."""
    tasks = write_world(root, seed)
    few = {policy: QUALITY[policy] for policy in GPT_POLICIES}
    write_evaluation(root, asked(root, "prompts", 40), few, width=16)
    write_ppo(root / "ppo", tasks)
    return root
