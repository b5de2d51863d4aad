"""Supervised fine-tuning (paper, section 3.5, C.1 and C.3).

Command:   python scripts/train.py --config configs/sft.py:micro --workdir runs/micro/sft
           python scripts/train.py --config configs/sft.py:6b,baseline --workdir runs/6b/sft-baseline
Hardware:  micro: two cores, a quarter of a minute; 1.3b: 8 accelerators; 175b: 64.
Expect:    micro: demonstrations_loss 0.78 to 0.84 nats per token.

`SIZE` alone gives the policy that PPO starts from and is held to: 2 epochs, 10% of
pretraining text, no dropout (C.3). `SIZE,baseline` gives the SFT baseline: 16 epochs, no
text, residual dropout 0.2 (C.1).
"""

import ml_collections

from configs import sizes
from instructax.config import ConfigError

# Peak learning rates: (PPO initialisation C.3, SFT baseline C.1); sizes that the paper
# lacks take 1.3b's.
PAPER_RATES = {
    "1.3b": (5e-6, 9.65e-6),
    "6b": (1.04e-5, 9.65e-6),
    "175b": (2.45e-6, 5.03e-6),
}
# Of adapters, which want more than whole matrices do.
RECIPE_RATES = dict.fromkeys(sizes.RECIPES, (2e-4, 2e-4))
SMALL_RATES = {
    "tiny": (1e-3, 1e-3),
    **dict.fromkeys(sizes.FAMILY, (2e-3, 2e-3)),
    "small": (3e-4, 3e-4),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of supervised fine-tuning; `arg` is SIZE or SIZE,baseline."""
    size, _, variant = arg.partition(",")
    if variant not in ("", "baseline"):
        raise ConfigError(
            f"variant {variant!r} must be absent or 'baseline': configs/sft.py:SIZE or SIZE,baseline"
        )
    baseline = variant == "baseline"
    rates = {**SMALL_RATES, **RECIPE_RATES, **PAPER_RATES}.get(
        sizes.check(size), PAPER_RATES["1.3b"]
    )
    folder, mesh = f"runs/{size}", sizes.mesh(size)
    if size == "175b":
        mesh.fsdp = 8  # devices that share rows: no more than the batch has
    return ml_collections.ConfigDict(
        {
            "stage": "sft",
            "seed": 0,
            "parent": f"{folder}/pretrain",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "lora": sizes.lora(size),
            "mesh": mesh,
            "optimizer": sizes.adam(
                rates[baseline], schedule="cosine", final_fraction=0.1
            ),  # no warm-up, C.1
            "data": {
                "demonstrations": sizes.files(size, "demonstrations"),
                "text": () if baseline else sizes.files(size, "text"),
                "text_fraction": 0.0 if baseline else 0.1,  # C.3
                "chat": size in sizes.RECIPES,
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": {
                "tiny": 8,
                **dict.fromkeys(sizes.FAMILY, 4),
                "small": 16,
                "smollm2": 16,
                "175b": 8,
            }.get(size, 32),  # packed rows, C.1
            "accumulate": 4 if size in sizes.RECIPES else 1,
            "dropout": 0.2 if baseline else 0.0,  # C.1
            "epochs": 16.0 if baseline else 2.0,  # C.1, C.3
            "steps": 0,
            "run": sizes.run(size),
        }
    )
