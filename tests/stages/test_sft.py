"""Supervised training: one update against plain references, and its runs."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import stages, tiny_models

from instructax import experiment, rng
from instructax.checkpoints.checkpoint import load_params
from instructax.checkpoints.parents import tokenizer_of
from instructax.config import ConfigError, construct
from instructax.data import loaders
from instructax.data.batches import lm_batch
from instructax.experiment import metrics_of, summary_of
from instructax.models import Transformer
from instructax.models.init import init_params
from instructax.stages import sft as supervised
from instructax.training.optimizer import make_optimizer
from instructax.training.state import abstract_state, new_state
from instructax.types import LmBatch

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

GRADIENT = optax.identity()  # an update by −1 · gradient, which shows the gradient
MODEL = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "tokens")


def program(**changes) -> supervised.SupervisedProgram:
    values = {
        "model": MODEL,
        "optimizer": GRADIENT,
        "schedule": tiny_models.optimizer_config(),
        "mesh": stages.mesh_of(),
        "total_steps": 10,
        "accumulate": 1,
        "drops": False,
    }
    return supervised.SupervisedProgram(**{**values, **changes})


def make_settings(
    *, seed: int = 0, learning_rate: float = 1.0, dropout: float = 0.0
) -> supervised.SupervisedSettings:
    return supervised.SupervisedSettings(
        seed=jnp.int32(seed),
        learning_rate=jnp.float32(learning_rate),
        dropout=jnp.float32(dropout),
    )


@cache
def compiled(program):
    return jax.jit(partial(supervised.update, program))


def run_update(program, batch, *, step: int = 0, settings=None):
    """(gradients, metrics, state) of one update from fixed parameters."""
    params = tiny_models.random_params(program.model)
    state = dataclasses.replace(new_state(params, program.optimizer), step=jnp.int32(step))
    state, metrics = compiled(program)(state, batch, settings or make_settings())
    return jax.tree.map(lambda old, new: old - new, params, state.params), metrics, state


def plain_loss(params, batch):
    """As `stages.plain_loss`, differentiable: documents alone on rows, the whole vocabulary
    at once."""
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


def test_update_is_the_gradient_of_the_mean_over_trained_tokens():
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


def test_packed_documents_train_as_they_would_alone():
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


def test_accumulated_is_the_whole_batch():
    batch = stages.packed_rows(
        8, 24
    )  # rows with few and many trained tokens, and one with none
    counts = batch.loss_mask.reshape(4, -1).sum(axis=1)
    assert len(set(counts)) == 4
    whole, metrics, _ = run_update(program(), batch)
    parts, parts_metrics, _ = run_update(program(accumulate=4), batch)
    stages.assert_trees_close(parts, whole, rtol=1e-4, atol=1e-6)
    stages.assert_trees_close(parts_metrics, metrics, rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_trained_token_changes_nothing():
    batch = dataclasses.replace(
        stages.packed_rows(4, 14), loss_mask=np.zeros((4, 14), bool)
    )
    for parts in (1, 2):
        gradients, metrics, _ = run_update(program(accumulate=parts), batch)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
        assert metrics["loss"] == 0


def test_loss_falls_on_a_batch_seen_again_and_again():
    config = tiny_models.optimizer_config(learning_rate=1e-2)
    learner = program(optimizer=make_optimizer(config), schedule=config)
    batch = stages.packed_rows(4, 14)
    state = new_state(tiny_models.random_params(MODEL), learner.optimizer)
    update = jax.jit(partial(supervised.update, learner))
    losses = []
    for _ in range(40):
        state, metrics = update(state, batch, make_settings(learning_rate=1e-2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_dropout_changes_with_the_step_and_only_with_it():
    batch, dropping, half = (
        stages.packed_rows(4, 14),
        program(drops=True),
        make_settings(dropout=0.5),
    )
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


def test_what_is_dropped_depends_on_row_and_seed_and_not_on_the_parts():
    half = make_settings(dropout=0.5)
    batch = stages.packed_rows(4, 14)
    parts, _, _ = run_update(program(drops=True, accumulate=2), batch, settings=half)
    whole, _, _ = run_update(program(drops=True, accumulate=1), batch, settings=half)
    stages.assert_trees_close(parts, whole, rtol=1e-4, atol=1e-6)
    other, _, _ = run_update(
        program(drops=True), batch, settings=make_settings(seed=1, dropout=0.5)
    )
    assert not np.allclose(other["embedding"], whole["embedding"], rtol=1e-3)
    # The same rows twice are not dropped alike: with one mask for both, half a batch would
    # be seen twice.
    rows = stages.packed_rows(2, 14)
    twice, _, _ = run_update(
        program(drops=True),
        jax.tree.map(lambda x: np.concatenate([x, x]), rows),
        settings=half,
    )
    once, _, _ = run_update(program(drops=True), rows, settings=half)
    assert not np.allclose(twice["embedding"], once["embedding"], rtol=1e-3)


# Runs of the chain


def sft_parts(chain):
    """(config, tokenizer, prepared rows) of the chain's supervised run."""
    config = stages.construct_settled(
        supervised.SupervisedConfig, stages.config_of(chain, "sft", {})
    )
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    return config, tokenizer, loaders.read_lm_data(config.data, tokenizer)


def test_the_last_rows_of_a_batch_are_text(chain):
    config, _, data = sft_parts(chain)
    read = loaders.lm_reader(config.data, data, "train", batch_size=10, seed=0)
    for index in (0, 7):
        batch = read(index)
        # Of text all is trained but a document's first token; of a demonstration the prompt
        # is not, and has many.
        untrained = ((batch.segments > 0) & ~batch.loss_mask).sum(axis=1)
        documents = batch.segments.max(axis=1)
        assert list(untrained == documents) == [False] * 9 + [True]
    assert not np.array_equal(read(0).tokens, read(1).tokens)
    np.testing.assert_array_equal(read(3).tokens, read(3).tokens)


