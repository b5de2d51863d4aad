"""Evaluation of finished policies on validation data: scores, win rates, KL and text loss;
and ranking accuracy of the reward model.

Command:   python scripts/train.py --config configs/evaluate.py:micro \
               --workdir runs/micro/evaluate
Hardware:  micro: two cores, half a minute.
Expect:    micro: the score rises from GPT to SFT to PPO; in the quickstart from −2.96 to
           −0.15 to 0.41 (the table in docs/runs.md).
"""

from typing import NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    batch_size: int
    prompts: int  # at most
    best_of: int  # responses per prompt for best-of-n
    shots: int  # examples in a few-shot prompt
    prefixes: int  # few-shot prompts that are tried


# (name, workdir, how it is prompted) of the policies that are compared.
POLICIES = (
    ("GPT", "pretrain", "plain"),
    ("GPT prompted", "pretrain", "few-shot"),
    ("SFT", "sft", "plain"),
    ("best-of-n", "sft", "best-of"),
    ("PPO", "ppo", "plain"),
    ("PPO-ptx", "ppo-ptx", "plain"),
)

# fmt: off
ROWS = {
    #                batch prompts best of shots prefixes
    "gpt3":      Row(64,   600,    16,     3,    8),
    "imported":  Row(64,   600,    16,     3,    8),
    "smollm2":   Row(64,   600,    16,     3,    8),
    "small":     Row(32,   256,    16,     3,    8),
    "simulated": Row(64,   600,    16,     3,    8),
    "tiny":      Row( 8,    16,     4,     1,    2),
}
# fmt: on


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A comparison of GPT, SFT, PPO and PPO-ptx, and of few-shot GPT and best-of-n SFT.

    `arg` is SIZE, or SIZE,REWARD_SIZE for a reward model of another size.
    """
    size, reward_size = sizes.policy_and_reward_sizes(arg)
    values = sizes.row(ROWS, size)
    folder = f"runs/{size}"
    policies = []
    for name, run, mode in POLICIES:
        # Few-shot prompts are plain text, which a chat template does not accept.
        if mode != "few-shot" or not sizes.chat(size):
            policies.append((name, f"{folder}/{run}", mode))
    return ml_collections.ConfigDict(
        {
            "stage": "evaluate",
            "seed": 0,
            "policies": tuple(policies),
            "reference": "SFT",
            "reward_parent": f"runs/{reward_size}/reward",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "reward_model": sizes.model(reward_size),
            "compute": sizes.compute(size),
            "mesh": sizes.mesh(size),
            "data": {
                "prompts": sizes.files(size, "prompts"),
                "text": sizes.files(size, "text"),
                "comparisons": (("labelers", sizes.files(size, "comparisons")),),
                "demonstrations": sizes.files(size, "demonstrations"),
                "chat": sizes.chat(size),
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": values.batch_size,
            "prompts": values.prompts,
            "batches": 32,
            "temperature": 1.0,
            "best_of": values.best_of,
            "shots": values.shots,
            "prefixes": values.prefixes,
        }
    )
