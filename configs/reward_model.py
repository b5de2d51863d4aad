"""The reward model, trained on K-wise rankings (paper, section 3.5 and C.2).

All policies of the paper share one reward model of 6B.

Command:   python scripts/train.py --config configs/reward_model.py:micro \
               --workdir runs/micro/reward
Hardware:  micro: two cores, about a minute; 6b: 8 accelerators.
Expect:    micro: validation_accuracy near 0.71; the paper: 0.724 ± 0.004 on its own
           labelers (section 4.1).
"""

from typing import NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    learning_rate: float  # peak (C.2)
    batch_size: int  # prompts (C.2)


# fmt: off
ROWS = {
    #                rate  prompts
    "gpt3":      Row(9e-6, 64),
    "imported":  Row(9e-6, 64),
    "smollm2":   Row(3e-4, 16),
    "small":     Row(1e-4, 16),
    "simulated": Row(1e-3,  8),
    "tiny":      Row(1e-3,  8),
}
# fmt: on


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """A run of reward-model training."""
    values = sizes.row(ROWS, size)
    return ml_collections.ConfigDict(
        {
            "stage": "reward_model",
            "seed": 0,
            "parent": f"runs/{size}/sft",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "lora": sizes.lora(size),
            "mesh": sizes.mesh(size),
            "optimizer": sizes.adam(
                values.learning_rate,
                schedule="cosine",  # C.2
                final_fraction=0.1,  # C.2
            ),
            "data": {
                "comparisons": sizes.files(size, "comparisons"),
                "demonstrations": sizes.files(size, "demonstrations"),
                "chat": sizes.chat(size),
                "limits": sizes.limits(size),
                "folder": f"runs/{size}/rows",
            },
            "batch_size": values.batch_size,
            "epochs": 1.0,  # more than one overfits (C.2)
            "steps": 0,  # `epochs` counts
            "run": sizes.run(size),
        }
    )
