"""Log-probabilities of tokens from hidden states, and gradients of losses on them, computed
in chunks of a few positions.

Logits exist for `chunk` positions of each row only, forward and backward: no [B, T, V]
array is ever made. Masked-in positions are sorted to the front, and chunks without any are
skipped, so positions outside the loss mask, such as prompts, cost nothing. A loss and its
gradients come from one pass, so logits are computed once.

How the chunking works, for rows of T = 6 positions, chunk = 2 and a mask 0 0 1 0 1 1:

    order     2 4 5 0 1 3          masked-in positions first, both groups in order
    chunks    [2 4] [5 0] [1 3]    3 chunks
    used      2                    the last chunk has no masked-in position in any row
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instructax.models.ops import einsum, max_over_batch, softcap
from instructax.types import Array

# Lower bound of logits after scaling. No sum over a response overflows: −3e38 is the lowest
# float32.
LOWEST_LOGIT = -1e30

# A loss on one chunk: (logprobs f32[B, c], mask b[B, c], extras, a tree of [B, c]) →
# (loss f32[], metrics f32[] each), all means over the mask.
TokenLoss = Callable[[Array, Array, Any], tuple[Array, dict[str, Array]]]


def compute_logits(hidden: Array, kernel: Array, cap: float) -> Array:
    """Logits: hidden dtype[..., D], kernel f32[V, D] → f32[..., V].

    The kernel is rounded to the dtype of the hidden states; sums are float32. `cap` is the
    final soft cap; 0 = off.
    """
    # Axis names of the leading axes.
    lead = "abc"[: hidden.ndim - 1]
    # The largest array of the network, f32[..., V], so its leading axes are kept small.
    logits = einsum(
        f"{lead}d,vd->{lead}v", hidden.astype(jnp.float32), kernel, hidden.dtype.name
    )
    return softcap(logits, cap)


def scaled_logits(logits: Array, temperature: Array | float) -> Array:
    """(logits − max) / temperature, whose softmax is that of logits / temperature.

    The maximum is subtracted first: logits divided by a tiny temperature would overflow.
    For the same reason no value is below `LOWEST_LOGIT`, so log-probabilities are finite.

    Args:
      logits: f32[..., V].
      temperature: positive, broadcast to [..., 1].

    Returns:
      f32[..., V], with a maximum of 0 along the last axis.
    """
    # The shift cancels in the softmax, so no gradient needs to pass through it.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.maximum((logits - largest) / temperature, LOWEST_LOGIT)


def sequence_logprobs(
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
    cap: float,
) -> Array:
    """log softmax(logits / temperature) at the targets; differentiable.

    Args:
      hidden: dtype[B, T, D].
      kernel: f32[V, D].
      targets: i32[B, T].
      mask: b[B, T], the positions to compute.
      temperature: divides the logits.
      chunk: positions per row whose logits exist at one time.
      cap: as in `compute_logits`.

    Returns:
      f32[B, T], zero where masked out.
    """
    function = partial(_logprobs, temperature=temperature, cap=cap)
    return _map_chunks(function, hidden, kernel, targets, mask, chunk)


def sequence_logprobs_and_entropy(
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
    cap: float,
) -> tuple[Array, Array]:
    """`sequence_logprobs`, and the entropy in nats of each position's distribution: both
    f32[B, T], zero where masked out."""
    function = partial(_logprobs_and_entropy, temperature=temperature, cap=cap)
    return _map_chunks(function, hidden, kernel, targets, mask, chunk)


def sequence_logprobs_and_greedy(
    hidden: Array, kernel: Array, targets: Array, mask: Array, *, chunk: int, cap: float
) -> tuple[Array, Array]:
    """`sequence_logprobs` at temperature 1, and whether each target is the argmax (the
    first one of ties): f32[B, T], b[B, T], zero and False where masked out."""
    function = partial(_logprobs_and_greedy, cap=cap)
    logprobs, greedy = _map_chunks(function, hidden, kernel, targets, mask, chunk)
    return logprobs, greedy > 0


def top_logprobs(
    hidden: Array, kernel: Array, *, count: int, chunk: int, cap: float
) -> tuple[Array, Array]:
    """The `count` most likely tokens at each position, the most likely first.

    Args:
      hidden: dtype[B, T, D].
      kernel: f32[V, D].
      count: tokens per position.
      chunk, cap: as in `sequence_logprobs`.

    Returns:
      Log-probabilities f32[B, T, count] and token ids i32[B, T, count].
    """
    batch, length, features = hidden.shape
    chunk = min(chunk, length)
    # Every position is computed here, so the order stays as it is.
    # [B, T, D] → [chunks, B, chunk, D]; the padding is cut off again in `to_rows`.
    padded = jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))
    chunks = padded.reshape(batch, -1, chunk, features).swapaxes(0, 1)

    def top(hidden: Array) -> Any:
        logits = compute_logits(hidden, kernel, cap)
        return jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)

    def to_rows(x: Array) -> Array:  # [chunks, B, chunk, count] → [B, T, count]
        return x.swapaxes(0, 1).reshape(batch, -1, count)[:, :length]

    logprobs, ids = jax.lax.map(top, chunks)
    return to_rows(logprobs), to_rows(ids)


def loss_and_gradients(
    loss_of: TokenLoss,
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    extras: Any,
    *,
    temperature: Array | float,
    chunk: int,
    cap: float,
) -> tuple[Array, dict[str, Array], Array, Array]:
    """A loss that is a mean over masked-in tokens of a function of each token's own
    log-probability, and its gradients, in one pass over the chunks.

    Args:
      loss_of: the loss and metrics of one chunk.
      hidden, kernel, targets, mask, temperature, chunk, cap: as in `sequence_logprobs`.
      extras: tree of [B, T] that `loss_of` gets beside the log-probabilities.

    Returns:
      (loss f32[], metrics, gradient of hidden dtype[B, T, D], of kernel f32[V, D]).
    """
    chunks, to_rows, used = _split_chunks((hidden, targets, mask, extras), mask, chunk)
    # Of the whole batch, not of a chunk.
    total = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    chunk_loss = partial(
        _chunk_loss, loss_of=loss_of, total=total, temperature=temperature, cap=cap
    )
    # With respect to hidden states and kernel; targets and mask are data.
    gradients_of = jax.grad(chunk_loss, argnums=(0, 1), has_aux=True)

    def gradients_at(index: Array) -> Any:
        # The chunk at `index` of every array: [B, chunk, ...].
        hidden, *rest = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), chunks
        )
        return gradients_of(hidden, kernel, *rest)

    hidden_gradients, kernel_gradient, metrics = _add_chunks(
        gradients_at, used, chunks[0], kernel
    )
    loss = metrics.pop("loss")
    return loss, metrics, to_rows(hidden_gradients), kernel_gradient


def _chunk_loss(
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    extras: Any,
    *,
    loss_of: TokenLoss,
    total: Array,
    temperature: Array | float,
    cap: float,
) -> tuple[Array, dict[str, Array]]:
    """The terms of one chunk in the loss and the metrics of a batch with `total` tokens."""
    logprobs = _logprobs(hidden, kernel, targets, temperature=temperature, cap=cap)
    loss, metrics = loss_of(logprobs, mask, extras)
    # The chunk's share of the tokens turns its means into terms of the batch's means.
    share = jnp.sum(mask, dtype=jnp.float32) / total
    weighted = {name: share * value for name, value in metrics.items()}
    return share * loss, {"loss": share * loss} | weighted


def _add_chunks(
    gradients_at: Callable[[Array], Any], used: Array, hidden: Array, kernel: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """Runs `gradients_at` for the first `used` chunks.

    Args:
      gradients_at: index of a chunk → ((gradient of its hidden states, of the kernel),
        metrics).
      used: i32[].
      hidden: [chunks, B, chunk, D], for the shape.
      kernel: f32[V, D], for the shape.

    Returns:
      Gradient of `hidden`, and the sums of the kernel's gradient and of the metrics.
    """

    def add(index: Array, state: Any) -> Any:
        (hidden_gradient, kernel_gradient), metrics = gradients_at(index)
        hidden_gradients, sums = state
        # Each chunk owns its positions, but all chunks add to the kernel's gradient.
        hidden_gradients = jax.lax.dynamic_update_index_in_dim(
            hidden_gradients, hidden_gradient, index, 0
        )
        sums = jax.tree.map(jnp.add, sums, (kernel_gradient, metrics))
        return hidden_gradients, sums

    # The names of the metrics are known only after tracing the loss.
    _, metric_shapes = jax.eval_shape(lambda: gradients_at(jnp.int32(0)))
    no_metrics = jax.tree.map(lambda x: jnp.zeros((), x.dtype), metric_shapes)
    start = (jnp.zeros_like(hidden), (jnp.zeros_like(kernel), no_metrics))
    # A loop instead of a scan: the number of chunks in use is known only on the device.
    hidden_gradients, (kernel_gradient, metrics) = jax.lax.fori_loop(0, used, add, start)
    return hidden_gradients, kernel_gradient, metrics


def _logprobs(hidden, kernel, targets, *, temperature, cap):
    logits = scaled_logits(compute_logits(hidden, kernel, cap), temperature)
    # Only the chosen logit and the normalizer: no f32[B, c, V] of log-probabilities.
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _logprobs_and_entropy(hidden, kernel, targets, *, temperature, cap):
    logits = scaled_logits(compute_logits(hidden, kernel, cap), temperature)
    # The entropy needs the whole distribution.
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _logprobs_and_greedy(hidden, kernel, targets, *, cap):
    logits = compute_logits(hidden, kernel, cap)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    greedy = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return chosen - jax.nn.logsumexp(logits, axis=-1), greedy


def _split_chunks(
    tree: Any, mask: Array, chunk: int
) -> tuple[Any, Callable[[Array], Array], Array]:
    """Splits a tree of [B, T, ...] into chunks, each row's masked-in positions first.

    Returns:
      The tree as [chunks, B, chunk, ...], the inverse for one array, and the number of
      chunks with a masked-in position, i32[].
    """
    batch, length = mask.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    # A stable sort of booleans: False (masked in) first, each group in its old order.
    order = jnp.argsort(~mask, axis=1, stable=True)  # [B, T]
    inverse = jnp.argsort(order, axis=1)

    def to_chunks(x: Array) -> Array:
        # Padding comes last, and its mask is False.
        x = _take_positions(x, order)
        x = jnp.pad(x, ((0, 0), (0, padding), *(((0, 0),) * (x.ndim - 2))))
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def to_rows(x: Array) -> Array:
        x = x.swapaxes(0, 1).reshape(batch, length + padding, *x.shape[3:])
        return _take_positions(x[:, :length], inverse)

    # Rows differ in their number of masked-in positions; the longest row decides.
    longest = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    # Under `vmap` all runs loop equally long.
    used = max_over_batch(-(-longest // chunk))
    return jax.tree.map(to_chunks, tree), to_rows, used


def _take_positions(x: Array, order: Array) -> Array:
    """x[b, order[b, t], ...] of x [B, T, ...]."""
    index = jnp.expand_dims(order, tuple(range(2, x.ndim)))
    return jnp.take_along_axis(x, index, axis=1)


def _map_chunks(
    function: Any, hidden: Array, kernel: Array, targets: Array, mask: Array, chunk: int
) -> Any:
    """Applies `function(hidden, kernel, targets)` chunk by chunk: a tree of f32[B, T], zero
    where masked out."""
    chunks, to_rows, used = _split_chunks((hidden, targets), mask, chunk)
    out_shapes = jax.eval_shape(lambda: function(chunks[0][0], kernel, chunks[1][0]))

    def compute(hidden: Array, targets: Array) -> Any:
        return function(hidden, kernel=kernel, targets=targets)

    # Must return the same tree as `compute`.
    def skip(_hidden: Array, _targets: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shapes)

    def step(_, inputs):
        index, (hidden, targets) = inputs
        return None, jax.lax.cond(index < used, compute, skip, hidden, targets)

    # Recompute the logits in the backward pass instead of saving them.
    step = jax.checkpoint(step, prevent_cse=False)
    # A scan instead of a loop, because this has to be differentiable.
    indices = jnp.arange(chunks[0].shape[0])
    _, outputs = jax.lax.scan(step, None, (indices, chunks))
    return jax.tree.map(lambda x: jnp.where(mask, to_rows(x), 0.0), outputs)
