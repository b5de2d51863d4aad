"""The reward model: one update against a reference that scores each answer alone, its
initialization, and its bias."""

import dataclasses
import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import stages, tiny_models
from tests.support.saved import load_newest_params

from instructax import experiment, rng
from instructax.checkpoints.parents import tokenizer_of
from instructax.checkpoints.restore import load_params
from instructax.checkpoints.steps import committed_steps
from instructax.data import loaders
from instructax.data.batches import batch_row_ids, lm_batch
from instructax.data.prompt_format import PLAIN_FORMAT
from instructax.models.config import ModelConfig
from instructax.models.init import init_params
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import read_metrics, read_summary
from instructax.stages import reward_model
from instructax.training.settings import OptimizerSettings
from instructax.training.state import abstract_state, new_state, no_adapters

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

# SGD with rate 1: the update is −1 · gradient, which shows the gradient
GRADIENT = optax.identity()
MODEL = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "scalar")
# Microbatches of two rows.
FEW_ROWS = Transformer(
    tiny_models.gpt_config(), tiny_models.compute(microbatch_rows=2), "scalar"
)
WITH_TAIL_SPLITS = Transformer(
    tiny_models.gpt_config(),
    tiny_models.compute(microbatch_rows=2, tail_splits=3),
    "scalar",
)
# Valid answers per prompt; all answers to the first prompt are tied, the second has no
# pair.
ANSWERS = (3, 1, 4, 2, 4, 2, 3, 4)


def program(**changes) -> reward_model.RewardModelProgram:
    values = {
        "model": MODEL,
        "optimizer": GRADIENT,
        "schedule": tiny_models.optimizer_config(),
        "mesh": stages.mesh_of(),
        "total_steps": 10,
        "row_tokens": 6 + 4 * 5,
    }
    return reward_model.RewardModelProgram(**{**values, **changes})


@cache
def compiled_update(program):
    return jax.jit(partial(reward_model.update_reward_model, program))


def run_update(program, batch):
    """(gradients, metrics, state) of one update from fixed parameters."""
    params = tiny_models.random_params(program.model)
    optimizer = OptimizerSettings(learning_rate=jnp.float32(1.0))
    settings = reward_model.RewardModelSettings(optimizer=optimizer)
    state, metrics = compiled_update(program)(
        new_state(params, program.optimizer), batch, settings
    )
    return jax.tree.map(lambda old, new: old - new, params, state.params), metrics, state


def test_loss_is_the_mean_over_prompts_of_the_mean_over_pairs():
    batch = stages.comparisons(ANSWERS, 5)
    _, metrics, state = run_update(program(), batch)
    loss, correct, pairs = stages.plain_ranking(
        MODEL, tiny_models.random_params(MODEL), batch
    )
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(correct / pairs, rel=1e-6)
    assert metrics["pairs"] == pairs
    assert 0 < correct < pairs
    assert state.step == 1
    assert metrics["tokens"] == batch.mask.sum() + batch.prompts.mask.sum()


def test_gradient_matches_finite_differences():
    batch = stages.comparisons(ANSWERS, 5)
    gradients, metrics, _ = run_update(program(), batch)
    params = tiny_models.random_params(MODEL)
    h = 1e-2
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    direction = jax.tree.map(lambda x: x / optax.tree.norm(direction), direction)
    loss_ahead, loss_behind = (
        stages.plain_ranking(
            MODEL, jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), batch
        )[0]
        for s in (h, -h)
    )
    slope = sum(
        float((g * d).sum())
        for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True)
    )
    assert slope == pytest.approx((loss_ahead - loss_behind) / (2 * h), rel=2e-2, abs=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(
        float(optax.tree.norm(gradients)), rel=1e-5
    )
    # Exactly 0: Adam would turn a rounding error into a full step.
    assert gradients["scalar_head"]["bias"] == 0.0


def test_two_answers_give_the_logistic_loss_of_their_difference():
    batch = stages.comparisons((2,), 5)
    # The second answer is better.
    batch = dataclasses.replace(batch, ranks=np.array([[1, 0]], np.int32))
    _, metrics, _ = run_update(program(), batch)
    worse, better = stages.plain_scores(
        MODEL, tiny_models.random_params(MODEL), stages.comparison_documents(batch, 0)
    )
    assert float(metrics["loss"]) == pytest.approx(
        math.log1p(math.exp(worse - better)), rel=1e-5
    )
    assert metrics["accuracy"] == (better > worse)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": FEW_ROWS},
        {"model": WITH_TAIL_SPLITS},
        {"row_tokens": 22, "model": WITH_TAIL_SPLITS},
    ],
)
def test_accumulated_gradients_equal_those_of_the_whole_batch(changes):
    # The microbatches differ in their numbers of pairs and of prompts with a pair.
    batch = stages.comparisons(ANSWERS, 5)
    whole, metrics, _ = run_update(program(), batch)
    parts, parts_metrics, _ = run_update(program(**changes), batch)
    stages.assert_trees_close(parts, whole, rtol=1e-3, atol=1e-6)
    # Fewer rows of the last microbatch are empty.
    assert parts_metrics.pop("padding") < metrics.pop("padding")
    stages.assert_trees_close(parts_metrics, metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [MODEL, FEW_ROWS])
