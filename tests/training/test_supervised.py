"""The supervised update against plain references: packing, accumulation and dropout."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import stages, tiny_models

from instructax.models.transformer import Transformer
from instructax.training import supervised
from instructax.training.optimizer import make_optimizer
from instructax.training.state import new_state
from instructax.types import LmBatch

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

# SGD with rate 1: the update is −1 · gradient, which shows the gradient
GRADIENT = optax.identity()
MODEL = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "tokens")


def program(**changes) -> supervised.SupervisedProgram:
    values = {
        "model": MODEL,
        "optimizer": GRADIENT,
        "schedule": tiny_models.optimizer_config(),
        "mesh": stages.mesh_of(),
        "total_steps": 10,
        "num_microbatches": 1,
        "has_dropout": False,
    }
    return supervised.SupervisedProgram(**{**values, **changes})


@cache
def compiled(program):
    return jax.jit(partial(supervised.supervised_update, program))


def run_update(program, batch, *, step: int = 0, settings=None):
    """(gradients, metrics, state) of one update from fixed parameters."""
    params = tiny_models.random_params(program.model)
    state = dataclasses.replace(new_state(params, program.optimizer), step=jnp.int32(step))
    state, metrics = compiled(program)(
        state, batch, settings or stages.supervised_settings()
    )
    return jax.tree.map(lambda old, new: old - new, params, state.params), metrics, state


def plain_loss(params, batch):
    """A differentiable `stages.plain_loss`: one document per row, with logits over the
    whole vocabulary."""
    documents = stages.documents_of(batch)
    tokens = np.zeros((len(documents), MODEL.config.max_length), np.int32)
    trained = np.zeros(tokens.shape, bool)
    for row, (document, loss_mask) in enumerate(documents):
        tokens[row, : len(document)], trained[row, : len(document)] = document, loss_mask
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = MODEL.apply({"params": params}, tokens, np.ones_like(tokens), positions)[0]
    logprobs = jax.nn.log_softmax(hidden @ params["embedding"].T, axis=-1)[:, :-1]
    chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(trained[:, 1:], chosen, 0.0)) / trained.sum()


def test_the_update_is_the_gradient_of_the_mean_over_trained_tokens():
    batch = stages.packed_rows(6, 14)
    gradients, metrics, state = run_update(program(), batch)
    params = tiny_models.random_params(MODEL)
    loss, wanted = jax.jit(jax.value_and_grad(partial(plain_loss, batch=batch)))(params)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(
        stages.plain_loss(MODEL, params, batch), rel=1e-5
    )
    stages.assert_trees_close(gradients, wanted, rtol=1e-3, atol=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(optax.tree.norm(wanted)), rel=1e-4
    )
    assert metrics["trained_tokens"] == batch.loss_mask.sum()
    assert metrics["tokens"] == (batch.segments > 0).sum()
    assert float(metrics["padding"]) == pytest.approx(
        (batch.segments == 0).mean(), abs=1e-6
    )
    assert state.step == 1


def test_packed_documents_train_like_separate_ones():
    packed = stages.packed_rows(5, 14)
    documents = stages.documents_of(packed)
    blank = np.zeros((len(documents), 14), np.int32)
    alone = LmBatch(
        tokens=blank.copy(),
        segments=blank.copy(),
        positions=blank.copy(),
        loss_mask=blank.astype(bool),
    )
    for row, (tokens, loss_mask) in enumerate(documents):
        n = len(tokens)
        alone.tokens[row, :n], alone.segments[row, :n], alone.positions[row, :n] = (
            tokens,
            1,
            np.arange(n),
        )
        alone.loss_mask[row, :n] = loss_mask
    one, metrics, _ = run_update(program(), packed)
    other, other_metrics, _ = run_update(program(), alone)
    assert float(metrics["loss"]) == pytest.approx(float(other_metrics["loss"]), rel=1e-5)
    stages.assert_trees_close(one, other, rtol=1e-3, atol=1e-5)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    # Rows with few and with many trained tokens, and one with none.
    batch = stages.packed_rows(8, 24)
    counts = batch.loss_mask.reshape(4, -1).sum(axis=1)
    assert len(set(counts)) == 4
    whole, metrics, _ = run_update(program(), batch)
    parts, parts_metrics, _ = run_update(program(num_microbatches=4), batch)
    stages.assert_trees_close(parts, whole, rtol=1e-4, atol=1e-6)
    stages.assert_trees_close(parts_metrics, metrics, rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_trained_token_changes_nothing():
    batch = dataclasses.replace(
        stages.packed_rows(4, 14), loss_mask=np.zeros((4, 14), bool)
    )
    for parts in (1, 2):
        gradients, metrics, _ = run_update(program(num_microbatches=parts), batch)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
        assert metrics["loss"] == 0


def test_loss_falls_on_a_repeated_batch():
    config = tiny_models.optimizer_config(learning_rate=1e-2)
    learner = program(optimizer=make_optimizer(config), schedule=config)
    batch = stages.packed_rows(4, 14)
    state = new_state(tiny_models.random_params(MODEL), learner.optimizer)
    update = jax.jit(partial(supervised.supervised_update, learner))
    losses = []
    for _ in range(40):
        state, metrics = update(
            state, batch, stages.supervised_settings(learning_rate=1e-2)
        )
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_dropout_changes_only_with_the_step():
    batch = stages.packed_rows(4, 14)
    dropping = program(has_dropout=True)
    half = stages.supervised_settings(dropout=0.5)
    losses = [
        float(run_update(dropping, batch, step=step, settings=half)[1]["loss"])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-3
    plain = [float(run_update(program(), batch, step=step)[1]["loss"]) for step in (0, 1)]
    assert plain[0] == plain[1]
    rate_zero, metrics, _ = run_update(dropping, batch)
    wanted, _, _ = run_update(program(), batch)
    assert float(metrics["loss"]) == pytest.approx(plain[0], rel=1e-6)
    stages.assert_trees_close(rate_zero, wanted, rtol=1e-4, atol=1e-6)


def test_dropout_depends_on_row_and_seed_but_not_on_microbatches():
    half = stages.supervised_settings(dropout=0.5)
    batch = stages.packed_rows(4, 14)
    parts, _, _ = run_update(
        program(has_dropout=True, num_microbatches=2), batch, settings=half
    )
    whole, _, _ = run_update(
        program(has_dropout=True, num_microbatches=1), batch, settings=half
    )
    stages.assert_trees_close(parts, whole, rtol=1e-4, atol=1e-6)
    other, _, _ = run_update(
        program(has_dropout=True),
        batch,
        settings=stages.supervised_settings(seed=1, dropout=0.5),
    )
    assert not np.allclose(other["embedding"], whole["embedding"], rtol=1e-3)
    # Two copies of the same rows get different dropout masks. With one mask for both, half
    # of the batch would be redundant.
    rows = stages.packed_rows(2, 14)
    twice, _, _ = run_update(
        program(has_dropout=True),
        jax.tree.map(lambda x: np.concatenate([x, x]), rows),
        settings=half,
    )
    once, _, _ = run_update(program(has_dropout=True), rows, settings=half)
    assert not np.allclose(twice["embedding"], once["embedding"], rtol=1e-3)
