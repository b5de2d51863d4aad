"""Every leaf of every state has the layout in the table below, and batch rows are split
over the right devices."""

import ast
import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tests.support import tiny_models

from instructax import sharding
from instructax.models.lora import LoraConfig, add_lora
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig, make_mesh
from instructax.training.optimizer import make_optimizer
from instructax.training.state import abstract_state, no_adapters
from instructax.types import PpoState

SOURCES = Path(sharding.__file__).parent

# Parameter → its layout and the families that have it, or "all". Layers come first in the
# shapes of everything under `blocks`.
COLUMNS = P(None, ("tensor", "fsdp"))
TABLE = {
    "embedding": (COLUMNS, "all"),
    "positions": (COLUMNS, "gpt"),
    "blocks/attention/query/kernel": (P(None, "fsdp", "tensor", None), "all"),
    "blocks/attention/key/kernel": (P(None, "fsdp", "tensor", None), "all"),
    "blocks/attention/value/kernel": (P(None, "fsdp", "tensor", None), "all"),
    "blocks/attention/out/kernel": (P(None, "tensor", None, "fsdp"), "all"),
    "blocks/attention/query/bias": (P(None, "tensor", None), "gpt neox qwen"),
    "blocks/attention/key/bias": (P(None, "tensor", None), "gpt neox qwen"),
    "blocks/attention/value/bias": (P(None, "tensor", None), "gpt neox qwen"),
    "blocks/attention/out/bias": (P(), "gpt neox"),
    "blocks/attention/query_norm/scale": (P(), "qwen"),
    "blocks/attention/key_norm/scale": (P(), "qwen"),
    "blocks/attention_post_norm/scale": (P(), "gemma"),
    "blocks/mlp_post_norm/scale": (P(), "gemma"),
    "blocks/attention_norm/scale": (P(), "all"),
    "blocks/attention_norm/bias": (P(), "gpt neox"),
    "blocks/mlp/up/kernel": (P(None, "fsdp", "tensor"), "all"),
    "blocks/mlp/gate/kernel": (P(None, "fsdp", "tensor"), "llama qwen gemma"),
    "blocks/mlp/down/kernel": (P(None, "tensor", "fsdp"), "all"),
    "blocks/mlp/up/bias": (P(None, "tensor"), "gpt neox"),
    "blocks/mlp/down/bias": (P(), "gpt neox"),
    "blocks/mlp_norm/scale": (P(), "all"),
    "blocks/mlp_norm/bias": (P(), "gpt neox"),
    "final_norm/scale": (P(), "all"),
    "final_norm/bias": (P(), "gpt neox"),
}
# Low-rank adapters: the rank axis is never sharded.
ADAPTERS = {
    **{
        f"attention/{name}/lora_a": P(None, "fsdp", None)
        for name in ("query", "key", "value")
    },
    **{
        f"attention/{name}/lora_b": P(None, None, "tensor")
        for name in ("query", "key", "value")
    },
    **{f"mlp/{name}/lora_a": P(None, "fsdp", None) for name in ("up", "gate")},
    **{f"mlp/{name}/lora_b": P(None, None, "tensor") for name in ("up", "gate")},
    **{f"{name}/lora_a": P(None, "tensor") for name in ("attention/out", "mlp/down")},
    **{f"{name}/lora_b": P(None, None, "fsdp") for name in ("attention/out", "mlp/down")},
}
HEADS = {
    ("tokens", True): {},
    ("tokens", False): {"head/kernel": COLUMNS},
    ("scalar", True): {"scalar_head/kernel": P(), "scalar_head/bias": P()},
    ("scalar", False): {"scalar_head/kernel": P(), "scalar_head/bias": P()},
}
FAMILIES = {
    "gpt": tiny_models.gpt_config,
    "llama": tiny_models.llama_config,
    "neox": tiny_models.neox_config,
    "qwen": tiny_models.qwen_config,
    "gemma": tiny_models.gemma_config,
}
EVERY_MODEL = [(family, head, tied) for family in FAMILIES for head, tied in HEADS]


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def state_of(family: str, head, tied: bool, mesh: jax.sharding.Mesh):
    """The abstract state, with everything that an optimizer may hold."""
    model = Transformer(FAMILIES[family](tied_embeddings=tied), tiny_models.compute(), head)
    optimizer = make_optimizer(
        tiny_models.optimizer_config(clip_norm=1.0, weight_decay=0.1)
    )
    return abstract_state(model, optimizer, mesh, no_adapters)


