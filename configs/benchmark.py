"""Work to measure: sft, reward (nine responses to a prompt), reward4, reward2 and ppo, each
at S and at M.

Command:   python scripts/benchmark.py --config configs/benchmark.py:ppo,S

S: 6 layers of 384, 8,192 words (14M parameters); M: 12 of 768, 50,257 words (124M): the
shapes that peers were measured at. float32; random parameters and tokens. The rows of sft
are full, one text each, and every token is trained.
"""

import ml_collections

from configs import ppo, pretrain, reward_model
from instructax.config import ConfigError

ARCHITECTURES = {"S": (6, 384, 6, 64, 8192), "M": (12, 768, 12, 64, 50257)}
STAGES = {
    "sft": pretrain,
    "ppo": ppo,
    "reward": reward_model,
    "reward4": reward_model,
    "reward2": reward_model,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """A run of one stage, `arg` STAGE,SIZE."""
    name, _, size = arg.partition(",")
    if name not in STAGES or size not in ARCHITECTURES:
        raise ConfigError(
            f"benchmark {arg!r} must be one of {', '.join(STAGES)} and one of S, M: ppo,S"
        )
    config = STAGES[name].get_config("small")
    layers, width, heads, head_dim, vocabulary = ARCHITECTURES[size]
    model = config.model
    (
        model.num_layers,
        model.embed_dim,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
    ) = layers, width, heads, heads, head_dim
    model.mlp_dim, model.vocab_size, model.max_length, model.init_std = (
        4 * width,
        vocabulary,
        1024,
        0.02,
    )
    limits = config.data.limits
    if name == "sft":
        config.batch_size, limits.sequence_tokens = (8 if size == "S" else 4), 256
        config.compute.head_chunk = 64
    elif name.startswith("reward"):
        limits.completions = int(name.removeprefix("reward") or 9)
        limits.prompt_tokens, limits.response_tokens = 256, 32
        config.batch_size, config.compute.microbatch_rows, config.compute.tail_splits = (
            1,
            1,
            0,
        )
    else:
        limits.prompt_tokens, limits.response_tokens, limits.sequence_tokens = 64, 64, 256
        config.batch_size, config.minibatches, config.ptx_coef = 32, 4, 0.0
        config.compute.head_chunk, config.compute.slots, config.compute.compaction_steps = (
            128,
            32,
            3,
        )
        config.compute.microbatch_rows, config.compute.tail_splits = (
            4,
            0,
        )  # a minibatch of full length
        config.reward_model = model
    return config
