"""Pretraining: the base model, "GPT" in the paper's figures. Large sizes: values of Brown
et al. (2020), table 2.1.

Command:   python scripts/train.py --config configs/pretrain.py:micro --workdir runs/micro/pretrain
Hardware:  micro: two cores, a minute and a half; small: two cores, twenty minutes; 1.3b: 64 accelerators, weeks.
Expect:    micro: text_loss near 0.63 nats per token.
"""

import ml_collections

from configs import sizes

# GPT-3's peak learning rate and rows of 2048 tokens per batch.
GPT3_RATE_AND_ROWS = {
    "125m": (6e-4, 256),
    "350m": (3e-4, 256),
    "760m": (2.5e-4, 256),
    "1.3b": (2e-4, 512),
    "2.7b": (1.6e-4, 512),
    "6b": (1.2e-4, 1024),
    "175b": (0.6e-4, 1600),
}
TOKENS, WARMUP_TOKENS = 300e9, 375e6  # GPT-3's (Brown et al., table 2.1 and appendix B)


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """A run of pretraining."""
    small = {
        "tiny": (3e-3, 8),
        **dict.fromkeys(sizes.FAMILY, (3e-3, 4)),
        "small": (2e-3, 16),
    }
    rate, rows = {**small, **GPT3_RATE_AND_ROWS}[sizes.check(size)]
    # Every size of a family on as many tokens, as GPT-3's were.
    steps = {"tiny": 8, **dict.fromkeys(sizes.FAMILY, 8000), "small": 900}.get(
        size
    ) or round(TOKENS / (rows * 2048))
    warmup_steps = (
        round(WARMUP_TOKENS / (rows * 2048)) if sizes.paper(size) else steps // 20
    )
    folder = f"runs/{size}"
    return ml_collections.ConfigDict(
        {
            "stage": "pretrain",
            "seed": 0,
            "parent": "",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "mesh": sizes.mesh(size),
            "optimizer": sizes.adam(
                rate,
                schedule="cosine",
                warmup_steps=warmup_steps,
                warmup_from=0.0,
                final_fraction=0.1,
                weight_decay=0.1,  # GPT-3's
            ),
            "data": {
                "text": sizes.files(size, "text"),
                "limits": sizes.limits(size),
                "folder": f"{folder}/rows",
            },
            "batch_size": rows,
            "accumulate": 1,
            "dropout": 0.0,
            "epochs": 0.0,
            "steps": steps,
            "run": sizes.run(size),
        }
    )
