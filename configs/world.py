"""The embedded world: text, demonstrations, comparisons and prompts with a known true
reward, and their tokenizer.

Command:   python scripts/train.py --config configs/world.py:micro --workdir runs/micro/world
Hardware:  one core, seconds.
Expect:    six .jsonl.gz files and tokenizer.json in the workdir, the same bytes for the same seed.
"""

import ml_collections

from configs import sizes
from instructax.config import ConfigError


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """`tiny`, or one of the family `micro`, `milli`, `centi`, which share a world."""
    if size not in sizes.WORLDS:
        raise ConfigError(
            f"size {size!r} must be one of {', '.join(sizes.WORLDS)}: the paper's sizes have no embedded world"
        )
    lines = {
        "tiny": {
            "documents": 200,
            "demonstrated_prompts": 100,
            "demonstrations": 200,
            "comparisons": 240,
            "prompts": 400,
            "gpt_prompts": 120,
            "public": 100,
        },
        "micro": {
            "documents": 24000,
            # Distinct prompts in the proportions of the paper's table 6.
            "demonstrated_prompts": 2300,
            "demonstrations": 12000,
            "comparisons": 6000,
            "prompts": 5600,
            "gpt_prompts": 4000,
            "public": 6000,
        },
    }["tiny" if size == "tiny" else "micro"]
    return ml_collections.ConfigDict(
        {"stage": "world", "seed": 0, "vocab_size": sizes.VOCABULARY[size], "lines": lines}
    )
