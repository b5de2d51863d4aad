"""Which attention kernel a run takes, given its networks, row lengths and devices."""

import dataclasses
from typing import Any

import jax

from instructax.models.attention_kernels import (
    KernelConditions,
    device_platform,
    select_kernel,
)
from instructax.models.config import ComputeConfig

# (lengths of the rows that networks run without a cache, whether some of the segments in
# a row share a prefix): what `row_lengths(config)` of a stage returns.
RowLengths = tuple[tuple[int, ...], bool]
NO_ROWS: RowLengths = ((), False)


def split_lengths(compute: ComputeConfig, *widths: int) -> tuple[int, ...]:
    """Lengths of packed rows of `widths` and of the pieces that tail splits cut from them.

    The last rows of a batch run in halves, quarters and so on when the rest would be
    padding (`models.sequence_packing.microbatch_shapes`), so a kernel must take those too.
    """
    lengths: set[int] = set()
    for width in widths:
        for split in range(compute.tail_splits + 1):
            # Splits halve rows first and then columns, so the narrowest piece is never
            # below this.
            lengths.add(width >> split)
    return tuple(sorted(lengths))


def select_attention_kernel(
    config: Any, row_lengths: RowLengths, *, side_by_side: bool = False
) -> tuple[Any, str]:
    """Selects the kernel of a run.

    Args:
      config: config of a stage, with a field `compute`.
      row_lengths: what the stage's `row_lengths(config)` returns; `NO_ROWS` where only the
        sampler runs.
      side_by_side: whether one program holds several runs.

    Returns:
      The config with the kernel as `compute.attention`, and the kernel with the reason.
      Raises ConfigError if the config names a kernel that cannot run.
    """
    # All devices of a run are alike.
    platform, version = device_platform(jax.devices()[0])
    lengths, shared_prefixes = row_lengths
    # A stage has one network or, in PPO, two; the kernel must run both.
    networks = []
    for name in ("model", "reward_model"):
        if hasattr(config, name):
            networks.append(getattr(config, name))
    # What the strictest network of the run needs.
    conditions = KernelConditions(
        platform=platform,
        version=version,
        dtype=config.compute.dtype,
        head_dims=[network.head_dim for network in networks],
        lengths=lengths,
        softcap=any(network.attention_softcap > 0 for network in networks),
        sliding_window=any(network.sliding_window > 0 for network in networks),
        shared_prefixes=shared_prefixes,
        vmapped_runs=side_by_side,
    )
    kernel, reason = select_kernel(config.compute.attention, conditions)
    # The manifest keeps the config as given ("auto"); only the run sees the resolved
    # kernel.
    compute = dataclasses.replace(config.compute, attention=kernel)
    return dataclasses.replace(config, compute=compute), f"{kernel} ({reason})"


def with_attention_kernel(config: Any, row_lengths: RowLengths) -> Any:
    """The config with its attention kernel selected; process 0 prints which and why."""
    config, attention = select_attention_kernel(config, row_lengths)
    if jax.process_index() == 0:
        print(f"attention: {attention}", flush=True)
    return config
