"""The reward model on K-wise rankings (paper, section 3.5 and C.2). All policies of the
paper share one of 6B.

Command:   python scripts/train.py --config configs/reward_model.py:micro --workdir runs/micro/reward
Hardware:  micro: two cores, about a minute; 6b: 8 accelerators.
Expect:    micro: held_out_accuracy near 0.71; the paper: 0.724 ± 0.004 on its own labelers (section 4.1).
"""

import ml_collections

from configs import sizes


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """A run of reward-model training."""
    folder = f"runs/{sizes.check(size)}"
    return ml_collections.ConfigDict(
        {
            "stage": "reward_model",
            "seed": 0,
            "parent": f"{folder}/sft",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "lora": sizes.lora(size),
            "mesh": sizes.mesh(size),
            "optimizer": sizes.adam(
                {
                    "tiny": 1e-3,
                    **dict.fromkeys(sizes.FAMILY, 1e-3),
                    "small": 1e-4,
                    "smollm2": 3e-4,
                }.get(size, 9e-6),  # C.2
                schedule="cosine",
                final_fraction=0.1,  # C.2
            ),
            "data": {
                "comparisons": sizes.files(size, "comparisons"),
                "demonstrations": sizes.files(size, "demonstrations"),
                "chat": size in sizes.RECIPES,
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": {
                "tiny": 8,
                **dict.fromkeys(sizes.FAMILY, 8),
                "small": 16,
                "smollm2": 16,
            }.get(size, 64),  # prompts, C.2
            "epochs": 1.0,  # C.2
            "steps": 0,
            "run": sizes.run(size),
        }
    )
