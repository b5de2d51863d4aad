"""Low-rank adapters: they start as zero, only they are trained, and children of the run get
the merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import stages, tiny_models
from tests.support.saved import load_newest_params
from tests.support.scoring import token_logprobs

from instructax import sharding
from instructax.checkpoints.parents import open_parent
from instructax.config import ConfigError
from instructax.experiment import run_stage
from instructax.losses import next_token_loss
from instructax.models.init import abstract_params
from instructax.models.lora import LoraConfig, add_lora, merge_lora, merge_trees, trainable
from instructax.models.scoring import packed_loss_and_gradients
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import read_metrics
from instructax.serving.policy import open_policy
from instructax.stages import build_config
from instructax.stages.ppo import algorithm
from instructax.training import loop
from instructax.training.optimizer import apply_gradients, make_optimizer, moving_average
from instructax.training.state import new_state, start_from

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

LORA = LoraConfig(rank=3, alpha=7.5)
FAMILIES = {
    "gpt": tiny_models.gpt_config,
    "llama": tiny_models.llama_config,
    "gemma": tiny_models.gemma_config,
}
CHANGES = {"lora.rank": 2, "run.log_every": 1, "run.save_every": 4, "run.evaluate_every": 0}
STEPS = {
    "sft": {"steps": 4, "epochs": 0.0},
    "reward": {"steps": 4, "epochs": 0.0},
    "ppo-ptx": {"steps": 4},
}


def random_lora_params(model: Transformer, seed: int = 0):
    """Random parameters with random, nonzero adapters."""
    params = add_lora(tiny_models.random_params(model), LORA, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    part = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
        trainable(params),
    )
    return merge_trees(part, params)


def names_of(tree) -> set[str]:
    return {sharding.leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)}


def outputs(model: Transformer, params) -> np.ndarray:
    rows = stages.packed_rows(3, 14)
    run = jax.jit(
        lambda params: model.apply(
            {"params": params}, rows.tokens, rows.segments, rows.positions
        )[0]
    )
    return np.asarray(run(params))


@pytest.mark.parametrize("head", ["tokens", "scalar"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_leave_outputs_bitwise_unchanged(family, head):
    model = Transformer(FAMILIES[family](), tiny_models.compute(), head)
    params = tiny_models.random_params(model)
    fresh = add_lora(params, LORA, jax.random.key(1))
    np.testing.assert_array_equal(outputs(model, fresh), outputs(model, params))
    stages.assert_trees_equal(merge_lora(fresh), params)
    a = np.asarray(fresh["blocks"]["attention"]["query"]["lora_a"])
    assert np.std(a) == pytest.approx(1 / np.sqrt(model.config.embed_dim), rel=0.2)
    assert (
        len(
            {
                leaf.tobytes()
                for leaf in map(np.asarray, jax.tree.leaves(trainable(fresh)))
                if leaf.any()
            }
        )
        >= 6
    )
    assert add_lora(params, LoraConfig(rank=0, alpha=1.0), jax.random.key(1)) is params
    assert trainable(params) is params and names_of(merge_lora(params)) == names_of(params)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_parameters_give_the_same_outputs(family):
    model = Transformer(FAMILIES[family](), tiny_models.compute(), "tokens")
    params = random_lora_params(model)
    plain = merge_lora(params)
    found = outputs(model, params)
    assert names_of(plain) == names_of(tiny_models.random_params(model))
    np.testing.assert_allclose(outputs(model, plain), found, rtol=1e-4, atol=2e-5)
    assert np.abs(outputs(model, tiny_models.random_params(model)) - found).max() > 0.1
    # W + alpha / rank · A · B, for the only projection that sums over two axes.
    out = params["blocks"]["attention"]["out"]
    layer = 1
    a = np.asarray(out["lora_a"][layer], np.float64)
    b = np.asarray(out["lora_b"][layer], np.float64)
    wanted = np.asarray(out["kernel"][layer]) + 2.5 * np.einsum("hdr,rw->hdw", a, b)
    np.testing.assert_allclose(
        plain["blocks"]["attention"]["out"]["kernel"][layer], wanted, rtol=1e-5, atol=1e-6
    )


def test_trainable_selects_adapters_and_the_scalar_head():
    for head in ("tokens", "scalar"):
        model = Transformer(tiny_models.llama_config(), tiny_models.compute(), head)
        params = random_lora_params(model)
        names = names_of(trainable(params))
        assert {name for name in names if not name.endswith(("lora_a", "lora_b"))} == (
            {"scalar_head/kernel", "scalar_head/bias"} if head == "scalar" else set()
        )
        # Query, key, value, out, up, gate, down.
        assert sum(name.endswith("lora_a") for name in names) == 7
        stages.assert_trees_equal(merge_trees(trainable(params), params), params)
        state = new_state(
            params, make_optimizer(tiny_models.optimizer_config(weight_decay=0.1))
        )
        moments = next(part for part in state.opt_state if hasattr(part, "mu"))
        assert names_of(moments.mu) == names_of(moments.nu) == names


def test_gradients_equal_those_of_the_full_tree():
    """The adapters' gradients equal those of full training; nothing else has gradients."""
    model = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "tokens")
    rows = stages.packed_rows(3, 14)
    params = random_lora_params(model)

    def loss_of(logprobs, mask, _):
        return next_token_loss(logprobs, mask), {}

    loss, _, gradients = packed_loss_and_gradients(
        model, params, rows, loss_of, None, temperature=1.0
    )

    def of_merged(part):
        return packed_loss_and_gradients(
            model,
            merge_lora(merge_trees(part, params)),
            rows,
            loss_of,
            None,
            temperature=1.0,
        )[0]

    wanted_loss, wanted = jax.value_and_grad(of_merged)(trainable(params))
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients))
    stages.assert_trees_close(gradients, wanted, rtol=1e-3, atol=1e-5)


