"""Pretraining of the base model, "GPT" in the paper (Brown et al., 2020, table 2.1).

Command:   python scripts/train.py --config configs/pretrain.py:micro \
               --workdir runs/micro/pretrain
Hardware:  micro: two cores, a minute and a half; small: two cores, twenty minutes; 1.3b: 64
           accelerators, weeks.
Expect:    micro: text_loss near 0.63 nats per token.
"""

from typing import NamedTuple

import ml_collections

from configs import sizes
from instructax.config import ConfigError


class Row(NamedTuple):
    learning_rate: float  # peak
    batch_size: int  # packed rows
    steps: int
    warmup_steps: int


GPT3_TOKENS = 300e9  # Brown et al., table 2.1
GPT3_WARMUP_TOKENS = 375e6  # Brown et al., appendix B


def gpt3_row(learning_rate: float, batch_size: int) -> Row:
    """The row of one of GPT-3's sizes; `batch_size` counts rows of a whole context."""
    batch_tokens = batch_size * sizes.CONTEXT
    return Row(
        learning_rate=learning_rate,
        batch_size=batch_size,
        steps=round(GPT3_TOKENS / batch_tokens),
        warmup_steps=round(GPT3_WARMUP_TOKENS / batch_tokens),
    )


# Every size of a family trains on the same number of tokens, as GPT-3's sizes did.
# fmt: off
ROWS = {
    "125m":      gpt3_row(6e-4, 256),
    "350m":      gpt3_row(3e-4, 256),
    "760m":      gpt3_row(2.5e-4, 256),
    "1.3b":      gpt3_row(2e-4, 512),
    "2.7b":      gpt3_row(1.6e-4, 512),
    "6b":        gpt3_row(1.2e-4, 1024),
    "175b":      gpt3_row(0.6e-4, 1600),
    #                rate  rows steps warm-up
    "small":     Row(2e-3,  16,  900,   45),
    "simulated": Row(3e-3,   4, 8000,  400),
    "tiny":      Row(3e-3,   8,    8,    0),
}
# fmt: on


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """A run of pretraining."""
    if sizes.check(size) not in sizes.SIZES:
        raise ConfigError(
            f"size {size!r} is an imported model, which is pretrained: start with "
            f"configs/sft.py:{size}, or pretrain one of {', '.join(sizes.SIZES)}"
        )
    values = sizes.row(ROWS, size)
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
                values.learning_rate,
                schedule="cosine",
                warmup_steps=values.warmup_steps,
                warmup_from=0.0,
                final_fraction=0.1,
                weight_decay=0.1,  # Brown et al., appendix B
            ),
            "data": {
                "text": sizes.files(size, "text"),
                "limits": sizes.limits(size),
                "folder": f"runs/{size}/rows",
            },
            "batch_size": values.batch_size,
            "accumulate": 1,
            "dropout": 0.0,
            "epochs": 0.0,  # `steps` counts
            "steps": values.steps,
            "run": sizes.run(size),
        }
    )
