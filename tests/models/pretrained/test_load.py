"""Pretrained files: names, layouts and refused input, with hand-written arrays.

tests/integration/test_interop.py compares with transformers.
"""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from configs import sizes
from safetensors.numpy import load_file, save_file
from tests.support import tiny_models

from instructax import sharding
from instructax.config import ConfigError, construct
from instructax.models.config import ModelConfig, RotaryScaling
from instructax.models.init import abstract_params
from instructax.models.pretrained import hf_folder, load, save, weight_maps
from instructax.models.pretrained.hf_configs import read_config, write_config
from instructax.models.pretrained.weight_maps import TensorSpec, join_tensor, split_tensor
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 28,
}


def mesh_of(**shape: int) -> jax.sharding.Mesh:
    shape = {**ONE, **shape}
    return sharding.make_mesh(
        MeshConfig(**shape),
        jax.devices()[: shape["data"] * shape["fsdp"] * shape["tensor"]],
    )


def abstract_of(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Any:
    return abstract_params(
        Transformer(config, tiny_models.compute(), "tokens"), mesh or mesh_of()
    )


def write_folder(
    path: Path, config: ModelConfig, dtype: str = "float32"
) -> tuple[str, Any]:
    """Writes a folder with random parameters; returns its family and the parameters."""
    params = tiny_models.random_params(Transformer(config, tiny_models.compute(), "tokens"))
    family, raw = write_config(config)
    path.mkdir(exist_ok=True)
    save.save_tensors(path, params, family, config, dtype)
    save.write_hf_json(path / "config.json", raw)
    return family, params


def read(path: Path, mesh: jax.sharding.Mesh | None = None) -> Any:
    family, config = read_config(hf_folder.read_hf_json(path / "config.json"))
    return load.read_params(
        hf_folder.open_tensors(path),
        family,
        config,
        abstract_of(config, mesh),
        source=path,
    )


# Layouts.

TWO_HEADS = tiny_models.gpt_config(embed_dim=3, num_heads=2, num_kv_heads=2, head_dim=2)


def test_gpt2_fused_qkv_columns():
    """c_attn maps 3 inputs to 4 outputs for all queries, then all keys, then all values."""
    row = next(row for row in weight_maps.GPT2 if row.name.endswith("c_attn.weight"))
    tensor = np.arange(36.0).reshape(3, 12)
    query, key, value = split_tensor(tensor, row, TWO_HEADS)
    assert query.tolist() == [[[0, 1], [2, 3]], [[12, 13], [14, 15]], [[24, 25], [26, 27]]]
    assert key[0].tolist() == [[4, 5], [6, 7]] and value[2].tolist() == [[32, 33], [34, 35]]
    np.testing.assert_array_equal(join_tensor([query, key, value], row, TWO_HEADS), tensor)


def test_neox_fused_qkv_rows():
    """For each head, query_key_value has 2 rows each for the query, the key and the value,
    with 3 inputs."""
    row = next(
        row for row in weight_maps.NEOX if row.name.endswith("query_key_value.weight")
    )
    tensor = np.arange(36.0).reshape(12, 3)
    query, key, value = split_tensor(tensor, row, TWO_HEADS)
    assert query[:, 0].tolist() == [[0, 3], [1, 4], [2, 5]]  # rows 0 and 1
    assert key[:, 1].tolist() == [[24, 27], [25, 28], [26, 29]]  # rows 8 and 9
    assert value[:, 0].tolist() == [[12, 15], [13, 16], [14, 17]]
    np.testing.assert_array_equal(join_tensor([query, key, value], row, TWO_HEADS), tensor)
    bias = next(
        row for row in weight_maps.NEOX if row.name.endswith("query_key_value.bias")
    )
    assert [part.tolist() for part in split_tensor(np.arange(12.0), bias, TWO_HEADS)] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [10, 11]],
    ]


def test_llama_grouped_heads():
    """Torch's Linear has outputs first. k_proj has one head of size 2 and 3 inputs; o_proj
    reads two such heads."""
    config = tiny_models.llama_config(embed_dim=3, num_heads=2, num_kv_heads=1, head_dim=2)
    by_name = {
        row.name.split(".")[-2]: row
        for row in weight_maps.LLAMA
        if row.name.endswith("proj.weight")
    }
    (key,) = split_tensor(np.arange(6.0).reshape(2, 3), by_name["k_proj"], config)
    assert key.tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]
    (out,) = split_tensor(np.arange(12.0).reshape(3, 4), by_name["o_proj"], config)
    assert out.tolist() == [[[0, 4, 8], [1, 5, 9]], [[2, 6, 10], [3, 7, 11]]]


def test_a_planted_layout_fault_is_detected():
    tensor = np.arange(36.0).reshape(12, 3)
    names = tuple(f"attention/{x}/kernel" for x in weight_maps.QKV)
    right = TensorSpec("x", "H*3*d D", names)
    wrong = TensorSpec("x", "3*H*d D", names)
    assert (
        split_tensor(tensor, right, TWO_HEADS)[1].tolist()
        != split_tensor(tensor, wrong, TWO_HEADS)[1].tolist()
    )