def adapted_state(mesh: jax.sharding.Mesh):
    """The abstract state of a network with low-rank adapters."""
    model = Transformer(tiny_models.llama_config(), tiny_models.compute(), "scalar")
    lora = LoraConfig(rank=3, alpha=1.0)
    optimizer = make_optimizer(tiny_models.optimizer_config())
    return abstract_state(
        model, optimizer, mesh, lambda p: add_lora(p, lora, jax.random.key(0))
    )


def specs_of(tree) -> dict[str, P]:
    return {
        sharding.leaf_path(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(("family", "head", "tied"), EVERY_MODEL)
def test_every_leaf_has_the_layout_in_the_table(family, head, tied):
    of_params = {
        name: spec
        for name, (spec, who) in TABLE.items()
        if who == "all" or family in who.split()
    } | HEADS[head, tied]
    # A leaf's moments have its layout.
    places = ("params", "opt_state/1/mu", "opt_state/1/nu")
    expected = {
        f"{place}/{name}": spec for place in places for name, spec in of_params.items()
    }
    expected |= {"step": P(), "opt_state/1/count": P()}
    state = state_of(family, head, tied, mesh_of(2, 2, 2))
    assert specs_of(state) == expected
    # Parameters alone, as read by a later stage.
    bare = sharding.abstract_arrays(state.params, mesh_of(2, 2, 2))
    assert specs_of(bare) == of_params


def test_adapters_have_their_layout_and_only_they_have_moments():
    specs = specs_of(adapted_state(mesh_of(2, 2, 2)))
    own = {
        name: spec
        for name, spec in specs.items()
        if "lora" in name and name.startswith("params/")
    }
    scales = {
        f"params/blocks/{name.rpartition('/')[0]}/lora_scale": P() for name in ADAPTERS
    }
    assert (
        own == {f"params/blocks/{name}": spec for name, spec in ADAPTERS.items()} | scales
    )
    moments = {name: spec for name, spec in specs.items() if "/mu/" in name}
    trained = {f"blocks/{name}": spec for name, spec in ADAPTERS.items()} | HEADS[
        "scalar", False
    ]
    assert moments == {f"opt_state/0/mu/{name}": spec for name, spec in trained.items()}


def test_the_averaged_policy_has_the_layout_of_the_policy():
    mesh = mesh_of(1, 4, 2)
    policy = state_of("gpt", "tokens", True, mesh)
    value = state_of("llama", "scalar", False, mesh)
    specs = specs_of(
        sharding.abstract_arrays(
            PpoState(policy=policy, value=value, ema=policy.params), mesh
        )
    )
    own = {
        name.removeprefix("ema/"): spec
        for name, spec in specs.items()
        if name.startswith("ema/")
    }
    assert own == specs_of(policy.params)


def unused_rules(trees) -> list[str]:
    """Patterns of the table that are not the first match of any leaf of `trees`."""
    used = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(trees):
        pattern, _ = sharding.matching_rule(sharding.leaf_path(path))
        used.add(pattern)
    return [pattern for pattern, _ in sharding.LAYOUTS if pattern not in used]


def test_every_rule_is_used_and_an_unused_one_is_found(monkeypatch):
    states = [
        *(state_of(*model, mesh_of(2, 2, 2)) for model in EVERY_MODEL),
        adapted_state(mesh_of(2, 2, 2)),
    ]
    assert unused_rules(states) == []
    bare_llama = [state_of("llama", "tokens", False, mesh_of(2, 2, 2))]
    assert "mlp/(up|gate)/bias" in unused_rules(bare_llama)
    # A rule that is shadowed by an earlier one is as unused as one that matches nothing.
    planted = (("moe/router/kernel", P()), *sharding.LAYOUTS, ("query/kernel", P()))
    monkeypatch.setattr(sharding, "LAYOUTS", planted)
    assert unused_rules(states) == ["moe/router/kernel", "query/kernel"]


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("name", ["router/kernel", "positional", "my_embedding"])
def test_a_leaf_without_a_rule_is_an_error(name):
    tree = {"params": {"blocks": {name: leaf(4, 4)}}}
    message = (
        f"no layout for the leaf 'params/blocks/{name}': add a rule to "
        f"instructax.sharding.LAYOUTS"
    )
    for call in (
        lambda: sharding.shardings(tree, mesh_of(2, 2, 2)),
        lambda: unused_rules(tree),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"mlp": {"up": {"kernel": leaf(2, 16, 7)}}},
            "mlp/up/kernel (2, 16, 7): 7 does not divide by mesh axes tensor = 2: "
            "change model or mesh",
        ),
        (
            {"params": {"embedding": leaf(23, 6)}},
            "params/embedding (23, 6): 6 does not divide by mesh axes ('tensor', "
            "'fsdp') = 4: change model or mesh",
        ),
    ],
)
def test_a_shape_that_does_not_divide_is_a_one_line_error(tree, message):
    with pytest.raises(ValueError) as caught:
        sharding.shardings(tree, mesh_of(2, 2, 2))
    assert str(caught.value) == message


