"""The one loop that all stages share, and the pieces of a step that they have in common."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from instructax import rng, sharding
from instructax.losses import next_token_loss
from instructax.models import Dropout, Transformer, add_lora, trainable
from instructax.models.scoring import packed_loss_and_gradients
from instructax.models.sequence_packing import PackedLayout, scan_packed_rows
from instructax.runtime.distributed import any_host
from instructax.runtime.nonfinite import NonFiniteGuard
from instructax.runtime.preemption import GracefulShutdown, StopRequested
from instructax.types import Array, LmBatch, Params, TrainState

Adapt = Callable[[Params], Params]


def _as_it_is(params: Params) -> Params:
    return params


def init_params(model: Transformer, key: Array) -> Params:
    """Fresh parameters, float32."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, tokens, tokens, tokens)["params"]


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with the given parameters; the optimizer has a state of what is trained alone."""
    return TrainState(
        step=jnp.int32(0), params=params, opt_state=optimizer.init(trainable(params))
    )


def adapters_of(config: Any, network: int = 0) -> Adapt:
    """What adds the adapters of a stage's config to parameters, the first ones of its
    network number `network`."""
    return lambda params: add_lora(
        params, config.lora, rng.step_key(config.seed, "adapters", network)
    )


def abstract_params(model: Transformer, mesh: Mesh) -> Params:
    """Shapes and layouts of the parameters, without data."""
    return sharding.abstract(
        jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh
    )


def abstract_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    adapt: Adapt = _as_it_is,
) -> TrainState:
    """Shapes and layouts of a state, without data."""
    shapes = jax.eval_shape(
        lambda: new_state(adapt(init_params(model, jax.random.key(0))), optimizer)
    )
    return sharding.abstract(shapes, mesh)


def layouts(tree: Any) -> Any:
    """The shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    key: Array,
    mesh: Mesh,
    adapt: Adapt = _as_it_is,
) -> TrainState:
    """A fresh state, each device allocating only its part of it."""
    out = layouts(abstract_state(model, optimizer, mesh, adapt))
    return jax.jit(
        lambda key: new_state(adapt(init_params(model, key)), optimizer), out_shardings=out
    )(key)


def start_from(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    adapt: Adapt = _as_it_is,
) -> TrainState:
    """A state at step 0 with loaded parameters and a fresh optimizer, sharded as the mesh
    wants it."""
    shapes = jax.eval_shape(lambda p: new_state(adapt(p), optimizer), params)
    out = sharding.shardings(shapes, mesh)
    return jax.jit(lambda p: new_state(adapt(p), optimizer), out_shardings=out)(params)


def compile_update(
    update: Callable[..., Any], abstract: Any, mesh: Mesh
) -> Callable[[Any, Any, Any], Any]:
    """`update(state, batch, settings) -> (state, metrics)` under jit: the state keeps its
    layouts and its memory, the batch is split by rows, the rest is on every device."""
    state, everywhere = layouts(abstract), sharding.replicated(mesh)
    return jax.jit(
        update,
        in_shardings=(state, sharding.row_sharding(mesh), everywhere),
        out_shardings=(state, everywhere),
        donate_argnums=0,
    )


def microbatch_count(rows: int, microbatch_rows: int, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts `rows` are split so that no device has more than
    `microbatch_rows` of them in memory."""
    return -(-rows // (microbatch_rows * sharding.row_ways(mesh)))


def split_microbatches(tree: Any, parts: int, mesh: Mesh) -> Any:
    """[B, ...] → [parts, B / parts, ...], every part's rows spread over the mesh."""
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)
    return sharding.constrain_rows(split, mesh, axis=1)


def accumulate(
    gradients_of: Callable[[Any], tuple[Params, Any]], parts: Any, weights: Array
) -> tuple[Params, Any]:
    """Σᵢ weightsᵢ · gradients of part i, one part in memory at a time.

    `parts` is a pytree with a leading axis of parts, `weights` f32[parts] each part's share
    of what the loss is a mean over, counted over the whole batch: the sum is then the whole
    batch's gradient, whatever the parts' sizes. `gradients_of(part)` returns (gradients,
    metrics); metrics come back stacked on the axis of parts.
    """
    if weights.shape[0] == 1:
        gradients, metrics = gradients_of(jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda g: weights[0] * g, gradients), jax.tree.map(
            lambda x: x[None], metrics
        )

    def add(total: Params, inputs: tuple[Any, Array]) -> tuple[Params, Any]:
        part, weight = inputs
        gradients, metrics = gradients_of(part)
        return jax.tree.map(lambda t, g: t + weight * g, total, gradients), metrics

    shapes = jax.eval_shape(
        lambda p: gradients_of(jax.tree.map(lambda x: x[0], p))[0], parts
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, weights))


