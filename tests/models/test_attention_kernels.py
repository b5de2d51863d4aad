"""Attention kernels: which one a run selects and why, each kernel against reference
attention, and the programs lowered for accelerators.

Nothing here runs on an accelerator. cuDNN's call is replaced by XLA's implementation of the
same function, splash is interpreted, and programs are lowered for CUDA and TPU devices that
are not present.
"""

import dataclasses
import importlib
import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tests.support import stages, tiny_models

from instructax.config import ConfigError
from instructax.experiment import dry_run, run_stage
from instructax.models import attention_kernels, transformer
from instructax.models.attention import attention_mask
from instructax.models.init import init_params
from instructax.models.kv_cache import init_cache
from instructax.models.transformer import Transformer
from instructax.stages import build_config, evaluate, load_stage, reward_model
from instructax.training import attention as selection

pytest_plugins = ("tests.support.pipeline_fixture",)

# Kernel selection.

HERE: dict[str, dict[str, Any]] = {
    "cudnn": {"platform": "cuda", "version": 9.0},
    "splash": {"platform": "tpu", "version": 5.0},
}


def conditions(kernel: str, **changes: Any) -> attention_kernels.KernelConditions:
    """Conditions under which `kernel` is supported, with `changes`."""
    values = {"dtype": "bf16", "head_dims": [128], "lengths": [2048]}
    neither = dict.fromkeys(
        ("softcap", "sliding_window", "shared_prefixes", "vmapped_runs"), False
    )
    return attention_kernels.KernelConditions(
        **{**values, **neither, **HERE[kernel], **changes}
    )


WIDTHS = {"cudnn": "a multiple of 8 up to 128", "splash": "a multiple of 128 up to 256"}
OBSTACLES = [
    ("cudnn", {"platform": "cpu", "version": 0.0}, "platform cpu, allowed is cuda"),
    ("cudnn", {"platform": "rocm", "version": 0.0}, "platform rocm, allowed is cuda"),
    ("cudnn", {"platform": "tpu", "version": 6.0}, "platform tpu, allowed is cuda"),
    ("splash", {"platform": "cuda"}, "platform cuda, allowed is tpu"),
    ("cudnn", {"version": 7.5}, "cuda 7.5, allowed is 8 or newer"),
    ("splash", {"version": 3.0}, "tpu 3, allowed is 4 or newer"),
    (
        "splash",
        {"shared_prefixes": True},
        "responses share a prompt in one row, allowed is one sequence per segment",
    ),
]
for name, width in (("cudnn", 20), ("cudnn", 136), ("splash", 64), ("splash", 384)):
    OBSTACLES.append(
        (
            name,
            {"head_dims": [128, width]},
            f"head_dim = {width}, allowed is {WIDTHS[name]}",
        )
    )
for name in HERE:
    OBSTACLES += [
        (
            name,
            {"dtype": "float32"},
            "config.compute.dtype = 'float32', allowed is 'bf16_matmul' or 'bf16'",
        ),
        (
            name,
            {"lengths": [2048, 1088]},
            "rows of 1088 tokens, allowed is a multiple of 128",
        ),
        (name, {"lengths": []}, "only samplers run, and they have a cache"),
        (name, {"vmapped_runs": True}, "several runs in one program, allowed is one"),
        (name, {"softcap": True}, "model.attention_softcap is set, allowed is 0"),
    ]
OBSTACLES.append(
    ("splash", {"sliding_window": True}, "model.sliding_window is set, allowed is 0")
)