def test_make_mesh():
    mesh = mesh_of(-1, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh_of(-1, 8, 1).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    one = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1), jax.devices()[3:4])
    assert (
        dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
        and one.devices.item() == jax.devices()[3]
    )
    assert (
        sharding.num_row_shards(mesh_of(2, 4, 1)) == 8
        and sharding.num_row_shards(mesh) == 4
    )


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 1), (-1, 3, 1), (-1, 16, 1), (0, 2, 4), (-1, 0, 1), (-2, -2, 2), (1, -8, -1)],
)
def test_a_mesh_that_does_not_fit_is_one_line(sizes):
    with pytest.raises(ValueError) as caught:
        mesh_of(*sizes)
    product = " × ".join(map(str, sizes))
    assert str(caught.value) == (
        f"mesh.data × mesh.fsdp × mesh.tensor = {product} must equal the number of "
        f"devices, 8"
    )


def test_gpus_that_jax_cannot_use_are_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "0000:01:00.0").mkdir()
    monkeypatch.setattr(sharding, "GPUS", tmp_path)
    mesh_of(-1, 1, 1)  # the tests request the CPU
    with monkeypatch.context() as unasked:
        unasked.setattr(
            sharding.jax, "config", types.SimpleNamespace(values={"jax_platforms": None})
        )
        with pytest.raises(
            ValueError, match="has 1 NVIDIA GPUs, but JAX would run on the CPU"
        ):
            make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
        unasked.setattr(sharding, "GPUS", tmp_path / "none")
        make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))


def test_put_rows_gives_each_device_its_rows():
    """Four ways to shard rows; the two devices of a tensor pair hold the same rows."""
    mesh = mesh_of(2, 2, 2)
    rows = sharding.shard_rows(
        {"x": np.arange(24).reshape(8, 3), "flag": np.ones(4, bool)}, mesh
    )
    found = {
        shard.device: np.asarray(shard.data)[:, 0].tolist()
        for shard in rows["x"].addressable_shards
    }
    for i, fours in enumerate(mesh.devices):
        for j, pair in enumerate(fours):
            first = 6 * (2 * i + j)
            assert [found[device] for device in pair] == [[first, first + 3]] * 2
    assert rows["flag"].dtype == bool and rows["flag"].sharding == sharding.row_sharding(
        mesh
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_constrain_rows(axis):
    mesh = mesh_of(2, 4, 1)
    x = jnp.zeros((8, 8, 3))
    y = jax.jit(lambda x: sharding.constrain_rows({"x": x + 1}, mesh, axis=axis)["x"])(x)
    expected = [8, 8, 3]
    expected[axis] = 1
    assert [shard.data.shape for shard in y.addressable_shards] == [tuple(expected)] * 8


def test_replicated():
    x = jax.device_put(jnp.arange(3), sharding.replicated(mesh_of(2, 2, 2)))
    assert [shard.data.shape for shard in x.addressable_shards] == [(3,)] * 8


def test_abstract_keeps_shapes_and_dtypes():
    tree = {"step": jax.ShapeDtypeStruct((), jnp.int32), "embedding": leaf(5, 8)}
    made = sharding.abstract_arrays(tree, mesh_of(2, 2, 2))
    assert (made["step"].dtype, made["embedding"].shape, made["embedding"].dtype) == (
        jnp.int32,
        (5, 8),
        jnp.float32,
    )
    assert made["embedding"].sharding.shard_shape((5, 8)) == (5, 2)


def named_axes(source: str) -> list[str]:
    """Mesh axes that `source` names as strings; "data" is left out because it is also an
    ordinary word."""
    own = {field.name for field in dataclasses.fields(MeshConfig)} - {"data"}
    nodes = ast.walk(ast.parse(source))
    return [
        node.value for node in nodes if isinstance(node, ast.Constant) and node.value in own
    ]


def test_no_other_file_names_a_mesh_axis():
    named = {
        path.name: named_axes(path.read_text())
        for path in SOURCES.rglob("*.py")
        if path.stem != "sharding"
    }
    assert {name: axes for name, axes in named.items() if axes} == {}
    assert named_axes("P(None, 'fsdp')\nmesh.shape['tensor']") == ["fsdp", "tensor"]
    assert not named_axes("config.mesh.fsdp")