@pytest.mark.parametrize(
    ("text_fraction", "demonstrations", "text"),
    [(0.1, ("a",), ()), (1.0, ("a",), ("b",)), (0.5, (), ("b",)), (0.0, (), ())],
)
def test_a_fraction_that_does_not_fit_the_files_is_refused(
    chain, text_fraction, demonstrations, text
):
    config, tokenizer, _ = sft_parts(chain)
    data = dataclasses.replace(
        config.data, text_fraction=text_fraction, demonstrations=demonstrations, text=text
    )
    with pytest.raises(ConfigError, match=f"text_fraction = {text_fraction} does not fit"):
        loaders.read_lm_data(data, tokenizer)


def test_the_first_step_starts_from_the_parent(chain):
    config, _, data = sft_parts(chain)
    model = Transformer(config.model, config.compute, "tokens")
    abstract = abstract_state(model, optax.identity(), stages.mesh_of()).params
    params = load_params(chain / "pretrain", abstract)
    first = loaders.lm_reader(
        config.data, data, "train", batch_size=config.batch_size, seed=config.seed
    )(0)
    logged = metrics_of(chain / "sft")[0]
    assert logged["loss"] == pytest.approx(
        stages.plain_loss(model, params, first), rel=1e-5
    )
    assert logged["trained_tokens"] == first.loss_mask.sum()
    assert logged["learning_rate"] == pytest.approx(config.optimizer.learning_rate)


def test_the_first_row_of_demonstrations_is_shown(chain, tmp_path, capsys):
    for name, shown in (("sft", 1), ("pretrain", 0)):
        stages.started(stages.config_of(chain, name, {}), tmp_path / name)
        out = capsys.readouterr().out
        assert (out.count("first batch, row 1 of "), "⟨end⟩" in out) == (shown, bool(shown))
        assert "\x1b" not in out  # no colours where no terminal is


def test_a_run_drops_at_its_own_rate(chain, tmp_path):
    config, _, data = sft_parts(chain)
    overrides = {"dropout": 0.3, "steps": 1, "epochs": 0.0}
    assert experiment.run_stage(stages.config_of(chain, "sft", overrides), tmp_path / "run")
    own = program(model=Transformer(config.model, config.compute, "tokens"), drops=True)
    abstract = abstract_state(own.model, GRADIENT, stages.mesh_of()).params
    state = new_state(load_params(chain / "pretrain", abstract), GRADIENT)
    first = loaders.lm_reader(
        config.data, data, "train", batch_size=config.batch_size, seed=config.seed
    )(0)
    _, metrics = compiled(own)(state, first, make_settings(seed=config.seed, dropout=0.3))
    assert metrics_of(tmp_path / "run")[0]["loss"] == pytest.approx(
        float(metrics["loss"]), rel=1e-5
    )


def test_held_out_losses_are_those_of_the_plain_computation(chain):
    config, _, data = sft_parts(chain)
    model = Transformer(config.model, config.compute, "tokens")
    abstract = abstract_state(model, optax.identity(), stages.mesh_of()).params
    params = load_params(chain / "sft", abstract)
    summary = summary_of(chain / "sft")
    for name in ("demonstrations", "text"):
        source = data[name].sources["validation"]
        whole = lm_batch(source, np.arange(len(source)), config.data.limits.sequence_tokens)
        assert len(source) % config.batch_size  # the last batch has empty rows
        assert summary[f"{name}_loss"] == pytest.approx(
            stages.plain_loss(model, params, whole), rel=1e-5
        )


def test_two_epochs_count_the_demonstrations_alone(chain):
    config, _, data = sft_parts(chain)
    rows = len(data["demonstrations"].sources["train"])
    assert metrics_of(chain / "sft")[-1]["step"] == math.ceil(
        2 * rows / 7.2
    )  # 9 of 10 rows of 8
    assert config.epochs == 2


def test_a_fresh_start_depends_on_the_seed_and_draws_by_the_clock(chain, tmp_path):
    one = stages.started(stages.config_of(chain, "pretrain", {"seed": 1}), tmp_path / "one")
    other = stages.started(
        stages.config_of(chain, "pretrain", {"seed": 2}), tmp_path / "other"
    )
    assert one.step == 0
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])
    config = construct(supervised.SupervisedConfig, stages.config_of(chain, "pretrain", {}))
    model = Transformer(config.model, config.compute, "tokens")
    wanted = init_params(model, rng.step_key(1, "init", 0))
    np.testing.assert_allclose(
        one.params["embedding"], wanted["embedding"], rtol=1e-5
    )  # one compiled, one not


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"batch_size": 9, "accumulate": 2},
            "batch_size = 9 rows must be a positive multiple of 2",
        ),
        ({"epochs": 0.0}, "steps = 0 and config.epochs = 0.0: set one"),
        ({"steps": 3}, "steps = 3 and config.epochs = 2.0: set one"),
        (
            {"model.vocab_size": 511},
            "model.vocab_size = 511, but the tokenizer .* has 512 ids",
        ),
        ({"parent": "nowhere"}, "config.parent = 'nowhere' is not a finished run"),
        ({"mesh.fsdp": 2}, "must equal the number of devices, 1"),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message) as error:
        experiment.run_stage(stages.config_of(chain, "sft", overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