@pytest.mark.parametrize(
    ("kernel", "changes", "why"), OBSTACLES, ids=[f"{k}-{w}" for k, _, w in OBSTACLES]
)
def test_unsupported_kernels_are_an_error_by_name_and_skipped_by_auto(kernel, changes, why):
    given = conditions(kernel, **changes)
    with pytest.raises(ConfigError) as error:
        attention_kernels.select_kernel(kernel, given)
    assert str(error.value) == (
        f"config.compute.attention = '{kernel}' cannot run: {why}; change that, or give "
        "'jax' or 'auto'"
    )
    assert attention_kernels.select_kernel("jax", given) == ("jax", "as requested")
    if given.platform == HERE[kernel]["platform"]:
        assert attention_kernels.select_kernel("auto", given) == (
            "jax",
            f"auto: no {kernel}: {why}",
        )


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("cudnn", {}),
        (
            "cudnn",
            {
                "dtype": "bf16_matmul",
                "head_dims": [64, 80],
                "lengths": [2048, 10240],
                "shared_prefixes": True,
            },
        ),
        ("cudnn", {"version": 8.0}),
        ("splash", {}),
        (
            "splash",
            {"dtype": "bf16_matmul", "head_dims": [256], "lengths": [128], "version": 4.0},
        ),
    ],
)
def test_supported_kernels_are_selected(kernel, changes):
    given = conditions(kernel, **changes)
    assert attention_kernels.select_kernel(kernel, given) == (kernel, "as requested")
    assert attention_kernels.select_kernel("auto", given) == (
        kernel,
        f"auto: {given.platform}",
    )


def test_other_platforms_use_jax():
    for platform in ("cpu", "rocm"):
        given = conditions("cudnn", platform=platform, version=0.0)
        assert attention_kernels.select_kernel("auto", given) == (
            "jax",
            f"auto: {platform} has no other",
        )


@pytest.mark.parametrize(
    ("device", "place"),
    [
        ({"platform": "cpu"}, ("cpu", 0.0)),
        (
            {
                "platform": "gpu",
                "compute_capability": "10.3",
                "version": "PJRT C API\ncuda 13000",
            },
            ("cuda", 10.3),
        ),
        (
            {
                "platform": "gpu",
                "compute_capability": "gfx942",
                "version": "PJRT C API\nrocm 60300",
            },
            ("rocm", 0.0),
        ),
        ({"platform": "tpu", "device_kind": "TPU v5 lite"}, ("tpu", 5.0)),
        ({"platform": "tpu", "device_kind": "TPU7x"}, ("tpu", 7.0)),
    ],
)
def test_device_platform_and_version(device, place):
    client = SimpleNamespace(platform_version=device.pop("version", ""))
    assert (
        attention_kernels.device_platform(SimpleNamespace(**device, client=client)) == place
    )


def config_of(name: str, arg: str, **changes: Any) -> Any:
    values = importlib.import_module(f"configs.{name}").get_config(arg)
    values.update_from_flattened_dict(changes)
    return build_config(values.to_dict())


@pytest.mark.parametrize(
    ("name", "arg", "on_cuda", "on_tpu"),
    [
        ("sft", "1.3b", "cudnn (auto: cuda)", "splash (auto: tpu)"),
        (
            "sft",
            "125m",
            "cudnn (auto: cuda)",
            f"jax (auto: no splash: head_dim = 64, allowed is {WIDTHS['splash']})",
        ),
        ("ppo", "175b", "cudnn (auto: cuda)", "splash (auto: tpu)"),
        (
            "reward_model",
            "6b",
            "cudnn (auto: cuda)",
            f"jax (auto: no splash: {OBSTACLES[6][2]})",
        ),
        (
            "evaluate",
            "1.3b",
            "cudnn (auto: cuda)",
            f"jax (auto: no splash: {OBSTACLES[6][2]})",
        ),
        ("pretrain", "micro", *(f"jax (auto: no {k}: {OBSTACLES[11][2]})" for k in HERE)),
        ("collect", "micro", *(f"jax (auto: no {k}: {OBSTACLES[13][2]})" for k in HERE)),
    ],
)
def test_kernels_selected_by_the_configs(name, arg, on_cuda, on_tpu, monkeypatch):
    for place, wanted in ((HERE["cudnn"], on_cuda), (HERE["splash"], on_tpu)):
        monkeypatch.setattr(
            selection, "device_platform", lambda _, place=place: tuple(place.values())
        )
        config = config_of(name, arg)
        rows = load_stage(name).row_lengths(config)
        config, said = selection.select_attention_kernel(config, rows)
        assert (config.compute.attention, said) == (wanted.split()[0], wanted)


