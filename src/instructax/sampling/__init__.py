"""The sampler: what it is asked (`draw`), the prompts' forward pass (`prefill`), and responses under way (`slots`)."""

from instructax.sampling.draw import Sampling, advance, generate, start
from instructax.sampling.prefill import prefill_padding
from instructax.sampling.slots import sample_token

__all__ = ["Sampling", "advance", "generate", "prefill_padding", "sample_token", "start"]