def test_updates_and_averages_change_adapters_only():
    model = Transformer(tiny_models.gpt_config(), tiny_models.compute(), "scalar")
    params = random_lora_params(model)
    optimizer = make_optimizer(tiny_models.optimizer_config(clip_norm=1.0))
    state = new_state(params, optimizer)
    gradients = jax.tree.map(jnp.ones_like, trainable(params))
    after = apply_gradients(optimizer, state, gradients, jnp.float32(0.1)).params
    average = moving_average(params, after, 0.75)
    moving = names_of(trainable(params))
    for tree in (after, average):
        old = dict(jax.tree.leaves_with_path(params))
        changed = {
            sharding.leaf_path(path)
            for path, leaf in jax.tree.leaves_with_path(tree)
            if np.any(leaf != old[path])
        }
        assert changed == moving
    bad = {
        **gradients,
        "scalar_head": jax.tree.map(lambda x: x * jnp.nan, gradients["scalar_head"]),
    }
    stages.assert_trees_equal(
        apply_gradients(optimizer, state, bad, jnp.float32(0.1)), state
    )


def test_samples_of_merged_weights_rescore_to_the_same_logprobs():
    """The sampler uses merged weights and scoring uses adapters; they are the same
    model."""
    program = stages.ppo_program(stages.mesh_of())
    settings = stages.ppo_settings()
    params = random_lora_params(program.policy)
    prompts = tiny_models.ragged_prompts((1, 4, 6, 2), columns=6)
    rollouts = algorithm.rollout(program, params, prompts, jnp.int32(0), settings)
    scored = token_logprobs(
        program.policy, params, rollouts, temperature=settings.temperature
    )
    np.testing.assert_allclose(rollouts.logprobs, scored, rtol=1e-4, atol=2e-5)
    with_base = token_logprobs(
        program.policy, tiny_models.random_params(program.policy), rollouts, temperature=1.0
    )
    assert np.abs(np.asarray(with_base - scored)).max() > 0.05


def config_of(chain, name, **changes):
    return stages.config_of(chain, name, {**STEPS[name], **CHANGES, **changes})


def run(config, workdir, **watched):
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = stages.Watch(monkeypatch, **watched)
        run_stage(config, workdir)
    return watch.first, watch.last


def networks(state):
    """Each network of a state → its parameters."""
    if hasattr(state, "policy"):
        return {
            "policy": state.policy.params,
            "value": state.value.params,
            "ema": state.ema,
        }
    return {"model": state.params}


