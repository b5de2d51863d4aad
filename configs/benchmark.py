"""Workloads to measure: sft, ppo, and the reward model with K = 9, 4 or 2 responses.

Command:   python scripts/benchmark.py --config configs/benchmark.py:ppo,S
Hardware:  ppo,S: two cores, two to three minutes, 2.4 GiB of memory.
Expect:    ppo,S: 6 to 9 seconds per iteration on two idle cores
           (`docs/performance.md`), and no program compiled after the first repetition.

S has 6 layers of width 384 and a vocabulary of 8,192 (14M parameters). M has 12 layers of
width 768 and a vocabulary of 50,257 (124M parameters). `docs/performance.md` compares other
libraries at these sizes. Parameters and tokens are random, and the dtype is float32. Each
row of sft is one document without padding, and every token is trained.
"""

from functools import partial
from typing import Any, NamedTuple

import ml_collections

from configs import ppo, pretrain, reward_model, sizes
from instructax.config import ConfigError


class Shape(NamedTuple):
    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    vocab_size: int
    sft_rows: int  # batch size of sft


SHAPES = {
    "S": Shape(6, 384, 6, 64, 8192, sft_rows=8),
    "M": Shape(*sizes.SHAPES["125m"], sizes.MODELS["gpt3"].vocab_size, sft_rows=4),
}


def sft_config(shape: Shape) -> ml_collections.ConfigDict:
    """Full rows of 256 tokens; the program is that of pretraining and SFT."""
    config: Any = pretrain.get_config("small")
    config.batch_size = shape.sft_rows
    config.data.limits.sequence_tokens = 256
    config.compute.head_chunk = 64
    return config


def reward_config(_: Shape, completions: int) -> ml_collections.ConfigDict:
    """One prompt of 256 tokens with K responses of 32."""
    config: Any = reward_model.get_config("small")
    limits = config.data.limits
    limits.completions = completions
    limits.prompt_tokens = 256
    limits.response_tokens = 32
    config.batch_size = 1
    config.compute.microbatch_rows = 1
    config.compute.tail_splits = 0
    return config


def ppo_config(_: Shape) -> ml_collections.ConfigDict:
    """32 rollouts of 64 prompt and 64 response tokens, in 4 minibatches, without ptx."""
    config: Any = ppo.get_config("small")
    limits = config.data.limits
    limits.prompt_tokens = 64
    limits.response_tokens = 64
    limits.sequence_tokens = 256
    config.batch_size = 32
    config.minibatches = 4
    config.ptx_coef = 0.0
    compute = config.compute
    compute.head_chunk = 128
    compute.slots = 32
    compute.compaction_steps = 3
    compute.microbatch_rows = 4  # a minibatch of full-length responses
    compute.tail_splits = 0
    return config


WORKLOADS = {
    "sft": sft_config,
    "reward_model": partial(reward_config, completions=sizes.MAX_K),
    "reward_model4": partial(reward_config, completions=4),
    "reward_model2": partial(reward_config, completions=2),
    "ppo": ppo_config,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of one stage; `arg` is WORKLOAD,SIZE."""
    name, _, size = arg.partition(",")
    if name not in WORKLOADS or size not in SHAPES:
        raise ConfigError(
            f"benchmark {arg!r} must be one of {', '.join(WORKLOADS)} and one of "
            f"{', '.join(SHAPES)}: ppo,S"
        )
    shape = SHAPES[size]
    config: Any = WORKLOADS[name](shape)
    model = config.model
    model.num_layers = shape.num_layers
    model.embed_dim = shape.embed_dim
    model.num_heads = shape.num_heads
    model.num_kv_heads = shape.num_heads
    model.head_dim = shape.head_dim
    model.mlp_dim = 4 * shape.embed_dim
    model.vocab_size = shape.vocab_size
    model.max_length = 1024
    model.init_std = 0.02
    if "reward_model" in config:
        config.reward_model = model
    return config
