"""Memory estimated from shapes equals what arrays on eight devices really use."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from configs import ppo as ppo_config
from configs import reward_model as reward_config
from configs import sft as sft_config
from tests.support import tiny_models

from instructax import sharding
from instructax.config import ConfigError
from instructax.models.kv_cache import init_cache
from instructax.models.lora import LoraConfig
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig, make_mesh
from instructax.stages import build_config, load_stage
from instructax.stages import memory as estimate
from instructax.training.optimizer import make_optimizer
from instructax.training.state import abstract_state, no_adapters

GIB = 2**30


def small_ppo(mesh: MeshConfig, batch_size: int = 8) -> SimpleNamespace:
    """The fields of a PPO config that affect memory."""
    return SimpleNamespace(
        stage="ppo",
        seed=0,
        lora=LoraConfig(rank=0, alpha=1.0),
        mesh=mesh,
        model=tiny_models.gpt_config(),
        reward_model=tiny_models.llama_config(num_layers=1),
        compute=tiny_models.compute(decoding_dtype="bf16"),
        optimizer=tiny_models.optimizer_config(clip_norm=1.0),
        value_optimizer=tiny_models.optimizer_config(),
        batch_size=batch_size,
        data=SimpleNamespace(limits=SimpleNamespace(prompt_tokens=5, response_tokens=7)),
    )


def memory_of(config) -> dict[str, int]:
    """Bytes per device for a config, on its mesh without devices."""
    mesh = estimate.abstract_mesh(config.mesh)
    return load_stage(config.stage).memory(config, mesh)


def report_of(config) -> str:
    return estimate.memory_report(config, memory_of(config))


def held_by_first_device(tree) -> int:
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_memory_is_what_real_arrays_take(sizes):
    mesh_config = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    config = small_ppo(mesh_config)
    mesh = make_mesh(mesh_config)

    def zeros(model, head, optimizer):
        abstract = abstract_state(
            Transformer(model, config.compute, head),
            make_optimizer(optimizer),
            mesh,
            no_adapters,
        )
        return jax.tree.map(
            lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), abstract
        )

    policy = zeros(config.model, "tokens", config.optimizer)
    value = zeros(config.reward_model, "scalar", config.value_optimizer)
    # KV caches of one device's rows, with the heads sharded over the tensor axis.
    rows = 8 // (sizes[0] * sizes[1])
    limits = config.data.limits
    slots = min(rows, config.compute.slots)
    sampler = dataclasses.replace(config.compute, dtype="bf16")
    prompts = jax.tree.leaves(init_cache(config.model, sampler, rows, limits.prompt_tokens))
    cache = jax.tree.leaves(init_cache(config.model, sampler, slots, 12))
    assert memory_of(config) == {
        "policy": held_by_first_device(policy.params),
        "optimizer of the policy": held_by_first_device(policy.opt_state),
        "value model": held_by_first_device(value.params),
        "optimizer of the value model": held_by_first_device(value.opt_state),
        "averaged policy": held_by_first_device(policy.params),
        "reference policy": held_by_first_device(policy.params),
        "reward model": held_by_first_device(value.params),
        "cache of the prompts": sum(leaf.nbytes for leaf in prompts) // sizes[2],
        "cache of the sampler": sum(leaf.nbytes for leaf in cache) // sizes[2],
    }


def test_rows_that_do_not_divide_are_rounded_up():
    mesh = MeshConfig(data=1, fsdp=2, tensor=1)
    nine, ten = (
        memory_of(small_ppo(mesh, rows))["cache of the prompts"] for rows in (9, 10)
    )
    assert nine == ten > memory_of(small_ppo(mesh, 8))["cache of the prompts"]


def built(module, arg: str):
    values = module.get_config(arg).to_dict()
    return build_config(values)


def test_the_other_stages_hold_one_model():
    assert list(memory_of(built(sft_config, "tiny"))) == ["model", "optimizer of the model"]
    assert list(memory_of(built(reward_config, "tiny"))) == [
        "reward model",
        "optimizer of the reward model",
    ]


def test_memory_of_175b():
    """175 · 10⁹ parameters of 4 bytes over 256 devices are 2.55 GiB each, and Adam's two
    moments are twice that.

    Over the 64 devices of the SFT run, it is four times as much. The reward model of 6.7 ·
    10⁹ parameters is 26 times smaller. Norms and the biases of the residual stream, 1% of a
    device's share, are replicated on every device.
    """
    held = {name: size / GIB for name, size in memory_of(built(ppo_config, "175b")).items()}
    assert (
        held["policy"]
        == held["averaged policy"]
        == held["reference policy"]
        == pytest.approx(2.55, rel=0.02)
    )
    assert held["optimizer of the policy"] == pytest.approx(5.10, rel=0.02)
    assert held["policy"] / held["reward model"] == pytest.approx(174.6 / 6.65, rel=0.03)
    # 512 rows over 32 devices, 2048 columns, 96 layers, keys and values of 96 / 8 heads of
    # 128, 2 bytes.
    assert held["cache of the sampler"] == pytest.approx(
        16 * 2048 * 96 * 2 * 12 * 128 * 2 / GIB, rel=0.01
    )
    assert sum(held.values()) < 80
    sft = {name: size / GIB for name, size in memory_of(built(sft_config, "175b")).items()}
    assert sft == {
        "model": pytest.approx(10.2, rel=0.02),
        "optimizer of the model": pytest.approx(20.4, rel=0.02),
    }


def test_report():
    lines = report_of(built(ppo_config, "175b")).splitlines()
    assert lines[0].startswith("model: 174,6") and lines[0].endswith(" parameters")
    assert lines[1].startswith("reward_model: 6,6") and lines[1].endswith(" parameters")
    assert (
        lines[2] == "mesh: data 1 × fsdp 32 × tensor 8 = 256 devices, or a multiple "
        "(config.mesh.data = -1)"
    )
    assert lines[3].split() == ["policy", "2.571", "GiB", "per", "device"]
    total = sum(memory_of(built(ppo_config, "175b")).values()) / GIB
    assert lines[-1].split()[:3] == ["held", "throughout", f"{total:.3f}"]


def test_report_of_one_model():
    lines = report_of(built(reward_config, "tiny")).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["model", "mesh"]
    assert len(lines) == 5


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_an_impossible_mesh_is_refused(sizes):
    with pytest.raises(ConfigError, match="axes must be positive"):
        estimate.abstract_mesh(
            MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
        )


def test_a_mesh_that_does_not_divide_the_model_is_refused_before_any_device_is_needed():
    config = dataclasses.replace(
        built(ppo_config, "tiny"), mesh=MeshConfig(data=1, fsdp=64, tensor=1)
    )
    with pytest.raises(ValueError, match=r"does not divide by mesh axes .* = 64"):
        memory_of(config)


def test_every_row_sharding_is_counted():
    assert (
        sharding.num_row_shards(
            estimate.abstract_mesh(MeshConfig(data=-1, fsdp=4, tensor=2))
        )
        == 4
    )