def test_a_batch_without_a_pair_changes_nothing(model):
    batch = stages.comparisons(ANSWERS, 5)
    tied = dataclasses.replace(batch, ranks=np.ones_like(batch.ranks))
    empty = dataclasses.replace(
        batch, valid=np.zeros_like(batch.valid), mask=np.zeros_like(batch.mask)
    )
    for nothing in (tied, empty):
        gradients, metrics, _ = run_update(program(model=model), nothing)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))
        assert (metrics["loss"], metrics["accuracy"], metrics["pairs"]) == (0, 0, 0)


def test_the_content_of_invalid_answers_does_not_matter():
    batch = stages.comparisons(ANSWERS, 5)
    rng = np.random.default_rng(9)
    garbage = dataclasses.replace(
        batch,
        responses=np.where(
            batch.valid[..., None],
            batch.responses,
            rng.integers(tiny_models.VOCAB_SIZE, size=(8, 4, 5)),
        ),
        mask=batch.mask | ~batch.valid[..., None],
        ranks=np.where(batch.valid, batch.ranks, -7),
    )
    wanted, metrics, _ = run_update(program(), batch)
    got, got_metrics, _ = run_update(program(), garbage)
    stages.assert_trees_close(got, wanted, rtol=1e-4, atol=1e-7)
    assert float(got_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert got_metrics["pairs"] == metrics["pairs"]


def test_another_bias_only_shifts_scores():
    batch = stages.comparisons(ANSWERS, 5)
    params = tiny_models.random_params(MODEL)
    shift = 2.5 - float(params["scalar_head"]["bias"])
    shifted = reward_model.with_bias(params, 2.5)
    documents = stages.comparison_documents(batch, 2)
    before, after = (stages.plain_scores(MODEL, p, documents) for p in (params, shifted))
    np.testing.assert_allclose(after, before + shift, rtol=1e-5)
    assert stages.plain_ranking(MODEL, shifted, batch) == pytest.approx(
        stages.plain_ranking(MODEL, params, batch), rel=1e-5
    )
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, shifted)
    assert changed["scalar_head"].pop("bias")
    assert not any(jax.tree.leaves(changed))


# Runs of the chain.


def reward_parts(chain, step: int | None = None):
    """(config, model, tokenizer, parameters at the last or a kept step) of the chain's
    reward run."""
    config = stages.config_with_kernel(stages.config_of(chain, "reward", {}))
    model = Transformer(config.model, config.compute, "scalar")
    abstract = abstract_state(model, GRADIENT, stages.mesh_of(), no_adapters).params
    workdir = chain / "reward"
    if step is None:
        params = load_newest_params(workdir, abstract)
    else:
        params = load_params(workdir, abstract, step=step)
    return config, model, tokenizer_of(config.tokenizer, config.model), params


def prepared_comparisons(chain):
    config, _, tokenizer, _ = reward_parts(chain)
    files = [Path(path) for path in config.data.comparisons]
    return reward_model.prepare_comparisons(
        files, tokenizer, config.data.limits, Path(config.data.folder), PLAIN_FORMAT
    )


