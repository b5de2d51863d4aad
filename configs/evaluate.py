"""Finished policies side by side on held-out data: scores, win rate, KL, text loss; the reward model's accuracy.

Command:   python scripts/train.py --config configs/evaluate.py:micro --workdir runs/micro/evaluate
Hardware:  micro: two cores, half a minute.
Expect:    micro: proxy score and true reward rise from base to SFT to PPO.
"""

import ml_collections

from configs import sizes


def get_config(size: str) -> ml_collections.ConfigDict:
    """A comparison of base, SFT, PPO and PPO-ptx."""
    folder = f"runs/{sizes.check(size)}"
    scorer = "6b" if sizes.paper(size) else size
    return ml_collections.ConfigDict(
        {
            "stage": "evaluate",
            "seed": 0,
            "policies": (
                ("base", f"{folder}/pretrain"),
                ("SFT", f"{folder}/sft"),
                ("PPO", f"{folder}/ppo"),
                ("PPO-ptx", f"{folder}/ppo-ptx"),
            ),
            "reference": "SFT",
            "reward_parent": f"runs/{scorer}/reward",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "reward_model": sizes.model(scorer),
            "compute": sizes.compute(size),
            "mesh": sizes.mesh(size),
            "data": {
                "prompts": sizes.files(size, "prompts"),
                "text": sizes.files(size, "text"),
                "comparisons": sizes.files(size, "comparisons"),
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": {"tiny": 8, "small": 32}.get(size, 64),
            "prompts": {"tiny": 16, "small": 256}.get(size, 512),
            "batches": 32,
            "temperature": 1.0,
        }
    )
