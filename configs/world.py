"""The simulated world: text, demonstrations, comparisons and prompts with a known true
utility, and their tokenizer.

Command:   python scripts/train.py --config configs/world.py:micro \
               --workdir runs/micro/world
Hardware:  one core, seconds.
Expect:    six .jsonl.gz files and tokenizer.json in the workdir; the same seed gives the
           same bytes.
"""

from typing import NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    documents: int  # of pretraining text
    demonstrated_prompts: int  # distinct prompts, in the proportions of the paper's table 6
    demonstrations: int
    comparisons: int
    prompts: int  # for PPO
    gpt_prompts: int  # prompts that were sent to GPT, with an example
    public: int  # items of public tasks, for the FLAN/T0 counterpart


# fmt: off
ROWS = {
    #                documents prompts demos  comparisons PPO   GPT   public
    "simulated": Row(24000,    2300,   12000, 6000,       5600, 4000, 6000),
    "tiny":      Row(  200,     100,     200,  240,        400,  120,  100),
}
# fmt: on


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """`tiny`, or one of `micro`, `milli` and `centi`, which share a world."""
    values = sizes.row(ROWS, sizes.check_simulated(size))
    return ml_collections.ConfigDict(
        {
            "stage": "world",
            "seed": 0,
            "vocab_size": sizes.row(sizes.MODELS, size).vocab_size,
            "lines": values._asdict(),
        }
    )