def test_starts_from_the_parents_trunk_with_a_fresh_head(chain, tmp_path):
    wide = {"model.embed_dim": 256, "model.num_layers": 1}
    state = stages.initial_state(stages.config_of(chain, "reward", {}), tmp_path / "run")
    config, *_ = reward_parts(chain)
    policy = Transformer(config.model, config.compute, "tokens")
    parent = load_newest_params(
        chain / "sft",
        abstract_state(policy, GRADIENT, stages.mesh_of(), no_adapters).params,
    )
    trunk = {name: leaf for name, leaf in state.params.items() if name != "scalar_head"}
    stages.assert_trees_equal(trunk, jax.device_get(parent))
    assert state.params["scalar_head"]["kernel"].shape == (32,)
    assert 0.6 < np.std(state.params["scalar_head"]["kernel"]) * math.sqrt(33) < 1.5
    assert state.params["scalar_head"]["bias"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    # N(0, 1 / (width + 1)), at a width large enough to measure it
    fresh = stages.initial_state(
        stages.config_of(chain, "reward", {**wide, "parent": ""}), tmp_path / "wide"
    )
    kernel = fresh.params["scalar_head"]["kernel"]
    assert np.std(kernel) == pytest.approx(1 / math.sqrt(257), rel=0.15)
    assert abs(np.mean(kernel)) < 4 / 257


def test_the_seed_determines_the_first_rows_and_the_fresh_head(
    chain, tmp_path, monkeypatch
):
    config, model, *_ = reward_parts(chain)
    watch = stages.Watch(monkeypatch)
    overrides = {"seed": 3, "steps": 1, "epochs": 0.0}
    assert experiment.run_stage(
        stages.config_of(chain, "reward", overrides), tmp_path / "run"
    )
    fresh = init_params(model, rng.step_key(3, "init", 0))
    np.testing.assert_allclose(
        watch.first.params["scalar_head"]["kernel"],
        fresh["scalar_head"]["kernel"],
        rtol=1e-5,
    )
    source = prepared_comparisons(chain).sources["train"]
    rows = batch_row_ids(0, config.batch_size, len(source), 3)
    loss, correct, pairs = stages.plain_ranking(
        model,
        watch.first.params,
        loaders.read_comparisons(source, rows, config.data.limits),
    )
    (logged,) = read_metrics(tmp_path / "run")
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert (logged["accuracy"], logged["pairs"]) == (
        pytest.approx(correct / pairs, abs=1.5 / pairs),
        pairs,
    )


def test_an_untied_unembedding_is_dropped(chain, tmp_path):
    config = stages.config_of(chain, "reward", {"model.tied_embeddings": False})
    model = ModelConfig(**config["model"])
    policy = Transformer(model, tiny_models.compute(), "tokens")
    params = tiny_models.random_params(policy)
    assert params["head"]["kernel"].shape == (512, 32)
    config["parent"] = str(
        stages.write_finished_run(tmp_path / "parent", model, params, config["tokenizer"])
    )
    state = stages.initial_state(config, tmp_path / "run")
    assert state.params["scalar_head"]["kernel"].shape == (32,)
    np.testing.assert_array_equal(state.params["embedding"], params["embedding"])


@pytest.mark.parametrize("kept", [0, 1])
def test_demonstrations_score_zero_on_average_at_every_kept_step(chain, kept):
    steps = committed_steps(chain / "reward")
    assert len(steps) == 2
    config, model, tokenizer, params = reward_parts(chain, steps[kept])
    limits = config.data.limits
    folder = Path(config.data.folder)
    files = [Path(path) for path in config.data.demonstrations]
    source = reward_model.prepare_demonstrations(
        files, tokenizer, limits, folder, PLAIN_FORMAT
    ).sources["train"]
    rows = lm_batch(source, np.arange(len(source)), limits.sequence_tokens)
    scores = stages.plain_scores(
        model, params, [tokens for tokens, _ in stages.documents_of(rows)]
    )
    assert len(scores) > 90
    assert abs(scores.mean()) < 1e-5
    assert scores.std() > 1e-3
    assert abs(float(params["scalar_head"]["bias"])) > 1e-6


def test_validation_metrics_equal_the_plain_computation(chain):
    config, model, _, params = reward_parts(chain)
    limits = config.data.limits
    prepared = prepared_comparisons(chain)
    source = prepared.sources["validation"]
    loss, correct, pairs = stages.plain_ranking(
        model, params, loaders.read_comparisons(source, np.arange(len(source)), limits)
    )
    summary = read_summary(chain / "reward")
    assert summary["validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["validation_accuracy"] == pytest.approx(correct / pairs, abs=1.5 / pairs)
    assert summary["validation_pairs"] == pairs
    # One epoch.
    assert len(read_metrics(chain / "reward")) == -(
        -len(prepared.sources["train"]) // config.batch_size
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"compute.microbatch_rows": 0}, "microbatch_rows = 0 must be at least 1"),
        (
            {"model.embed_dim": 64},
            "config.parent = .* has another model: .*embed_dim: 32 .stored. != 64 .given.",
        ),
        ({"steps": 2}, "steps = 2 and config.epochs = 1.0: set one"),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    with pytest.raises(ValueError, match=message) as error:
        experiment.run_stage(stages.config_of(chain, "reward", overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
