"""What the benchmark counts: operations (worked out by hand), tokens and compilations.
Every workload runs."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import benchmark as benchmark_config
from tests.support import tiny_models

from instructax import sharding
from instructax.models.lora import LoraConfig
from instructax.stages import build_config
from instructax.stages.benchmark import measure as benchmark
from instructax.stages.benchmark import operations, workloads

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")


def test_operations_by_hand():
    """Two layers, D = 16, 4 heads of 6, MLP of 28, V = 23; ten tokens in documents of 5, 4
    of them scored."""
    layer = 4 * 16 * 24 + 2 * 16 * 28
    attention = 2 * 24 * 5  # attention scores and weighted sums, over 2.5 keys on average
    wanted = 10 * 2 * (2 * layer + attention) + 2 * 4 * 23 * 16
    assert operations.forward_operations(tiny_models.gpt_config(), 10, 5, 4) == wanted
    # Half as many key heads as query heads, and a gate.
    grouped = 2 * 16 * 24 + 2 * 16 * 12 + 3 * 16 * 28
    assert (
        operations.forward_operations(tiny_models.llama_config(), 1, 0, 0)
        == 2 * 2 * grouped
    )
    # In a window of two, the five tokens attend to 1, 2, 2, 2 and 2 keys, 1.8 on average.
    # It is counted as 1.6, as all keys are counted as 2.5.
    windowed = tiny_models.gpt_config(sliding_window=2, window_layers=(0,))
    wanted = 10 * (4 * layer + 4 * 24 * (1.6 + 2.5)) + 2 * 4 * 23 * 16
    assert operations.forward_operations(windowed, 10, 5, 4) == pytest.approx(
        wanted, rel=1e-12
    )


def test_operations_with_a_shared_prompt_and_with_lora():
    """In a window of three, each of the eight tokens after the first six attends to three
    keys, whatever the length."""
    config = config_of("reward_model2,M")
    near = dataclasses.replace(config.model, sliding_window=3, window_layers=(0,))
    config = dataclasses.replace(config, model=near)
    prompt_operations = operations.forward_operations(near, 6, 6, 0)
    block = 4 * 16 * 16 + 2 * 16 * 32
    response_operations = 2 * 8 * (2 * block + 4 * 16 * 3)
    counted = workloads.reward_work(
        config, sharding.make_mesh(config.mesh), 0.0
    ).operations({})
    assert counted == pytest.approx(
        3 * (prompt_operations + response_operations), rel=1e-12
    )
    lora = dataclasses.replace(config, lora=LoraConfig(rank=2, alpha=2.0))
    assert operations.update_cost(lora) == 2 and operations.update_cost(config) == 3


def config_of(arg: str) -> Any:
    """The config of a workload, with a network and lengths that run in seconds."""
    values = benchmark_config.get_config(arg)
    for model in (values.model, values.get("reward_model")):
        if model is not None:
            model.num_layers, model.embed_dim, model.num_heads, model.num_kv_heads = (
                1,
                16,
                2,
                2,
            )
            model.head_dim, model.mlp_dim, model.vocab_size, model.max_length = (
                8,
                32,
                61,
                64,
            )
    values.data.limits.update(sequence_tokens=24, prompt_tokens=6, response_tokens=8)
    values.mesh.data = 1
    return build_config(values.to_dict())


def run_benchmark(arg: str, **changes: Any) -> dict[str, Any]:
    """The record of a workload. `changes` are arguments of `measure` or config values."""
    given = {
        "steps": 2,
        "ending": 0.0,
        "sampling_alone": False,
        "side_by_side": 0,
        "profile": "",
    }
    own = {name: changes.pop(name) for name in set(changes) - set(given)}
    return benchmark.measure(
        dataclasses.replace(config_of(arg), **own), **{**given, **changes}
    )


@pytest.mark.parametrize(
    ("arg", "tokens", "padding"),
    [
        ("sft,S", 8 * 24, {"padding": 0.0}),
        ("reward_model,S", 6 + 9 * 8, {"padding": 0.0}),
        ("reward_model2,M", 6 + 2 * 8, {"padding": 0.0}),
        # One sequence per row of 24; two prompts per row.
        (
            "ppo,S",
            32 * 14,
            {"padding": 10 / 24, "prefill_padding": 0.0, "update_padding": 10 / 24},
        ),
    ],
)
def test_every_workload_runs_and_compiles_once(arg, tokens, padding):
    record = run_benchmark(arg, steps=3)
    assert record["tokens"] == tokens
    assert record["padding"] == pytest.approx(padding, abs=1e-6)
    assert record["compilations"] > 0
    assert record["compilations_after_the_first"] == 0
    assert record["tokens_per_second_per_device"] == pytest.approx(
        tokens / record["seconds"]
    )
    assert 0 < record["share_of_matmul"] < 1
    assert record["attention"] == "jax (auto: cpu has no other)"
    assert all(
        np.isfinite(x)
        for x in jax.tree.leaves(
            {k: v for k, v in record.items() if not isinstance(v, str)}
        )
    )
    assert [line.split("  ")[0] for line in benchmark.table(record)][:3] == [
        "device",
        "one repetition",
        "tokens",
    ]


@pytest.mark.slow
def test_ptx_trains_on_text():
    config = config_of("ppo,S")
    given = {
        "steps": 1,
        "ending": 0.0,
        "sampling_alone": False,
        "side_by_side": 0,
        "profile": "",
    }
    without = benchmark.measure(config, **given)
    record = benchmark.measure(dataclasses.replace(config, ptx_coef=1.0), **given)
    text = 8 * 4 * 24  # the tokens of eight rows for each of four minibatches
    assert record["operations"] - without[
        "operations"
    ] == 3 * operations.forward_operations(config.model, text, 24, text)


def test_a_stage_that_does_not_fit_is_one_line():
    with pytest.raises(
        ValueError,
        match=r"config\.stage = 'pretrain' samples nothing: leave out --sampling_alone",
    ):
        run_benchmark("sft,S", sampling_alone=True)
    evaluation = SimpleNamespace(stage="evaluate")
    with pytest.raises(
        ValueError,
        match=(
            r"config\.stage = 'evaluate' trains nothing: give one of pretrain, "
            r"sft, reward_model"
        ),
    ):
        benchmark.measure(
            evaluation,
            steps=1,
            ending=0.0,
            sampling_alone=False,
            side_by_side=0,
            profile="",
        )
    with pytest.raises(
        ValueError, match=r"^config\.batch_size = 8 rows must be a positive multiple of 3"
    ):
        run_benchmark("sft,S", accumulate=3)


@pytest.mark.parametrize("change", [{"norm": "rmsnorm"}, {"tied_embeddings": False}])
def test_forced_endings_need_a_supported_network(change):
    config = config_of("ppo,S")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    with pytest.raises(
        ValueError, match=r"--ending needs config[.]model[.]norm = 'layernorm'"
    ):
        benchmark.measure(
            config, steps=1, ending=0.1, sampling_alone=True, side_by_side=0, profile=""
        )


@pytest.mark.slow
def test_vmapped_runs():
    alone = run_benchmark("ppo,S")
    three = run_benchmark("ppo,S", side_by_side=3)
    assert (
        three["tokens"] == 3 * alone["tokens"]
        and three["operations"] == 3 * alone["operations"]
    )
    assert (
        list(three["seconds_of"]) == ["iteration"]
        and three["compilations_after_the_first"] == 0
    )


def test_the_sampler_by_itself():
    record = run_benchmark("ppo,S", sampling_alone=True)
    assert record["tokens"] == 32 * 8 and record["padding"] == {
        "prefill_padding": pytest.approx(0.0)
    }
    assert list(record["seconds_of"]) == ["rollout"]


def test_a_policy_with_a_given_eos_probability():
    """With an EOS probability of 0.25, responses have (1 − 0.75⁸) / 0.25 = 3.6 tokens on
    average, ± 0.47 for 32 responses."""
    record = run_benchmark("ppo,S", sampling_alone=True, ending=0.25)
    assert record["tokens"] / 32 == pytest.approx(3.6, abs=3 * 0.47)


def test_compilations_are_counted_while_entered():
    counter = benchmark.Compilations()
    with counter:
        jax.jit(lambda x: x + 1.5)(jnp.ones(3)).block_until_ready()
    counted = counter.count
    jax.jit(lambda x: x + 2.5)(jnp.ones(3)).block_until_ready()
    assert counter.count == counted > 0


@pytest.mark.parametrize("arg", ["ppo", "ppo,L", "tasks,S", ""])
def test_an_unknown_workload_is_one_line(arg):
    with pytest.raises(ValueError, match=r"^benchmark '.*' must be one of [^\n]*ppo,S$"):
        benchmark_config.get_config(arg)
