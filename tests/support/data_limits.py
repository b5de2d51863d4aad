"""Limits that keep every record."""

from instructax.data.limits import DataLimits

# One split that keeps every record: no filter, no deduplication.
LIMITS = DataLimits(
    sequence_tokens=64,
    prompt_tokens=24,
    response_tokens=16,
    completions=4,
    prefix_characters=None,
    prompts_per_user=None,
    filter_pii=False,
    splits=(("train", 1.0),),
    split_seed=0,
)
# The same with few tokens per row, for rows that a test writes out.
SHORT_LIMITS = DataLimits(
    sequence_tokens=16,
    prompt_tokens=8,
    response_tokens=6,
    completions=3,
    prefix_characters=None,
    prompts_per_user=None,
    filter_pii=False,
    splits=(("train", 1.0),),
    split_seed=0,
)