def accumulate_rows(share_of: Callable[[Any], Any], rows: Any, layout: PackedLayout) -> Any:
    """Σ share_of(part) over the parts in use of packed rows, a tree of [lines, ways, W];
    one part in memory at a time.

    What a part adds to the whole is weighted already: its gradients and its figures times
    its share of what they are means over.
    """
    first = layout.part(rows, 0, layout.shapes[0])
    if layout.shapes == (
        (len(layout.texts), layout.texts.shape[2]),
    ):  # the one part that there is
        return share_of(first)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(share_of, first)
    )
    return scan_packed_rows(
        lambda total, part: (jax.tree.map(jnp.add, total, share_of(part)), None),
        zeros,
        rows,
        layout,
    )[0]


def scaled(weight: Array, tree: Any) -> Any:
    """Every leaf times `weight`."""
    return jax.tree.map(lambda x: weight * x, tree)


def language_gradients(
    model: Transformer, params: Params, batch: LmBatch, dropout: Dropout | None = None
) -> tuple[Params, dict[str, Array]]:
    """(gradient, {"loss"}) of the next-token loss of packed rows."""

    def loss_of(logprobs: Array, mask: Array, _: None) -> tuple[Array, dict[str, Array]]:
        return next_token_loss(logprobs, mask), {}

    loss, _, gradients = packed_loss_and_gradients(
        model, params, batch, loss_of, None, temperature=1.0, dropout=dropout
    )
    return gradients, {"loss": loss}


def shares(counts: Array) -> Array:
    """Each part's share of the total count, zeros if all are empty: f32[parts] →
    f32[parts]."""
    return counts / jnp.maximum(jnp.sum(counts), 1.0)


class Interrupted(Exception):
    """The run was asked to stop, and has saved `step`."""

    def __init__(self, step: int):
        super().__init__(
            f"interrupted; step {step} is saved, the same command goes on from there"
        )


def fit(
    state: Any,
    update: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    batches: Callable[[int], Any],
    *,
    total_steps: int,
    checkpoints: Any,
    log: Any,
    evaluate: Callable[[Any], dict[str, Any]],
    evaluate_every: int,
    skips: NonFiniteGuard,
    at_save: Callable[[Any], Any] = lambda state: state,
) -> tuple[Any, dict[str, Any]]:
    """Trains from `state.step` to `total_steps`: read, update, evaluate, record, save.

    `update(state, batch) -> (state, metrics)`, and `metrics["tokens"]`, if given, is what
    tokens/s counts; `batches(step)` is a function of the step alone, so that a resumed run
    reads what the first would have read. Evaluates every `evaluate_every` steps (0: never)
    and at the end. `at_save` changes a state that is about to be saved, in a way that
    neither later steps nor `evaluate` depend on. A state that has come to the end already
    is evaluated and nothing else: its run was killed between its last save and its summary.

    A first Ctrl-C or SIGTERM saves the last finished step and raises Interrupted; an update
    that pauses is given up (`interruption.pause`). So is an evaluation: the step is saved
    with the metrics that it has, and evaluated and recorded when the run goes on. Raises
    Diverged if `skips` says so. Returns (state, the last metrics).
    """
    first = int(state.step)
    metrics: dict[str, Any] = {}
    with GracefulShutdown() as interruption:

        def stopped(step: int, evaluated: bool) -> Interrupted:
            skips.check()
            log.flush()  # what a saved step needs of the log is on disk before the step is
            with log.phase("save"):
                checkpoints.save(step, at_save(state), metrics, evaluated=evaluated)
            return Interrupted(step)

        def evaluated(step: int) -> dict[str, Any]:
            try:
                with log.phase("evaluate"):
                    return {**metrics, **evaluate(state)}
            except StopRequested:
                raise stopped(step, evaluated=False) from None

        if checkpoints.unevaluated is not None:
            metrics = checkpoints.unevaluated
            metrics = evaluated(first)
            log.record(first, metrics)
            checkpoints.complete(metrics)
        elif first >= total_steps:
            return state, evaluated(first)
        for step in range(first, total_steps):
            try:
                with log.phase("data"):
                    batch = batches(step)
                with log.phase("update"):
                    state, metrics = update(state, batch)
            except StopRequested:
                raise stopped(step, evaluated=True) from None
            if step == first:
                log.started(metrics)
            done = step + 1
            skips.note(done, batch, metrics)
            ends = done == total_steps
            if ends or (evaluate_every and done % evaluate_every == 0):
                metrics = evaluated(done)
            log.record(done, metrics)
            # Read once: a signal during the save below waits for the next step.
            asked = any_host(interruption.asked)
            if asked or ends or checkpoints.due(done):
                skips.check()
                state = at_save(state)
            with log.phase("save"):
                if ends or asked:
                    log.flush()
                    checkpoints.save(done, state, metrics)
                else:
                    checkpoints.maybe_save(done, state, metrics)
            if asked and not ends:
                raise Interrupted(done)
    return state, metrics