def test_benchmarks_of_samplers_and_vmapped_runs_use_jax(monkeypatch):
    monkeypatch.setattr(selection, "device_platform", lambda _: ("cuda", 9.0))
    config = config_of("ppo", "1.3b")
    rows = load_stage("ppo").row_lengths(config)
    for lengths, side_by_side, why in (
        (selection.NO_ROWS, False, "only samplers run"),
        (rows, True, "several runs in one program"),
    ):
        settled, said = selection.select_attention_kernel(
            config, lengths, side_by_side=side_by_side
        )
        assert settled.compute.attention == "jax" and why in said
        requested = dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, attention="cudnn")
        )
        with pytest.raises(ConfigError, match=why):
            selection.select_attention_kernel(requested, lengths, side_by_side=side_by_side)


# Row lengths of the stages.

STAGES = ("sft", "reward", "ppo", "evaluate")
SLOW_STAGES = ("pretrain", "ppo-ptx", "collect", "tasks")


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "name", [*STAGES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_STAGES)]
)
def test_rows_have_the_lengths_that_the_kernel_was_selected_for(
    name, chain, tmp_path, monkeypatch, capsys
):
    """Shared prefixes occur only where stated. The kernel is printed once, at the start."""
    seen: set[int] = set()
    branched = [False]
    packed_attention = transformer.packed_attention

    def watched(kernel: str, segments: jax.Array, mesh: Any) -> Any:
        if segments.shape != (1, 1):  # parameters are initialized with one token
            seen.add(segments.shape[1])
            jax.debug.callback(
                lambda branches: branched.append(bool(branches)), jnp.any(segments < 0)
            )
        return packed_attention(kernel, segments, mesh)

    monkeypatch.setattr(transformer, "packed_attention", watched)
    # Programs that an equal run has traced would not call `watched`.
    jax.clear_caches()
    for stage_module in (
        reward_model,
        evaluate,
    ):  # rows have the maximal width, not that of the longest comparison
        monkeypatch.setattr(stage_module, "packed_width", lambda _, most, __: most)
    if name == "tasks":
        policies = (("SFT", str(chain / "sft")),)
        paths = {
            "world": str(chain / "world"),
            "tokenizer": str(chain / "world" / "tokenizer.json"),
        }
        config = config_of("public_tasks", "tiny", policies=policies, **paths)
        given = dataclasses.asdict(config)
    else:
        given = stages.config_of(
            chain,
            name,
            {"steps": 1, "epochs": 0.0} if name in ("pretrain", "sft", "reward") else {},
        )
        config = build_config(given)
    run_stage(given, tmp_path / "run")
    jax.effects_barrier()
    lengths, branches = load_stage(config.stage).row_lengths(config)
    assert seen == set(lengths)
    assert any(branched) == branches
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("attention:")
    ]
    assert lines == ["attention: jax (auto: cpu has no other)"]


@pytest.mark.usefixtures("one_device")
def test_a_run_with_an_unavailable_kernel_is_refused(chain, tmp_path):
    for kernel, platform in (("cudnn", "cuda"), ("splash", "tpu")):
        given = stages.config_of(chain, "sft", {"compute.attention": kernel})
        with pytest.raises(
            ConfigError,
            match=rf"'{kernel}' cannot run: platform cpu, allowed is {platform};",
        ):
            run_stage(given, tmp_path / kernel)
        # The dry run may be on another machine than the run.
        assert "held throughout" in dry_run(given)


# Each kernel against reference attention.

# Fast compilation, for programs that run only once.
QUICK = {"xla_backend_optimization_level": "0"}
LENGTH = 256
PACKED = np.repeat([3, 1, 4, 0], [100, 60, 80, 16])  # three documents, and right padding
LEFT = np.repeat([0, 1], [90, 166])
BRANCHES = np.repeat([0, -1, 1, 2, 3, 0], [10, 70, 50, 60, 40, 26])
ROWS = {"separate": np.stack([PACKED, LEFT]), "branches": np.stack([PACKED, BRANCHES])}


