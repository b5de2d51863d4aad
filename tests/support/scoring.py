"""Per-response log-probabilities, values and scores, computed with the packed scoring
functions."""

from instructax.models.scoring import (
    comparison_sequences,
    packed_logprobs,
    packed_outputs,
    packed_values,
    rollout_sequences,
    select_last_token,
)
from instructax.models.transformer import Transformer
from instructax.types import Array, Comparisons, Params, Rollouts


def token_logprobs(
    model: Transformer, params: Params, rollouts: Rollouts, *, temperature: Array | float
) -> Array:
    """Log-probability of each response token given all previous tokens: f32[B, R], zero
    where masked."""
    rows = rollout_sequences(rollouts)
    logprobs = packed_logprobs(model, params, rows, temperature=temperature)
    return logprobs[:, rollouts.prompts.tokens.shape[1] :]


def token_values(model: Transformer, params: Params, rollouts: Rollouts) -> Array:
    """The value model's estimate before each response token: f32[B, R], zero where
    masked."""
    values = packed_values(model, params, rollout_sequences(rollouts))
    return values[:, rollouts.prompts.tokens.shape[1] :]


def sequence_scores(
    model: Transformer, params: Params, responses: Comparisons | Rollouts
) -> Array:
    """The scalar head at the last real token: f32[B] for Rollouts, f32[B, K] for
    Comparisons.

    An empty response is scored at the last token of its prompt.
    """
    if isinstance(responses, Rollouts):
        rows = rollout_sequences(responses)
    else:
        rows = comparison_sequences(responses)
    return select_last_token(packed_outputs(model, params, rows), responses)
