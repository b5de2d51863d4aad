"""Runs of `pretrain` and `sft` in the tiny pipeline."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import optax
import pytest
from tests.support import stages
from tests.support.saved import load_newest_params

from instructax import experiment, rng
from instructax.checkpoints.parents import tokenizer_of
from instructax.config import ConfigError
from instructax.data import loaders
from instructax.data.batches import lm_batch
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.models.init import init_params
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import read_metrics, read_summary
from instructax.stages import build_config
from instructax.training import supervised
from instructax.training.state import abstract_state, new_state, no_adapters

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")


def sft_parts(chain):
    """(config, tokenizer, prepared rows) of the chain's SFT run."""
    config = stages.config_with_kernel(stages.config_of(chain, "sft", {}))
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    return config, tokenizer, loaders.read_lm_data(config.data, tokenizer, PLAIN_FORMAT)


def training_reader(config, data, batch_size):
    """The reader of the batches that a run of `config` trains on."""
    return loaders.lm_reader(
        data,
        "train",
        text_fraction=config.data.text_fraction,
        sequence_tokens=config.data.limits.sequence_tokens,
        batch_size=batch_size,
        seed=config.seed,
    )


def test_the_last_rows_of_a_batch_are_text(chain):
    config, _, data = sft_parts(chain)
    read = training_reader(config, data, batch_size=10)
    for index in (0, 7):
        batch = read(index)
        # All text tokens are trained except the first of a document. A demonstration's
        # prompt, which is long, is not trained.
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
        loaders.read_lm_data(data, tokenizer, PLAIN_FORMAT)


def test_the_first_step_starts_from_the_parent(chain):
    config, _, data = sft_parts(chain)
    model = Transformer(config.model, config.compute, "tokens")
    abstract = abstract_state(model, optax.identity(), stages.mesh_of(), no_adapters).params
    params = load_newest_params(chain / "pretrain", abstract)
    first = training_reader(config, data, config.batch_size)(0)
    logged = read_metrics(chain / "sft")[0]
    assert logged["loss"] == pytest.approx(
        stages.plain_loss(model, params, first), rel=1e-5
    )
    assert logged["trained_tokens"] == first.loss_mask.sum()
    assert logged["learning_rate"] == pytest.approx(config.optimizer.learning_rate)


def test_the_first_row_of_demonstrations_is_shown(chain, tmp_path, capsys):
    for name, shown in (("sft", 1), ("pretrain", 0)):
        stages.initial_state(stages.config_of(chain, name, {}), tmp_path / name)
        out = capsys.readouterr().out
        assert (out.count("first batch, row 1 of "), "⟨end⟩" in out) == (shown, bool(shown))
        assert "\x1b" not in out  # no colors, because the output is not a terminal


def test_a_run_uses_its_dropout_rate(chain, tmp_path):
    config, _, data = sft_parts(chain)
    overrides = {"dropout": 0.3, "steps": 1, "epochs": 0.0}
    assert experiment.run_stage(stages.config_of(chain, "sft", overrides), tmp_path / "run")
    model = Transformer(config.model, config.compute, "tokens")
    dropping = dataclasses.replace(config, dropout=0.3)
    own = supervised.supervised_program(dropping, model, stages.mesh_of(), 10)
    own = dataclasses.replace(own, optimizer=optax.identity())
    abstract = abstract_state(
        own.model, optax.identity(), stages.mesh_of(), no_adapters
    ).params
    state = new_state(load_newest_params(chain / "pretrain", abstract), optax.identity())
    first = training_reader(config, data, config.batch_size)(0)
    update = jax.jit(partial(supervised.supervised_update, own))
    settings = stages.supervised_settings(seed=config.seed, dropout=0.3)
    _, metrics = update(state, first, settings)
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(
        float(metrics["loss"]), rel=1e-5
    )


def test_validation_losses_equal_the_plain_computation(chain):
    config, _, data = sft_parts(chain)
    model = Transformer(config.model, config.compute, "tokens")
    abstract = abstract_state(model, optax.identity(), stages.mesh_of(), no_adapters).params
    params = load_newest_params(chain / "sft", abstract)
    summary = read_summary(chain / "sft")
    for name in ("demonstrations", "text"):
        source = data[name].sources["validation"]
        whole = lm_batch(source, np.arange(len(source)), config.data.limits.sequence_tokens)
        assert len(source) % config.batch_size  # the last batch has empty rows
        assert summary[f"{name}_loss"] == pytest.approx(
            stages.plain_loss(model, params, whole), rel=1e-5
        )


def test_epochs_count_only_demonstrations(chain):
    config, _, data = sft_parts(chain)
    rows = len(data["demonstrations"].sources["train"])
    # 9 of 10 rows are demonstrations, in batches of 8.
    assert read_metrics(chain / "sft")[-1]["step"] == math.ceil(2 * rows / 7.2)
    assert config.epochs == 2


def test_a_fresh_start_uses_the_init_key_of_the_seed(chain, tmp_path):
    one = stages.initial_state(
        stages.config_of(chain, "pretrain", {"seed": 1}), tmp_path / "one"
    )
    other = stages.initial_state(
        stages.config_of(chain, "pretrain", {"seed": 2}), tmp_path / "other"
    )
    assert one.step == 0
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])
    config = build_config(stages.config_of(chain, "pretrain", {}))
    model = Transformer(config.model, config.compute, "tokens")
    wanted = init_params(model, rng.step_key(1, "init", 0))
    # One run is compiled, the other is not.
    np.testing.assert_allclose(one.params["embedding"], wanted["embedding"], rtol=1e-5)


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
