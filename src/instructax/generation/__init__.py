"""Samples responses: prefill, then decoding in slots."""

from instructax.generation.prefill import prefill_padding
from instructax.generation.sampler import (
    SamplingState,
    advance_sampling,
    generate,
    start_sampling,
)
from instructax.generation.token_sampling import sample_token

__all__ = [
    "SamplingState",
    "advance_sampling",
    "generate",
    "prefill_padding",
    "sample_token",
    "start_sampling",
]
