"""Finished policies on the world's public tasks, which no labeler judges: the paper's table
14 and its alignment tax.

Command:   python scripts/train.py --config configs/public_tasks.py:micro --workdir runs/micro/tasks
Hardware:  micro: two cores, half a minute.
Expect:    micro: GPT knows `book`, `translation` and `sentiment` by heart, and fine-tuning costs part of it; fine-tuned
           policies are less toxic when asked to be kind, and more when asked to be rude, GPT hardly. What guesses
           reach stands at the head of `instructax.simulation.public_tasks`.
"""

import ml_collections

from configs import sizes
from instructax.config import ConfigError


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """GPT, SFT, PPO and PPO-ptx on all tasks, in the sizes that live in the embedded world."""
    if size not in sizes.WORLDS:
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(sizes.WORLDS)}: the paper's sizes have no embedded world"
        )
    folder = f"runs/{size}"
    # The tiny tokenizer cuts the same texts into more pieces, and rotary positions go on
    # beyond the model's length.
    context, answer = (192, 48) if size == "tiny" else (102, 26)
    return ml_collections.ConfigDict(
        {
            "stage": "public_tasks",
            "seed": 0,
            "policies": (
                ("GPT", f"{folder}/pretrain"),
                ("SFT", f"{folder}/sft"),
                ("PPO", f"{folder}/ppo"),
                ("PPO-ptx", f"{folder}/ppo-ptx"),
            ),
            "world": f"{folder}/world",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "mesh": sizes.mesh(size),
            "items": 8 if size == "tiny" else 200,
            "context_tokens": context,
            "answer_tokens": answer,
            "batch_size": 8 if size == "tiny" else 200,
        }
    )
