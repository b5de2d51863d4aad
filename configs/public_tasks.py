"""Finished policies on the public tasks of the simulated world, which no labeler judges:
the paper's table 14 and its alignment tax.

Command:   python scripts/train.py --config configs/public_tasks.py:micro \
               --workdir runs/micro/tasks
Hardware:  micro: two cores, half a minute.
Expect:    micro: GPT knows `book`, `translation` and `sentiment` by heart, and fine-tuning
           costs part of that. Fine-tuned policies are less toxic when asked to be kind and
           more toxic when asked to be rude; GPT hardly reacts.
           `instructax.simulation.public_tasks` states what guessing reaches.
"""

from typing import NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    items: int  # per task
    context_tokens: int
    answer_tokens: int
    batch_size: int


# The tokenizer of `tiny` splits the same texts into more tokens than its models' training
# length; rotary positions extend beyond it.
# fmt: off
ROWS = {
    #                items context answer batch
    "simulated": Row(200,  102,    26,    200),
    "tiny":      Row(  8,  192,    48,      8),
}
# fmt: on


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """GPT, SFT, PPO and PPO-ptx on all tasks, at a size with a simulated world."""
    values = sizes.row(ROWS, sizes.check_simulated(size))
    folder = f"runs/{size}"
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
            "items": values.items,
            "context_tokens": values.context_tokens,
            "answer_tokens": values.answer_tokens,
            "batch_size": values.batch_size,
        }
    )
