"""Attention kernels for rows without a cache: which one a run uses, and how each is called.

Experimental: "cudnn" and "splash" have been tested against the reference with XLA's and
Pallas' emulation only. They have never run on an accelerator.

"jax" is `attention.attend_causally`: matrix products and a mask, on every platform. "cudnn"
is cuDNN's fused attention as JAX calls it. The mask is passed as a bias of two bytes per
query and key, shared by all heads, and the backward pass writes its unused gradient of the
same size. "splash" is Pallas' kernel for TPUs; it reads segments and builds no array of
queries × keys. Calls with a cache always use `attention.attend`.

Splash lets a query see a key if their segments are equal. Shared prefixes cannot be
expressed so: two responses that see their prompt's keys would have its segment, and the
second response would see the first.
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

# Row lengths are a multiple of this: splash's smallest block. With 64 more tokens cuDNN's
# gradients were NaN (pytorch#196678).
ROW_TOKENS = 128
# Queries, and keys, of one step of splash, at most: MaxText's default.
MAX_BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConditions:
    """What decides whether a kernel can run: the device, and what the networks compute."""

    # cpu, cuda, rocm or tpu
    platform: str
    # Compute capability of a CUDA device, generation of a TPU; else 0
    version: float
    # Config.compute.dtype
    dtype: str
    # Of all networks of the run
    head_dims: Sequence[int]
    # Of the rows that run without a cache
    lengths: Sequence[int]
    # A network caps its attention scores
    softcap: bool
    # A network has sliding windows
    sliding_window: bool
    # Segments of a row share another one, as responses their prompt
    shared_prefixes: bool
    # One program holds several runs, by `vmap`
    vmapped_runs: bool


@dataclasses.dataclass(frozen=True)
class KernelSupport:
    """The hardware and head dims that a kernel is known to support."""

    platform: str
    min_version: float
    head_dims: range


KERNEL_SUPPORT = {
    # JAX's own checks (jax._src.cudnn.fused_attention_stablehlo), which also allow a head
    # dim of 256 from compute capability 9.0 on.
    "cudnn": KernelSupport("cuda", 8.0, range(8, 129, 8)),
    # What JAX's tests run (tests/pallas/tpu_splash_attention_kernel_test.py).
    "splash": KernelSupport("tpu", 4, range(128, 257, 128)),
}


def obstacle(kernel: str, given: KernelConditions) -> str:
    """The first reason why `kernel` cannot run, with what is allowed; "" if it can."""
    support = KERNEL_SUPPORT[kernel]
    bad_dim = next((dim for dim in given.head_dims if dim not in support.head_dims), None)
    bad_length = next((n for n in given.lengths if n % ROW_TOKENS), None)
    step = support.head_dims.step
    largest = support.head_dims[-1]
    is_splash = kernel == "splash"
    # In the order in which a user would want to hear of them: the device first.
    obstacles = (
        (
            given.platform != support.platform,
            f"platform {given.platform}, allowed is {support.platform}",
        ),
        (
            given.version < support.min_version,
            f"{given.platform} {given.version:g}, allowed is {support.min_version:g} or "
            "newer",
        ),
        (not given.lengths, "only samplers run, and they have a cache"),
        (
            given.dtype == "float32",
            "config.compute.dtype = 'float32', allowed is 'bf16_matmul' or 'bf16'",
        ),
        (
            bad_dim is not None,
            f"head_dim = {bad_dim}, allowed is a multiple of {step} up to {largest}",
        ),
        (
            bad_length is not None,
            f"rows of {bad_length} tokens, allowed is a multiple of {ROW_TOKENS}",
        ),
        (given.softcap, "model.attention_softcap is set, allowed is 0"),
        (
            given.sliding_window and is_splash,
            "model.sliding_window is set, allowed is 0",
        ),
        (given.vmapped_runs, "several runs in one program, allowed is one"),
        (
            given.shared_prefixes and is_splash,
            "responses share a prompt in one row, allowed is one sequence per segment",
        ),
    )
    return next((reason for applies, reason in obstacles if applies), "")


def select_kernel(requested: str, given: KernelConditions) -> tuple[str, str]:
    """Resolves `config.compute.attention` to (jax, cudnn or splash; the reason).

    "auto" takes the platform's own kernel unless something prevents it. Raises ConfigError
    if a kernel that is requested by name cannot run.
    """
    if requested == "auto":
        # At most one fused kernel exists for a platform.
        native = None
        for kernel, support in KERNEL_SUPPORT.items():
            if support.platform == given.platform:
                native = kernel
        if native is None:
            return "jax", f"auto: {given.platform} has no other"
        reason = obstacle(native, given)
        if reason:
            return "jax", f"auto: no {native}: {reason}"
        return native, f"auto: {given.platform}"

    reason = obstacle(requested, given) if requested in KERNEL_SUPPORT else ""
    require(
        not reason,
        f"config.compute.attention = {requested!r} cannot run: {reason}; change that, or "
        "give 'jax' or 'auto'",
    )
    return requested, "as requested"


def device_platform(device: Any) -> tuple[str, float]:
    """The platform and version of `KernelConditions`."""
    if device.platform == "tpu":  # device kinds are "TPU v5 lite", "TPU7x"
        generation = re.search(r"\d+", device.device_kind)
        return "tpu", float(generation[0]) if generation else 0.0
    if device.platform != "gpu":
        return device.platform, 0.0
    # JAX calls both NVIDIA and AMD devices "gpu".
    if "cuda" in device.client.platform_version:
        return "cuda", float(device.compute_capability)
    return "rocm", 0.0


def packed_attention(
    name: str, segments: Array, mesh: Any
) -> tuple[Callable[..., Array], Array]:
    """The attention function of a kernel, and its mask, for rows without a cache.

    Kernels run on each device's own rows and heads: compilers cannot partition splash, and
    cuDNN's call fails if mask and queries are partitioned differently.

    Args:
      name: a result of `select_kernel`; others raise ValueError.
      segments: i32[B, T].
      mesh: the mesh of the run; None for one device.

    Returns:
      A function like `attend_causally`, and the array that it takes as its mask.
    """
    if name == "jax":
        return attend_causally, attention_mask(segments, segments, 0)
    if name not in KERNEL_SUPPORT:
        raise ValueError(
            f"compute.attention = {name!r} must be resolved by select_kernel before a "
            "network runs"
        )
    kernel = attend_with_splash if name == "splash" else attend_with_cudnn

    def attend(
        query: Array, key: Array, value: Array, mask: Array, matmul_dtype: str
    ) -> Array:
        # Batch and heads are split over devices; no device needs another one's keys.
        local = partial(kernel, matmul_dtype=matmul_dtype)
        return sharding.shard_map_attention(local, mesh)(query, key, value, mask)

    # i32[B, T] for splash, b[B, T, T] for cuDNN.
    mask = segments if name == "splash" else attention_mask(segments, segments, 0)
    return attend, mask


def attend_with_cudnn(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    matmul_dtype: str,
    *,
    implementation: Any = "cudnn",
) -> Array:
    """`attend_causally` by cuDNN. Weights and outputs are rounded to `matmul_dtype` too.

    `implementation` = "xla" makes the same call without cuDNN, for tests.
    """
    # cuDNN takes [B, T, heads, head_dim].
    query_rows = query.swapaxes(1, 2).astype(matmul_dtype)
    key_rows = key.swapaxes(1, 2).astype(matmul_dtype)
    value_rows = value.swapaxes(1, 2).astype(matmul_dtype)
    output = jax.nn.dot_product_attention(
        query_rows,
        key_rows,
        value_rows,
        mask=mask[:, None],
        is_causal=True,  # implied by the mask; lets cuDNN skip later keys
        implementation=implementation,
    )
    return output.swapaxes(1, 2).astype(query.dtype)


def attend_with_splash(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    matmul_dtype: str,
    *,
    interpret: bool = False,
) -> Array:
    """`attend_causally` by Pallas' splash attention, for rows without shared prefixes.

    Takes segments i32[B, T] in place of the mask; padding attends to padding. `interpret`
    emulates the kernel, for tests.
    """
    # Imported here because it takes a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, heads, length, head_dim = query.shape
    # The largest power of two up to MAX_BLOCK that divides the length.
    block = math.gcd(length, MAX_BLOCK)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # Masks of segments and causality are combined inside the kernel.
    causal = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    attend: Any = splash.make_splash_mha(
        causal, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    # Splash does not scale the scores.
    scaled = (query.astype(jnp.float32) / np.sqrt(head_dim)).astype(matmul_dtype)
    # The kernel takes one row: [heads, T, d].
    output = jax.vmap(attend)(
        scaled,
        key.astype(matmul_dtype),
        value.astype(matmul_dtype),
        splash.SegmentIds(segments, segments),
    )
    return output.astype(query.dtype)
