"""Comparisons of responses, ranked by simulated labelers (paper, sections 3.2 and 3.4).

Command:   python scripts/train.py --config configs/collect.py:micro \
               --workdir runs/micro/collect
Hardware:  micro: two cores, half a minute.
Expect:    comparisons.jsonl.gz, ranked by the training labelers, and held_out.jsonl.gz,
           ranked by the held-out labelers; summary.json has their number of prompts. In
           docs/alignment.md (C5) a reward model of size milli, trained on such
           comparisons, has an accuracy of 0.756 on training labelers and 0.771 on
           held-out ones.
"""

from typing import NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    spare_tokens: int  # by which sampled responses are shorter than those of the data
    batch_size: int


# Workdir of a policy -> its responses to each prompt.
RESPONSES = {"sft": sizes.MAX_K - 1, "pretrain": 1}

# A response is tokenized again when it is read as data, with an end token. The text of a
# `tiny` policy then has more tokens than it sampled.
# fmt: off
ROWS = {
    #                spare batch
    "simulated": Row( 1,   256),
    "tiny":      Row(12,    16),
}
# fmt: on


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """Comparisons of 4 to 9 responses, drawn from nine: eight by SFT, one by GPT."""
    values = sizes.row(ROWS, sizes.check_simulated(size))
    folder = f"runs/{size}"
    lengths = sizes.row(sizes.DATA, size)
    return ml_collections.ConfigDict(
        {
            "stage": "collect",
            "seed": 0,
            "world": f"{folder}/world",
            "policies": tuple(
                (f"{folder}/{run}", count) for run, count in RESPONSES.items()
            ),
            "compute": sizes.compute(size),
            "prompts": 100000,  # at most
            "prompt_tokens": lengths.prompt_tokens,
            "response_tokens": lengths.response_tokens - values.spare_tokens,
            "batch_size": values.batch_size,
            "noise": 1.0,  # factor of the labelers' noise
            "round": 1,
        }
    )
