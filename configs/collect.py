"""Comparisons of what policies answer, ranked by the embedded world's labelers (paper,
sections 3.2 and 3.4).

Command:   python scripts/train.py --config configs/collect.py:micro --workdir runs/micro/collect
Hardware:  micro: two cores, half a minute.
Expect:    comparisons.jsonl.gz by the labelers a reward model learns from, held_out.jsonl.gz by others.
"""

import ml_collections

from configs import sizes
from instructax.config import ConfigError


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """Comparisons of answers by SFT, now and then by the pretrained model."""
    if size not in sizes.WORLDS:
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(sizes.WORLDS)}: only the embedded world has labelers"
        )
    folder, limits = f"runs/{size}", sizes.limits(size).to_dict()
    return ml_collections.ConfigDict(
        {
            "stage": "collect",
            "seed": 0,
            "world": f"{folder}/world",
            "policies": ((f"{folder}/sft", 8), (f"{folder}/pretrain", 1)),
            "compute": sizes.compute(size),
            "prompts": 100000,
            "prompt_tokens": limits["prompt_tokens"],
            # The data bring the end token; what a tiny policy babbles is read again as more
            # tokens than it wrote.
            "response_tokens": 12 if size == "tiny" else limits["response_tokens"] - 1,
            "batch_size": 16 if size == "tiny" else 256,
            "noise": 1.0,
            "round": 1,
        }
    )