MODELS = {
    "gpt2": tiny_models.gpt_config(head_dim=4),
    "gpt_neox": tiny_models.neox_config(head_dim=4),
    "llama": tiny_models.llama_config(),
    "mistral": tiny_models.llama_config(sliding_window=5, window_layers=(0, 1)),
    "qwen2": tiny_models.llama_config(qkv_biases=True, head_dim=4),
    "qwen3": tiny_models.llama_config(qk_norm=True, tied_embeddings=True),
    "gemma": tiny_models.llama_config(
        activation="geglu", scale_embedding=True, tied_embeddings=True
    ),
    "gemma2": tiny_models.gemma_config(),
}


@pytest.mark.parametrize("family", MODELS)
def test_round_trip_is_bitwise(family, tmp_path):
    config = MODELS[family]
    named, params = write_folder(tmp_path, config)
    assert (
        named == family
        and read_config(hf_folder.read_hf_json(tmp_path / "config.json"))[1].num_layers
        == config.num_layers
    )
    found = read(tmp_path)
    if not family.startswith("gemma"):
        jax.tree.map(np.testing.assert_array_equal, found, params)
    else:
        # Scales below 1/2 lose a bit in the first export, which stores scale − 1, but not
        # in the second.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found, params
        )
        save.save_tensors(tmp_path, found, family, config, "float32")
        jax.tree.map(np.testing.assert_array_equal, read(tmp_path), found)
    scale = load_file(tmp_path / "model.safetensors")[
        {
            "gpt2": "transformer.ln_f.weight",
            "gpt_neox": "gpt_neox.final_layer_norm.weight",
        }.get(family, "model.norm.weight")
    ]
    less = 1.0 if family.startswith("gemma") else 0.0
    np.testing.assert_allclose(scale, params["final_norm"]["scale"] - less, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [{"fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"data": 2, "tensor": 2}]
)
def test_each_device_gets_its_shard(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "CHUNK_ELEMENTS", 24)  # several pieces per tensor
    _, params = write_folder(
        tmp_path,
        tiny_models.llama_config(mlp_dim=32, num_kv_heads=4, head_dim=4, qkv_biases=True),
    )
    found = read(tmp_path, mesh_of(**shape))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    wanted = sharding.shardings(found, mesh_of(**shape))
    jax.tree.map(
        lambda x, layout: (
            x.sharding.is_equivalent_to(layout, x.ndim) or pytest.fail(str(x.sharding))
        ),
        found,
        wanted,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_load_as_float32(dtype, tmp_path):
    _, params = write_folder(tmp_path, tiny_models.llama_config())
    short = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    tensors = {
        name: x.astype(short)
        for name, x in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            a, np.asarray(b).astype(short).astype(np.float32)
        ),
        found,
        params,
    )


def test_sharded_files_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 3000)
    _, params = write_folder(tmp_path, tiny_models.llama_config(), "bfloat16")
    index = json.loads((tmp_path / hf_folder.INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    held = {name: x for file in files for name, x in load_file(tmp_path / file).items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in held.values())
    assert {x.dtype for x in held.values()} == {np.dtype(ml_dtypes.bfloat16)}
    found = read(tmp_path)
    np.testing.assert_allclose(found["embedding"], params["embedding"], rtol=2**-8)


def test_peak_memory_beyond_the_parameters(tmp_path):
    """Loading needs at most 1.5 times the largest tensor beyond the parameters, because
    tensors are placed piece by piece.

    tracemalloc counts host memory of NumPy and safetensors; the parameters belong to XLA.
    The largest tensor is a stacked one.
    """
    config = tiny_models.llama_config(
        embed_dim=256,
        mlp_dim=8192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        tied_embeddings=True,
    )
    write_folder(tmp_path, config)
    largest = 256 * 8192 * 4
    read(tmp_path)  # warm-up: compiles
    tracemalloc.start()
    old, load.CHUNK_ELEMENTS = load.CHUNK_ELEMENTS, 1 << 18
    try:
        read(tmp_path)
    finally:
        load.CHUNK_ELEMENTS = old
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest <= peak < 1.5 * largest


# Refused input, and the names in the messages.


def changed_tensors(path: Path, **changes: np.ndarray | None) -> None:
    """The tensors of a folder with some added, replaced or (None) removed; `__` stands for
    a dot."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__norm__weight": None},
            r": the file of this llama model lacks 'model.norm.weight': download it again$",
        ),
        (
            {"model__extra": np.zeros(2, np.float32)},
            r": the file of this llama model has tensors .*: 'model.extra': give a model",
        ),
        (
            {"../x": np.zeros(2, np.float32)},
            r"has tensors that it should not: '../x': give",
        ),
        (
            {"model__layers__1__self_attn__q_proj__weight": np.zeros((16, 24), np.float32)},
            r": tensor 'model.layers.1.self_attn.q_proj.weight' is \[16, 24\], "
            r"but the model's config makes it \[24, 16\]: give tensors and config",
        ),
        (
            {"lm_head__weight": np.zeros((23, 16), np.int8)},
            r"'lm_head.weight' is of dtype I8; only F32, F16, BF16",
        ),
    ],
)
def test_mismatched_tensors_are_named(changes, message, tmp_path):
    write_folder(tmp_path, tiny_models.llama_config())
    changed_tensors(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_buffers_of_old_files_and_bare_trunks_are_read(tmp_path):
    _, params = write_folder(tmp_path, MODELS["gpt2"])
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare |= {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), np.int8),
        "h.1.attn.masked_bias": np.ones((), np.float32),
    }
    save_file(bare | {"lm_head.weight": bare["wte.weight"]}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path), params)


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "a\\b.safetensors",
        "a.bin",
        3,
    ],
)
def test_shards_elsewhere_are_refused(name, tmp_path):
    write_folder(tmp_path, tiny_models.llama_config())
    (tmp_path / hf_folder.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(
        ValueError, match=r"shards must be \.safetensors files of the same folder$"
    ):
        hf_folder.open_tensors(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"has neither model\.safetensors nor model\.safetensors\.index\.json",
    ):
        hf_folder.open_tensors(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no config\.json: give the folder of a model$"
    ):
        hf_folder.read_hf_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        hf_folder.read_hf_json(tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        hf_folder.open_tensors(tmp_path)
    write_folder(tmp_path, tiny_models.llama_config())
    (tmp_path / hf_folder.INDEX).write_text(
        json.dumps({"weight_map": {"x": "model.safetensors"}})
    )
    with pytest.raises(
        ValueError, match=r"says that model\.safetensors holds 'x', but it does not$"
    ):
        hf_folder.open_tensors(tmp_path)
    (tmp_path / hf_folder.INDEX).write_text(
        json.dumps({"weight_map": {"x": "b.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"lacks b\.safetensors, which .* names"):
        hf_folder.open_tensors(tmp_path)


def test_an_unknown_source_is_refused(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError,
        match=r"^no folder 'a/b', and the Hugging Face hub gives none \(no network\): dow",
    ):
        hf_folder.locate_model("a/b")
    for path in ("./nowhere", "a/b/c", "x.gguf"):
        with pytest.raises(ConfigError, match="no folder or file"):
            hf_folder.locate_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type = 'mamba' is not supported, only gpt2, gpt_neox, llama",
        ),
        (
            {"hidden_act": "relu"},
            "hidden_act = 'relu' of a llama model is not supported, only 'silu'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type = 'yarn' of a llama model is not supported",
        ),
        (
            {"attention_bias": True},
            "mlp_bias|attention_bias = True of a llama model is not supported",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config = {'bits': 4} of a llama model is not supported",
        ),
        ({"model_type": "qwen2"}, "head_dim = 6 of a qwen2 model is not supported"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            "use_bidirectional_attention = True",
        ),
        ({"model_type": "gpt2"}, "config.json of a gpt2 model lacks 'n_embd'"),
    ],
)
def test_unsupported_configs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_config({**LLAMA, **changes})


def test_old_and_new_spellings_of_rotary_positions():
    old = {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 2.0}}
    (_, one), (_, two) = (read_config({**LLAMA, **spelling}) for spelling in (old, new))
    assert one == two and one.rotary_base == 50.0
    assert one.rotary_scaling is not None and (
        one.rotary_scaling.kind,
        one.rotary_scaling.factor,
    ) == ("linear", 2.0)


def test_export_uses_the_first_family_that_can_express_a_model():
    def model(size: str) -> ModelConfig:
        return construct(ModelConfig, sizes.model(size).to_dict())

    assert {
        size: write_config(model(size))[0]
        for size in ("tiny", "micro", "small", "125m", "175b")
    } == {
        "tiny": "gpt_neox",
        "micro": "gpt_neox",
        "small": "gpt2",
        "125m": "gpt2",
        "175b": "gpt2",
    }
    raw = write_config(model("micro"))[1]
    assert (
        raw["use_parallel_residual"],
        raw["hidden_act"],
        raw["tie_word_embeddings"],
    ) == (False, "gelu_new", True)
    assert {family: write_config(config)[0] for family, config in MODELS.items()} == {
        name: name for name in MODELS
    }
    scaling = RotaryScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_length=32,
    )
    assert (
        read_config(write_config(tiny_models.llama_config(rotary_scaling=scaling))[1])[
            1
        ].rotary_scaling
        == scaling
    )


def test_a_model_that_no_family_can_express_is_refused():
    with pytest.raises(ValueError, match=r"nearest is \w+, but .*model\.\w+ = "):
        write_config(tiny_models.qwen_config())  # biases like Qwen2's, norms like Qwen3's
    with pytest.raises(
        ValueError,
        match=r"nearest is llama, but model.norm = 'layernorm' \(it has 'rmsnorm'\)",
    ):
        write_config(tiny_models.llama_config(norm="layernorm"))
