"""The sampler: what it is asked (`draw`), the prompts' forward pass (`prefill`), and
responses under way (`slots`)."""

from instructax.generation.decoding import sample_token
from instructax.generation.prefill import prefill_padding
from instructax.generation.sampler import (
    SamplingState,
    advance_sampling,
    generate,
    start_sampling,
)

__all__ = [
    "SamplingState",
    "advance_sampling",
    "generate",
    "prefill_padding",
    "sample_token",
    "start_sampling",
]
