"""From hidden states to log-probabilities of tokens, and to the gradients of losses on
them, a few positions at a time.

Scores over the whole vocabulary exist for `chunk` positions of each row only: no buffer of
shape [B, T, V] is ever made. The positions that are asked for come first, and chunks
without any are passed over: what a loss does not see, such as a prompt, costs nothing here.
A loss and its gradients come out of the same pass, so that no score is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instructax.models.ops import max_over_batch, product, soft_capped
from instructax.types import Array

# (logprobs f32[B, c], mask b[B, c], extras [B, c] each) → (loss, metrics): means over the
# mask, all f32[].
TokenLoss = Callable[[Array, Array, Any], tuple[Array, dict[str, Array]]]


def compute_logits(hidden: Array, kernel: Array, cap: float = 0.0) -> Array:
    """Scores over the vocabulary: dtype[..., D], f32[V, D] → f32[..., V], soft-capped with
    a `cap` above 0. The kernel is rounded to the dtype of the hidden states, sums are
    float32."""
    rows = "abc"[: hidden.ndim - 1]
    logits = product(
        f"{rows}d,vd->{rows}v", hidden.astype(jnp.float32), kernel, hidden.dtype.name
    )
    return soft_capped(logits, cap)


def sequence_logprobs(
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
    cap: float = 0.0,
) -> Array:
    """log softmax(logits / temperature) at the targets where `mask`, else 0; `cap` is that
    of `compute_logits`.

    `hidden` dtype[B, T, D], `kernel` f32[V, D], `targets` i32[B, T], `mask` b[B, T] →
    f32[B, T]. Differentiable.
    """
    return _by_chunks(
        partial(_logprobs, temperature=temperature, cap=cap),
        hidden,
        kernel,
        targets,
        mask,
        chunk,
    )


def sequence_logprobs_and_entropy(
    hidden: Array,
    kernel: Array,
    targets: Array,
    mask: Array,
    *,
    temperature: Array | float,
    chunk: int,
    cap: float = 0.0,
) -> tuple[Array, Array]:
    """As `sequence_logprobs`, and the entropy in nats of the distribution at each position:
    (f32[B, T], f32[B, T])."""
    function = partial(_logprobs_and_entropy, temperature=temperature, cap=cap)
    return _by_chunks(function, hidden, kernel, targets, mask, chunk)


def sequence_logprobs_and_greedy(
    hidden: Array, kernel: Array, targets: Array, mask: Array, *, chunk: int, cap: float
) -> tuple[Array, Array]:
    """As `sequence_logprobs` at temperature 1, and whether each target is the likeliest
    token, the first of equals: (f32[B, T], b[B, T]), False where masked."""
    logprobs, greedy = _by_chunks(
        partial(_logprobs_and_greedy, cap=cap), hidden, kernel, targets, mask, chunk
    )
    return logprobs, greedy > 0


def top_logprobs(
    hidden: Array, kernel: Array, *, count: int, chunk: int, cap: float
) -> tuple[Array, Array]:
    """The `count` likeliest tokens at each position, the likeliest first: dtype[B, T, D],
    f32[V, D] → (log-probabilities f32[B, T, count], ids i32[B, T, count]); `cap` is that of
    `compute_logits`."""
    batch, length, width = hidden.shape
    chunk = min(chunk, length)
    slices = (
        jnp.pad(hidden, ((0, 0), (0, -length % chunk), (0, 0)))
        .reshape(batch, -1, chunk, width)
        .swapaxes(0, 1)
    )

    def likeliest(part: Array) -> Any:
        return jax.lax.top_k(
            jax.nn.log_softmax(compute_logits(part, kernel, cap), axis=-1), count
        )

    found = jax.lax.map(likeliest, slices)
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(batch, -1, count)[:, :length],
        (found[0], found[1]),
    )


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
    cap: float = 0.0,
) -> tuple[Array, dict[str, Array], Array, Array]:
    """A mean over the masked tokens of what depends on each token's own log-probability,
    and its gradients.

    Arrays as in `sequence_logprobs`; `extras` is a tree of [B, T] that `loss_of` reads
    beside the log-probabilities. Returns (loss, metrics, by hidden dtype[B, T, D], by
    kernel f32[V, D]).
    """
    slices, back, used = _chunks((hidden, targets, mask, extras), mask, chunk)
    total = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

    def share_of_loss(
        hidden: Array, kernel: Array, targets: Array, mask: Array, extras: Any
    ):
        loss, metrics = loss_of(
            _logprobs(hidden, kernel, targets, temperature=temperature, cap=cap),
            mask,
            extras,
        )
        share = jnp.sum(mask, dtype=jnp.float32) / total
        return share * loss, {"loss": share * loss} | {
            name: share * x for name, x in metrics.items()
        }

    gradients_of = jax.grad(share_of_loss, argnums=(0, 1), has_aux=True)

    def part(index: Array) -> Any:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), slices
        )

    def add(index: Array, sums: Any) -> Any:
        hidden, *rest = part(index)
        (by_hidden, by_kernel), figures = gradients_of(hidden, kernel, *rest)
        by_slices, others = sums
        by_slices = jax.lax.dynamic_update_index_in_dim(by_slices, by_hidden, index, 0)
        return by_slices, jax.tree.map(jnp.add, others, (by_kernel, figures))

    figures = jax.eval_shape(
        lambda: gradients_of(part(jnp.int32(0))[0], kernel, *part(jnp.int32(0))[1:])[1]
    )
    blank = (
        jnp.zeros_like(slices[0]),
        (jnp.zeros_like(kernel), jax.tree.map(lambda x: jnp.zeros((), x.dtype), figures)),
    )
    by_slices, (by_kernel, figures) = jax.lax.fori_loop(0, used, add, blank)
    loss = figures.pop("loss")
    return loss, figures, back(by_slices), by_kernel


def _logprobs(hidden, kernel, targets, *, temperature, cap):
    logits = compute_logits(hidden, kernel, cap) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _logprobs_and_entropy(hidden, kernel, targets, *, temperature, cap):
    logprobs = jax.nn.log_softmax(
        compute_logits(hidden, kernel, cap) / temperature, axis=-1
    )
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _logprobs_and_greedy(hidden, kernel, targets, *, cap):
    logits = compute_logits(hidden, kernel, cap)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    greedy = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return chosen - jax.nn.logsumexp(logits, axis=-1), greedy


def _chunks(
    tree: Any, mask: Array, chunk: int
) -> tuple[Any, Callable[[Array], Array], Array]:
    """(a tree of [B, T, …] as [slices, B, chunk, …], the masked positions of each row
    first; the way back for an array; the number of slices that hold a masked position)."""
    batch, length = mask.shape
    chunk = min(chunk, length)
    padding = -length % chunk
    order = jnp.argsort(~mask, axis=1, stable=True)
    inverse = jnp.argsort(order, axis=1)

    def sliced(x: Array) -> Array:
        x = _taken(x, order)
        x = jnp.pad(x, ((0, 0), (0, padding), *(((0, 0),) * (x.ndim - 2))))
        return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def back(x: Array) -> Array:
        return _taken(
            x.swapaxes(0, 1).reshape(batch, length + padding, *x.shape[3:])[:, :length],
            inverse,
        )

    most = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    return jax.tree.map(sliced, tree), back, max_over_batch(-(-most // chunk))


def _taken(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, jnp.expand_dims(order, tuple(range(2, x.ndim))), axis=1)


def _by_chunks(
    function, hidden: Array, kernel: Array, targets: Array, mask: Array, chunk: int
):
    """Applies `function(hidden, kernel, targets)` to slices of `chunk` positions and joins
    the results to [B, T]."""
    slices, back, used = _chunks((hidden, targets), mask, chunk)
    outs = jax.eval_shape(lambda: function(slices[0][0], kernel, slices[1][0]))

    def nothing(_hidden: Array, _targets: Array):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outs)

    def step(_, inputs):
        index, (hidden, targets) = inputs
        wanted = partial(function, kernel=kernel)
        return None, jax.lax.cond(
            index < used, lambda h, t: wanted(h, targets=t), nothing, hidden, targets
        )

    # The checkpoint makes the backward pass recompute the scores instead of keeping them.
    step = jax.checkpoint(step, prevent_cse=False)
    _, results = jax.lax.scan(step, None, (jnp.arange(slices[0].shape[0]), slices))
    return jax.tree.map(lambda x: jnp.where(mask, back(x), 0.0), results)
