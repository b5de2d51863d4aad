"""How many operations the model of a workload needs.

Operations are 2 for each multiply-add: per token of a forward pass 2 · (N + V · D), with N
the parameters of the layers and V · D those of the head (where logits are needed), and
2 · L · H · d · T for causal attention over T tokens. A backward pass costs twice as much,
or as much if only adapters are trained. Recomputation is not counted.
"""

from collections.abc import Mapping
from typing import Any

from instructax.models.config import ModelConfig


def update_cost(config: Any) -> int:
    """Cost of a forward and a backward pass, in forward passes.

    The backward pass computes two gradients, each at the cost of a forward pass: of the
    inputs and of the parameters. With adapters the second one costs almost nothing.
    """
    # `pretrain` has no adapters and no field for them.
    return 2 if hasattr(config, "lora") and config.lora.rank else 3


def forward_operations(
    config: ModelConfig, tokens: float, length: float, scored: float
) -> float:
    """Operations of a forward pass.

    Args:
      config: the architecture.
      tokens: number of tokens.
      length: tokens of each sequence, which attend to each other.
      scored: number of positions at which the head computes logits.
    """
    # Multiply-adds per token in the matrices of one layer: attention, then MLP.
    block = (
        config.embed_dim
        * config.head_dim
        * (2 * config.num_heads + 2 * config.num_kv_heads)
    )
    block += config.embed_dim * config.mlp_dim * (3 if config.gated_mlp else 2)

    # In a sequence of T tokens a token sees T / 2 of them on average, and with a window of
    # w tokens w − w² / 2T. `seen` is the sum over layers.
    near = min(config.sliding_window, length)
    window_layers = len(config.window_layers)
    seen = (config.num_layers - window_layers) * length / 2 + window_layers * (
        near - near**2 / (2 * max(length, 1))
    )
    # Two products with each key: the scores, and the weighted sum of values.
    attention = 4 * config.num_heads * config.head_dim * seen
    return (
        tokens * (2 * config.num_layers * block + attention)
        + 2 * scored * config.vocab_size * config.embed_dim
    )


def iteration_operations(
    config: Any, metrics: Mapping[str, float], text_rows: int
) -> float:
    """Operations of one iteration of PPO, from its metrics."""
    length = metrics["tokens"] / config.batch_size
    response_tokens = config.batch_size * metrics["response_length"]
    # Logits are needed at the response tokens only.
    policy = forward_operations(config.model, metrics["tokens"], length, response_tokens)
    scalar = forward_operations(config.reward_model, metrics["tokens"], length, 0)
    width = config.data.limits.sequence_tokens
    text_tokens = text_rows * width
    text = forward_operations(config.model, text_tokens, width, text_tokens)
    # Forward passes: sampler and reference, value model and reward model. Then the
    # updates of policy and value model, and the pretraining text.
    return (
        2 * policy
        + 2 * scalar
        + update_cost(config) * (config.inner_epochs * (policy + scalar) + text)
    )
