"""The kernels that attend within whole rows: which of them a run takes, and how each is
called.

"jax" is `attention.attend_causally`: products and a mask, anywhere. "cudnn" is cuDNN's
fused attention as JAX calls it: the mask goes in as a bias of two bytes for each query and
key of a row, once for all heads, and the backward pass writes its gradient, of the same
size, which nobody reads. "splash" is Pallas' kernel for TPUs: it reads segments, and no
array of queries × keys is made. What goes through a cache is attended to by
`attention.attend` whatever the kernel.

Splash lets a query see a key if both have the same number. Branches need more: if two
responses see the keys of their prompt, all three have one number, and the second response
sees the first.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax import sharding
from instructax.config import require
from instructax.models.attention import attend_causally, attention_mask
from instructax.types import Array

ROW_TOKENS = 128  # rows are multiples: splash's blocks; cuDNN's gradients were NaN at 64 more (pytorch#196678)
BLOCK = 512  # the most queries, and keys, of one step of splash: MaxText's default


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConditions:
    """Where a run computes, and what its networks attend within."""

    platform: str  # cpu, cuda, rocm or tpu
    version: float  # compute capability of a CUDA device, generation of a TPU; else 0
    dtype: str  # config.compute.dtype
    head_dims: Sequence[int]  # of all networks of the run
    lengths: Sequence[int]  # of the rows that are run without a cache
    softcap: bool  # whether a network caps its scores
    sliding_window: bool  # whether a network has windows
    shared_prefixes: (
        bool  # whether texts in a row share another one: responses their prompt
    )
    vmapped_runs: bool  # whether one program holds several runs, by `vmap`


@dataclasses.dataclass(frozen=True)
class KernelSupport:
    """Where a kernel is known to run."""

    platform: str
    oldest: float  # version
    head_dims: range


KERNEL_SUPPORT = {
    # JAX's checks (jax._src.cudnn.fused_attention_stablehlo), which allow 256 from compute
    # capability 9.0 on.
    "cudnn": KernelSupport("cuda", 8.0, range(8, 129, 8)),
    # What its own tests run (tests/pallas/tpu_splash_attention_kernel_test.py of JAX).
    "splash": KernelSupport("tpu", 4, range(128, 257, 128)),
}


def obstacle(kernel: str, given: KernelConditions) -> str:
    """What keeps `kernel` from running, and what is allowed; "" if nothing does."""
    limits = KERNEL_SUPPORT[kernel]
    width = next(
        (width for width in given.head_dims if width not in limits.head_dims), None
    )
    length = next((length for length in given.lengths if length % ROW_TOKENS), None)
    steps, widest = limits.head_dims.step, limits.head_dims[-1]
    obstacles = (
        (
            given.platform != limits.platform,
            f"platform {given.platform}, allowed is {limits.platform}",
        ),
        (
            given.version < limits.oldest,
            f"{given.platform} {given.version:g}, allowed is {limits.oldest:g} or newer",
        ),
        (not given.lengths, "only samplers run, and they have a cache"),
        (
            given.dtype == "float32",
            "config.compute.dtype = 'float32', allowed is 'bf16_matmul' or 'bf16'",
        ),
        (
            width is not None,
            f"head_dim = {width}, allowed is a multiple of {steps} up to {widest}",
        ),
        (
            length is not None,
            f"rows of {length} tokens, allowed is a multiple of {ROW_TOKENS}",
        ),
        (given.softcap, "model.attention_softcap is set, allowed is 0"),
        (
            given.sliding_window and kernel == "splash",
            "model.sliding_window is set, allowed is 0",
        ),
        (given.vmapped_runs, "several runs in one program, allowed is one"),
        (
            kernel == "splash" and given.shared_prefixes,
            "texts in a row share another, allowed is each by itself",
        ),
    )
    return next((text for holds, text in obstacles if holds), "")


def select_kernel(asked: str, given: KernelConditions) -> tuple[str, str]:
    """(jax, cudnn or splash; why) for `config.compute.attention`.

    "auto" takes the platform's own kernel unless something keeps it from running. Raises
    ConfigError if something keeps a kernel from it that is asked for by name.
    """
    if asked == "auto":
        own = next(
            (
                kernel
                for kernel, limits in KERNEL_SUPPORT.items()
                if limits.platform == given.platform
            ),
            None,
        )
        if own is None:
            return "jax", f"auto: {given.platform} has no other"
        hindered = obstacle(own, given)
        return (
            ("jax", f"auto: no {own}: {hindered}")
            if hindered
            else (own, f"auto: {given.platform}")
        )
    hindered = obstacle(asked, given) if asked in KERNEL_SUPPORT else ""
    named = f"config.compute.attention = {asked!r}"
    require(
        not hindered,
        f"{named} cannot run: {hindered}; change that, or give 'jax' or 'auto'",
    )
    return asked, "as asked"


def device_platform(device: Any) -> tuple[str, float]:
    """(platform, version) of `KernelConditions`."""
    if device.platform == "tpu":  # "TPU v5 lite", "TPU7x"
        generation = re.search(r"\d+", device.device_kind)
        return "tpu", float(generation[0]) if generation else 0.0
    if device.platform != "gpu":
        return device.platform, 0.0
    return (
        ("cuda", float(device.compute_capability))
        if "cuda" in device.client.platform_version
        else ("rocm", 0.0)
    )


def kernel_of_rows(
    name: str, segments: Array, mesh: Any
) -> tuple[Callable[..., Array], Array]:
    """(a function as `attend_causally`, what it takes for a mask) for rows of `segments`
    i32[B, T].

    The kernels run on each device's own rows and heads: compilers cannot split splash, and
    cuDNN's call fails where they split mask and queries in two ways. Raises ValueError
    unless `name` is what `select_kernel` returns.
    """
    if name == "jax":
        return attend_causally, attention_mask(segments, segments, 0)
    if name not in KERNEL_SUPPORT:
        raise ValueError(
            f"compute.attention = {name!r} must be chosen before a network runs: stage.settled"
        )
    kernel = with_splash if name == "splash" else with_cudnn

    def attend(
        query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str
    ) -> Array:
        return sharding.shard_map_attention(
            partial(kernel, matmul_dtype=matmul_dtype), mesh
        )(query, key, value, mask)

    return attend, segments if name == "splash" else attention_mask(segments, segments, 0)


def with_cudnn(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    matmul_dtype: str,
    *,
    implementation: Any = "cudnn",
) -> Array:
    """As `attend_causally`; weights and outputs are rounded to `matmul_dtype` too.
    `implementation`: "xla" makes the same call without cuDNN."""
    rounded = (x.swapaxes(1, 2).astype(matmul_dtype) for x in (query, key, value))
    # Given that the mask is causal, cuDNN leaves out what comes later.
    mixed = jax.nn.dot_product_attention(
        *rounded, mask=mask[:, None], is_causal=True, implementation=implementation
    )
    return mixed.swapaxes(1, 2).astype(query.dtype)


def with_splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    matmul_dtype: str,
    *,
    interpret: bool = False,
) -> Array:
    """As `with_cudnn`, for rows without branches and with their segments in place of the
    mask; padding sees padding."""
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # a second to import

    _, heads, length, width = query.shape
    names = (
        "block_q",
        "block_kv",
        "block_q_dkv",
        "block_kv_dkv",
        "block_q_dq",
        "block_kv_dq",
    )
    blocks = splash.BlockSizes(**dict.fromkeys(names, math.gcd(length, BLOCK)))
    causal = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    attend: Any = splash.make_splash_mha(
        causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    scaled = (query.astype(jnp.float32) / np.sqrt(width)).astype(matmul_dtype)
    ids = splash.SegmentIds(segments, segments)
    return jax.vmap(attend)(
        scaled, key.astype(matmul_dtype), value.astype(matmul_dtype), ids
    ).astype(query.dtype)