@pytest.fixture
def stand_ins(monkeypatch):
    """XLA's attention instead of cuDNN, and interpreted splash. A row has two splash blocks
    of queries and of keys."""
    monkeypatch.setattr(
        attention_kernels,
        "attend_with_cudnn",
        partial(attention_kernels.attend_with_cudnn, implementation="xla"),
    )
    monkeypatch.setattr(
        attention_kernels,
        "attend_with_splash",
        partial(attention_kernels.attend_with_splash, interpret=True),
    )
    monkeypatch.setattr(attention_kernels, "MAX_BLOCK", LENGTH // 2)


def inputs(heads: int, num_kv_heads: int) -> list[jax.Array]:
    rng = np.random.default_rng(heads)
    shapes = [(2, count, LENGTH, 8) for count in (heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def output_and_gradients(
    kernel: str,
    rows: np.ndarray,
    arrays: list[jax.Array],
    matmul_dtype: str = "float32",
    mesh: Any = None,
) -> Any:
    """Outputs at the real queries, and the gradients of their weighted sum."""
    attend, mask = attention_kernels.packed_attention(
        kernel, jnp.asarray(rows, jnp.int32), mesh
    )
    real = jnp.asarray(rows != 0)[:, None, :, None]
    weights = jax.random.normal(jax.random.key(1), arrays[0].shape) * real

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = attend(*arrays, mask, matmul_dtype)
        return jnp.sum(weights * mixed.astype(jnp.float32)), jnp.where(real, mixed, 0)

    differentiated = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, mixed), gradients = jax.jit(differentiated, compiler_options=QUICK)(*arrays)
    return mixed, gradients


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("kernel", "rows", "num_kv_heads"),
    [
        ("cudnn", "separate", 4),
        ("cudnn", "branches", 2),
        ("splash", "separate", 4),
        ("splash", "separate", 2),
    ],
)
def test_kernels_match_the_reference_attention(kernel, rows, num_kv_heads):
    got, wanted = (
        output_and_gradients(name, ROWS[rows], inputs(4, num_kv_heads))
        for name in (kernel, "jax")
    )
    stages.assert_trees_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", HERE)
def test_kernels_on_eight_devices(kernel):
    arrays = [jnp.concatenate([x, x / 2]) for x in inputs(4, 2)]
    rows = np.concatenate([ROWS["separate"]] * 2)
    got = output_and_gradients(kernel, rows, arrays, mesh=stages.mesh_of(2, 2, 2))
    stages.assert_trees_close(
        got, output_and_gradients("jax", rows, arrays), rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", HERE)
def test_kernels_round_operands_to_bfloat16(kernel, dtype):
    """8 bits of mantissa give 0.4% error per operation. Activations keep their dtype."""
    exact = output_and_gradients("jax", ROWS["separate"], inputs(4, 2))
    rounded = [array.astype(dtype) for array in inputs(4, 2)]
    got = output_and_gradients(kernel, ROWS["separate"], rounded, "bfloat16")
    for ours, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == dtype
        error = jnp.sqrt(jnp.mean((ours.astype(jnp.float32) - wanted) ** 2)) / jnp.std(
            wanted
        )
        assert 1e-4 < error < 0.05


def test_splash_cannot_express_shared_prefixes():
    """Splash lets a query attend to all keys with the same segment id, so the second
    response to a prompt would attend to the first."""
    sees = np.asarray(attention_mask(jnp.array([[-1, 1, 2]]), jnp.array([[-1, 1, 2]]), 0))[
        0
    ]
    causal = np.tri(3, dtype=bool)
    expressible = []
    # Every assignment of segment ids to the three queries and the three keys.
    for queries in itertools.product(range(3), repeat=3):
        for keys in itertools.product(range(3), repeat=3):
            same = np.array(queries)[:, None] == np.array(keys)[None, :]
            expressible.append((same & causal == sees).all())
    assert len(expressible) == 3**6 and not any(expressible)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", HERE)
def test_networks_with_a_kernel_match_networks_without(kernel):
    """With scan, remat, rotary positions, grouped queries, and devices that share rows and
    heads."""
    mesh = stages.mesh_of(1, 2, 2)
    rng = np.random.default_rng(0)
    config = tiny_models.llama_config()
    params = tiny_models.random_params(Transformer(config, tiny_models.compute(), "tokens"))
    segments = jnp.asarray(ROWS["separate"][:, ::2], jnp.int32)
    tokens = jnp.asarray(
        rng.integers(tiny_models.VOCAB_SIZE, size=segments.shape), jnp.int32
    )
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    real = (segments != 0)[:, :, None]

    def gradients(name: str) -> Any:
        model = Transformer(
            config, tiny_models.compute(attention=name, remat="full"), "tokens", mesh
        )

        def total(params: Any) -> jax.Array:
            hidden: Any = model.apply({"params": params}, tokens, segments, positions)[0]
            return jnp.mean(jnp.sin(hidden) * real)

        return jax.jit(jax.value_and_grad(total), compiler_options=QUICK)(params)

    stages.assert_trees_close(gradients(kernel), gradients("jax"), rtol=1e-3, atol=1e-6)


# Lowered programs.

CALLS = {
    "cudnn": ("cuda", "__cudnn$fmhaScaleBiasSoftmax"),
    "splash": ("tpu", "tpu_custom_call"),
}


def lowered(function: Any, platform: str, *arrays: Any) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def model_of(attention: str, dtype: str) -> tuple[Transformer, Any]:
    config = tiny_models.gpt_config(
        num_heads=2, num_kv_heads=2, head_dim=128, max_length=LENGTH
    )
    compute = tiny_models.compute(attention=attention, dtype=dtype, decoding_dtype=dtype)
    model = Transformer(config, compute, "tokens", stages.mesh_of(1, 2, 2))
    return model, jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


@pytest.fixture
def cudnn_is_here(monkeypatch):
    """Pretends that cuDNN is installed: JAX asks for its version first, and there is none
    without a GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)


@pytest.mark.usefixtures("cudnn_is_here")
@pytest.mark.parametrize("dtype", ["bf16_matmul", "bf16"])
@pytest.mark.parametrize("kernel", CALLS)
def test_the_selected_kernel_is_in_the_program_of_its_platform(kernel, dtype):
    platform, call = CALLS[kernel]
    cells = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    texts = {}
    for attention in (kernel, "jax"):
        model, params = model_of(attention, dtype)

        def gradients(
            params: Any, tokens: Any, segments: Any, positions: Any, model=model
        ) -> Any:
            def total(params: Any) -> jax.Array:
                return jnp.sum(
                    model.apply({"params": params}, tokens, segments, positions)[0].astype(
                        jnp.float32
                    )
                )

            return jax.grad(total)(params)

        texts[attention] = lowered(gradients, platform, params, cells, cells, cells)
    # All layers share one forward function and one backward function; splash's backward has
    # two calls.
    assert texts[kernel].count(f"@{call}(") == {"cudnn": 1, "splash": 3}[kernel]
    assert texts[kernel].count(f"@{call}Backward(") == {"cudnn": 1, "splash": 0}[kernel]
    assert "cudnn" not in texts["jax"] and "tpu_custom_call" not in texts["jax"]
    products = f"x128x{LENGTH}xf32>"  # a block of queries and all keys, per head
    assert products in texts["jax"] and products not in texts[kernel]


@pytest.mark.usefixtures("cudnn_is_here")
@pytest.mark.parametrize("kernel", CALLS)
def test_calls_with_a_cache_use_no_kernel(kernel):
    platform, call = CALLS[kernel]
    model, params = model_of(kernel, "bf16")
    cells = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(model.config, model.compute, 2, LENGTH))

    def prefill(params: Any, cache: Any, *columns: Any) -> Any:
        return model.apply({"params": params}, *columns, cache=cache)

    assert call not in lowered(prefill, platform, params, cache, cells, cells, cells)


def test_a_missing_cudnn_is_an_error_without_fallback():
    model, params = model_of("cudnn", "bf16")
    cells = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.eval_shape(
            lambda params, *columns: model.apply({"params": params}, *columns),
            params,
            cells,
            cells,
            cells,
        )


def test_an_unresolved_auto_kernel_is_refused():
    model, params = model_of("auto", "float32")
    cells = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(
        ValueError,
        match=r"^compute\.attention = 'auto' must be resolved by select_kernel before a ",
    ):
        jax.eval_shape(
            lambda params: model.apply({"params": params}, cells, cells, cells), params
        )
