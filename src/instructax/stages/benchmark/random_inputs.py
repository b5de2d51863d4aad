"""Random batches and parameters for the workloads of the benchmark.

All lengths are the largest that the config allows, so there is no padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.models.config import ModelConfig
from instructax.stages.ppo.program import PpoProgram
from instructax.training.state import init_state
from instructax.types import Comparisons, LmBatch, Params, Prompts


def _tokens(config: ModelConfig, shape: tuple[int, ...]) -> Any:
    """Random token ids i32[*shape], the same in every call."""
    # A fixed seed: two runs of the benchmark measure the same batch.
    return np.random.default_rng(0).integers(config.vocab_size, size=shape).astype(np.int32)


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    """A numpy array; typed as Any, since `types` names the JAX arrays that it becomes on a
    device."""
    return np.full(shape, value)


def random_text(config: Any, rows: int) -> LmBatch:
    """Packed rows [rows, T] of one document each, without padding."""
    shape = (rows, config.data.limits.sequence_tokens)
    positions: Any = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return LmBatch(
        tokens=_tokens(config.model, shape),
        # One segment per row, so attention covers the whole row.
        segments=_filled(shape, np.int32(1)),
        positions=positions,
        loss_mask=positions > 0,  # nothing predicts the first token
    )


def random_prompts(config: Any) -> Prompts:
    """Prompts [B, P] of full length."""
    shape = (config.batch_size, config.data.limits.prompt_tokens)
    return Prompts(tokens=_tokens(config.model, shape), mask=_filled(shape, True))


def random_comparisons(config: Any) -> Comparisons:
    """Prompts with K responses [B, K, R] of full length, ranked without ties."""
    limits = config.data.limits
    rows = config.batch_size
    shape = (rows, limits.completions, limits.response_tokens)
    # K responses have K · (K − 1) / 2 pairs, the most that there can be.
    ranks: Any = np.broadcast_to(np.arange(limits.completions, dtype=np.int32), shape[:2])
    return Comparisons(
        prompts=random_prompts(config),
        responses=_tokens(config.model, shape),
        mask=_filled(shape, True),
        ranks=ranks,
        valid=_filled(shape[:2], True),
        labeler=_filled((rows,), np.int32(0)),
    )


def eos_id_for(config: Any, ending: float) -> int:
    """The end token: the last id of the vocabulary, or, if no response may end early, one
    past it, which is never sampled."""
    return config.model.vocab_size - (ending > 0)


def random_policy(program: PpoProgram, ending: float) -> Params:
    """Random parameters of a policy that ends responses with probability `ending`, roughly,
    at each token.

    The bias of the final norm and the embedding of the end token are set to the same
    direction. It adds a constant to the logit of the end token, and next to nothing to the
    others.
    """
    params = init_state(
        program.policy, program.policy_optimizer, jax.random.key(0), program.mesh
    ).params
    if ending == 0:
        return params
    # With logit z of the end token its probability is e^z / (e^z + V · mean of the others).
    vocabulary, width = params["embedding"].shape
    direction = jnp.full((width,), width**-0.5)  # f32[D], a unit vector
    # The other logits are spread around 0 with this variance, so the mean of their
    # exponentials is above 1: e^(spread / 2).
    spread = program.policy.config.init_std**2 * (width + 1)
    logit = jnp.log(ending / (1 - ending) * vocabulary) + spread / 2
    norm = {**params["final_norm"], "bias": direction}
    # The output head is tied to the embedding, so its row is the head's row too.
    return {
        **params,
        "final_norm": norm,
        "embedding": params["embedding"].at[program.eos_id].set(logit * direction),
    }
