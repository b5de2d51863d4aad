"""Supervised fine-tuning, SFT (paper, section 3.5, C.1 and C.3).

Command:   python scripts/train.py --config configs/sft.py:micro --workdir runs/micro/sft
           python scripts/train.py --config configs/sft.py:6b,baseline \
               --workdir runs/6b/sft-baseline
Hardware:  micro: two cores, a quarter of a minute; 1.3b: 8 accelerators; 175b: 64.
Expect:    micro: demonstrations_loss 0.78 to 0.84 nats per token.

`SIZE` gives the policy that PPO starts from, which is also its KL reference: 2 epochs, 10%
pretraining text, no dropout (C.3). `SIZE,baseline` gives the SFT baseline: 16 epochs, no
text, residual dropout 0.2 (C.1).
"""

from typing import NamedTuple

import ml_collections

from configs import sizes
from instructax.config import ConfigError


class Row(NamedTuple):
    learning_rate: float  # peak, of the policy that PPO starts from (C.3)
    baseline_learning_rate: float  # peak, of the SFT baseline (C.1)
    batch_size: int  # packed rows (C.1)
    accumulate: int  # microbatches of a batch, one after the other


# Adapters (smollm2) need larger learning rates than whole matrices.
# fmt: off
ROWS = {
    #                rate     baseline  rows accumulate
    "gpt3":      Row(5e-6,    9.65e-6,  32,  1),
    "6b":        Row(1.04e-5, 9.65e-6,  32,  1),
    "175b":      Row(2.45e-6, 5.03e-6,   8,  1),
    "imported":  Row(5e-6,    9.65e-6,  32,  1),
    "smollm2":   Row(2e-4,    2e-4,     16,  4),
    "small":     Row(3e-4,    3e-4,     16,  1),
    "simulated": Row(2e-3,    2e-3,      4,  1),
    "tiny":      Row(1e-3,    1e-3,      8,  1),
}
# fmt: on


class Variant(NamedTuple):
    text_fraction: float  # share of the rows that are pretraining text
    dropout: float  # residual
    epochs: float


VARIANTS = {
    "": Variant(text_fraction=0.1, dropout=0.0, epochs=2.0),  # C.3
    "baseline": Variant(text_fraction=0.0, dropout=0.2, epochs=16.0),  # C.1
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of supervised fine-tuning; `arg` is SIZE or SIZE,baseline."""
    size, _, name = arg.partition(",")
    if name not in VARIANTS:
        raise ConfigError(
            f"variant {name!r} must be absent or 'baseline': "
            "configs/sft.py:SIZE or SIZE,baseline"
        )
    values = sizes.row(ROWS, size)
    variant = VARIANTS[name]
    learning_rate = values.learning_rate
    text = sizes.files(size, "text")
    if name == "baseline":
        learning_rate = values.baseline_learning_rate
        text = ()
    return ml_collections.ConfigDict(
        {
            "stage": "sft",
            "seed": 0,
            "parent": f"runs/{size}/pretrain",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "compute": sizes.compute(size),
            "lora": sizes.lora(size),
            "mesh": sizes.mesh(size, rows=values.batch_size),
            "optimizer": sizes.adam(
                learning_rate,
                schedule="cosine",  # no warm-up (C.1)
                final_fraction=0.1,
            ),
            "data": {
                "demonstrations": sizes.files(size, "demonstrations"),
                "text": text,
                "text_fraction": variant.text_fraction,
                "chat": sizes.chat(size),
                "limits": sizes.limits(size),
                "folder": f"runs/{size}/rows",
            },
            "batch_size": values.batch_size,
            "accumulate": values.accumulate,
            "dropout": variant.dropout,
            "epochs": variant.epochs,
            "steps": 0,  # `epochs` counts
            "run": sizes.run(size),
        }
    )
