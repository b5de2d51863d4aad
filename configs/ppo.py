"""PPO and PPO-ptx (paper, section 3.5, Eq. 2 and C.4).

Command:   python scripts/train.py --config configs/ppo.py:micro \
               --workdir runs/micro/ppo-ptx
           python scripts/train.py --config configs/ppo.py:micro --workdir runs/micro/ppo \
               --config.ptx_coef=0.0
Hardware:  micro: two cores, half a minute; 1.3b with a 6b reward model: 16 accelerators;
           175b: 256.
Expect:    micro: scores on training batches rise from 0 to between 0.5 and 0.9, depending
           on the seed, while kl stays near 1 nat.
"""

from typing import Any, NamedTuple

import ml_collections

from configs import sizes


class Row(NamedTuple):
    learning_rate: float  # peak, of the policy
    value_learning_rate: float  # peak (C.4)
    batch_size: int  # rollouts per iteration (C.4)
    minibatches: int  # optimizer steps per iteration (C.4: minibatches of 64 rollouts)
    ptx_rows: int  # pretraining rows per optimizer step (C.4: 8 per rollout)
    steps: int  # iterations (C.4: 256k episodes)
    kl_coef: float  # C.4; in units of the score, whose scale differs by reward model
    ptx_coef: float  # C.4; of a loss per token, so small sizes use another scale
    ema_decay: float  # C.4, for 4000 optimizer steps; short runs need a faster average
    samples: int  # rollouts per iteration that are written to samples.jsonl


# The policy's learning rates are the best with ptx in the paper's figure 38; the text names
# none. Without ptx the paper's runs diverge above 8.05e-6, and its best rates were 3.74e-6
# (1.3b), 2.55e-6 (6b) and 2.55e-6 (175b).
# fmt: off
ROWS = {
    #                rate     value rollouts mini ptx steps kl   ptx   ema    samples
    "gpt3":      Row(1.18e-5, 9e-6, 512,    8,   512, 500, 0.02, 27.8, 0.992,    8),
    "175b":      Row(2.55e-6, 5e-6, 512,    8,   512, 500, 0.02, 27.8, 0.992,    8),
    "imported":  Row(1.18e-5, 9e-6, 512,    8,   512, 500, 0.2,   1.0, 0.95,   512),
    "smollm2":   Row(3e-5,    5e-5,  32,    4,     2, 100, 0.2,   1.0, 0.95,    32),
    "small":     Row(3e-5,    5e-5,  64,    4,     8,  40, 0.2,   1.0, 0.95,    64),
    "simulated": Row(3e-4,    5e-4, 128,    4,     8,  40, 0.2,   1.0, 0.95,   128),
    "tiny":      Row(1e-3,    1e-3,   8,    2,     2,   4, 0.2,   1.0, 0.95,     8),
}
# fmt: on

# Precision of the networks -> largest mean difference of sampled and recomputed
# log-probabilities, in nats per token. 16 bits round much more.
TOLERANCES = {"float32": 1e-4, "bf16_matmul": 0.03, "bf16": 0.03}

# The size whose mesh is used: that of the larger of policy and reward model.
MESH_SIZES = {
    "gpt3": "6b",
    "175b": "175b",
    "imported": "small",
    "smollm2": "small",
    "small": "small",
    "simulated": "micro",
    "tiny": "tiny",
}


class Lengths(NamedTuple):
    sequence_tokens: int
    prompt_tokens: int
    response_tokens: int


# Shorter than the lengths of the other stages where sampling takes most of the time.
LENGTHS = {"smollm2": Lengths(sequence_tokens=512, prompt_tokens=256, response_tokens=128)}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of PPO-ptx, or of PPO if ptx_coef is 0.

    `arg` is SIZE, or SIZE,REWARD_SIZE for a reward model of another size.
    """
    size, reward_size = sizes.policy_and_reward_sizes(arg)
    values = sizes.row(ROWS, size)
    compute: Any = sizes.compute(size)
    limits = sizes.limits(size)
    if size in LENGTHS:
        limits.update(LENGTHS[size]._asdict())
    # Warm-up over the first 10 iterations, from a tenth of the peak (C.4).
    warmup = {"warmup_steps": 10, "warmup_from": 0.1}
    return ml_collections.ConfigDict(
        {
            "stage": "ppo",
            "seed": 0,
            "policy_parent": f"runs/{size}/sft",
            "reward_parent": f"runs/{reward_size}/reward",
            "tokenizer": sizes.tokenizer(size),
            "model": sizes.model(size),
            "reward_model": sizes.model(reward_size),
            "compute": compute,
            "lora": sizes.lora(size),
            "mesh": sizes.mesh(sizes.row(MESH_SIZES, size)),
            "optimizer": sizes.adam(values.learning_rate, **warmup),
            "value_optimizer": sizes.adam(values.value_learning_rate, **warmup),
            "data": {
                "prompts": sizes.files(size, "prompts"),
                "text": sizes.files(size, "text"),
                "chat": sizes.chat(size),
                "limits": limits,
                "folder": f"runs/{size}/rows",
            },
            **hyperparameters(values),
            "tolerance": TOLERANCES[compute.dtype],
            "samples": values.samples,
            "run": sizes.run(size),
        }
    )


def hyperparameters(values: Row) -> dict[str, Any]:
    """The values of the algorithm, except for the learning rates."""
    return {
        "steps": values.steps,
        "batch_size": values.batch_size,
        "minibatches": values.minibatches,
        "inner_epochs": 1,  # C.4
        # "sampled" saves a forward pass, but the sampler's rounding enters the ratio.
        "old_logprobs": "recomputed",
        "ptx_rows": values.ptx_rows,
        "temperature": 1.0,  # C.4
        "kl_coef": values.kl_coef,
        "ptx_coef": values.ptx_coef,
        "clip": 0.2,  # C.4
        "value_clip": 0.2,  # not in the paper; as in its ancestors
        "discount": 1.0,  # C.4
        "lambda_": 0.95,  # not in the paper; as in its ancestors
        "ema_decay": values.ema_decay,
        "no_eos_penalty": 1.0,  # not in the paper
        # Of a response without an end token: "subtract" the penalty from its score, or,
        # as the paper's ancestors do, "replace" the score by -penalty.
        "no_eos_rule": "subtract",
        "whiten_rewards": False,  # not in the paper
        "whiten_advantages": True,  # not in the paper; as in its ancestors
    }