@pytest.mark.parametrize(
    "name", ["sft", "reward", pytest.param("ppo-ptx", marks=pytest.mark.slow)]
)
def test_a_run_trains_adapters_only_and_resumes(chain, tmp_path, name):
    config = config_of(chain, name)
    first, last = run(config, tmp_path / "straight")
    parents = {"model": chain / ("pretrain" if name == "sft" else "sft")}
    if name == "ppo-ptx":
        parents = {"policy": chain / "sft", "ema": chain / "sft", "value": chain / "reward"}
        lines = read_metrics(tmp_path / "straight")
        assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(lines[-1]["kl"]) > 1e-3
        assert all(line["sampler_gap"] < 1e-4 for line in lines)
    for network, params in networks(last).items():
        before = networks(first)[network]
        stored = jax.device_get(
            load_newest_params(parents[network], stored_shapes(parents[network]))
        )
        trunk = {
            part: leaf
            for part, leaf in merge_lora(before).items()
            if part != "scalar_head" or network == "value"
        }
        stages.assert_trees_equal(trunk, {part: stored[part] for part in trunk})
        old = dict(jax.tree.leaves_with_path(before))
        changed = {
            sharding.leaf_path(path)
            for path, leaf in jax.tree.leaves_with_path(params)
            if np.any(leaf != old[path])
        }
        assert changed == names_of(trainable(params))
    with pytest.raises(loop.Interrupted):
        run(config, tmp_path / "stopped", interrupt_at=1)
    _, resumed = run(config, tmp_path / "stopped")
    stages.assert_trees_equal(resumed, last)

    # Runs that start from this one get plain merged weights.
    head = "scalar" if name == "reward" else "tokens"
    built = build_config(config)
    model = Transformer(built.model, tiny_models.compute(), head)
    found = open_parent(tmp_path / "straight", "parent").load(
        abstract_params(model, stages.mesh_of())
    )
    wanted = merge_lora(networks(last)["ema" if name == "ppo-ptx" else "model"])
    stages.assert_trees_close(jax.device_get(found), wanted, rtol=1e-6, atol=1e-7)
    if name == "sft":
        _, answering, _ = open_policy(tmp_path / "straight", tiny_models.compute())
        stages.assert_trees_equal(answering, found)
        child = config_of(
            chain, "sft", **{"parent": str(tmp_path / "straight"), "lora.rank": 0}
        )
        stages.assert_trees_equal(
            stages.initial_state(child, tmp_path / "child").params, jax.device_get(found)
        )


def stored_shapes(workdir):
    """The shapes stored by a run without adapters, filled with zeros."""
    run = open_parent(workdir, "parent")
    model = build_config(run.manifest["config"])
    head = "scalar" if run.manifest["stage"] == "reward_model" else "tokens"
    return abstract_params(
        Transformer(model.model, tiny_models.compute(), head), stages.mesh_of()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": -1}, r"config\.lora: rank = -1 must be at least 0"),
        ({"lora.alpha": 0.0}, r"config\.lora: alpha = 0\.0 must be above 0"),
        (
            {"lora.rank": 33},
            r"^config\.lora\.rank = 33 is above config\.model\.embed_dim = 32: lower it",
        ),
        (
            {"parent": ""},
            r"^config\.lora\.rank = 2, but there is no parent whose weights could stay",
        ),
    ],
)
def test_invalid_values_are_refused(chain, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        stages.initial_state(config_of(chain, "sft", **changes), tmp_path / "run")


def test_adapters_are_the_same_on_eight_devices(chain):
    """All leaves have a sharding, and the merged weights equal those on one device."""
    model = Transformer(tiny_models.llama_config(), tiny_models.compute(), "tokens")
    params = random_lora_params(model)
    mesh = stages.mesh_of(2, 2, 2)
    spread = jax.device_put(params, sharding.shardings(params, mesh))
    stages.assert_trees_close(
        jax.jit(merge_lora)(spread), merge_lora(params), rtol=1e-6, atol=1e-6
    )
    state = start_from(
        tiny_models.random_params(model),
        optax.adam(1.0),
        mesh,
        lambda p: add_lora(p, LORA, jax.random.key(0)),
    )
    alone = add_lora(tiny_models.random_params(model), LORA, jax.random.key(0))
    stages.assert_trees_close(
        jax.device_get(state.params), jax.device_get(alone), rtol=1e-6, atol=1e-7
    )
