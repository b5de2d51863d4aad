"""The network against a plain NumPy one, and its invariants: what a token may attend to,
and what must not change an output."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import sizes
from tests.support import reference_model, stages
from tests.support.tiny_models import (
    VOCAB_SIZE,
    compute,
    gemma_config,
    gpt_config,
    llama_config,
    neox_config,
    qwen_config,
    random_params,
)

from instructax.config import construct
from instructax.models.attention import (
    MAX_QUERY_BLOCKS,
    MIN_QUERY_BLOCK,
    attend,
    attend_causally,
    attention_mask,
    positions_from_mask,
)
from instructax.models.config import ComputeConfig, ModelConfig, RotaryScaling
from instructax.models.init import init_params
from instructax.models.kv_cache import init_cache
from instructax.models.layers import Dropout, apply_dropout
from instructax.models.transformer import (
    SCAN_UNROLL,
    Transformer,
    cast_matrices,
    head_kernel,
    parameter_count,
    scan_blocks,
)
from instructax.types import Params

COLUMNS = 12
# Fast compilation, for programs that run only once.
QUICK = {"xla_backend_optimization_level": "0"}
FAMILIES = {"gpt": gpt_config(), "llama": llama_config()}
OTHERS = {
    "neox": neox_config(),
    "qwen": qwen_config(),
    "gemma": gemma_config(),
    "windows everywhere": gpt_config(sliding_window=4, window_layers=(0, 1)),
    "a window in the last layer": llama_config(
        sliding_window=5,
        window_layers=(1,),
        rotary_scaling=RotaryScaling(
            kind="linear",
            factor=2.5,
            low_freq_factor=0.0,
            high_freq_factor=1.0,
            original_max_length=1,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Network:
    config: ModelConfig
    params: Params
    # (tokens, segments, positions i32[2, COLUMNS]) → f32[2, COLUMNS, D].
    forward: Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> Network:
    config = {**FAMILIES, **OTHERS}[request.param]
    model = Transformer(config, compute(), "tokens")
    params = random_params(model)
    forward = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs)[0])
    return Network(config, params, lambda *inputs: np.asarray(forward(*inputs)))


def texts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(VOCAB_SIZE, size=length).tolist() for length in lengths]


def rows(
    *documents_of_rows: list[tuple[int, list[int]]], fill: int | None = None
) -> tuple[jax.Array, ...]:
    """tokens, segments and positions of rows of (first column, document). Gaps hold `fill`,
    or random ids."""
    tokens = np.random.default_rng(8).integers(
        VOCAB_SIZE, size=(len(documents_of_rows), COLUMNS)
    )
    tokens = tokens if fill is None else np.full_like(tokens, fill)
    segments = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    for row, documents in enumerate(documents_of_rows):
        for number, (first, text) in enumerate(documents, start=1):
            here = (row, slice(first, first + len(text)))
            tokens[here], segments[here], positions[here] = (
                text,
                number,
                np.arange(len(text)),
            )
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, segments, positions))


@pytest.mark.parametrize("head", ["tokens", "scalar"])
@pytest.mark.parametrize(
    "config",
    [
        *FAMILIES.values(),
        *OTHERS.values(),
        gpt_config(num_kv_heads=1, tied_embeddings=False, norm="rmsnorm", biases=False),
        llama_config(
            num_layers=3,
            num_kv_heads=4,
            biases=True,
            norm="layernorm",
            tied_embeddings=True,
        ),
    ],
    ids=[*FAMILIES, *OTHERS, "gpt-mixed", "llama-mixed"],
)
def test_forward_equals_the_reference(config, head):
    model = Transformer(config, compute(), head)
    params = random_params(model, seed=1)
    (text,) = texts(COLUMNS)
    outputs, _ = jax.jit(model.apply)({"params": params}, *rows([(0, text)]))
    plain = reference_model.scalars if head == "scalar" else reference_model.hidden_states
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(
        outputs[0], plain(config, params, text), rtol=1e-5, atol=1e-5
    )


# Numbers of parameters of GPT-3's shapes, V = 50257 and 2048 positions, worked out by hand:
# (V + 2048) D + layers (4 D A + 3 A + 8 D² + 10 D) + 2 D with A = heads · head width.
PARAMETERS = {
    "125m": 125_226_240,
    "350m": 355_871_744,
    "760m": 760_300_032,
    "1.3b": 1_315_723_264,
    "2.7b": 2_651_553_280,
    "6b": 6_658_404_352,
    "175b": 174_604_259_328,
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_of_the_papers_sizes(size):
    config = construct(ModelConfig, sizes.model(size).to_dict())
    model = Transformer(
        config, construct(ComputeConfig, sizes.compute(size).to_dict()), "tokens"
    )
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    layers, width, heads, head_dim = sizes.SHAPES[size]
    inner = heads * head_dim
    assert parameter_count(shapes) == PARAMETERS[size]
    assert PARAMETERS[size] == (50257 + 2048) * width + 2 * width + layers * (
        4 * width * inner + 3 * inner + 8 * width * width + 10 * width
    )
    assert shapes["blocks"]["attention"]["query"]["kernel"].shape == (
        layers,
        width,
        heads,
        head_dim,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_outputs_depend_only_on_earlier_tokens_of_the_segment(network):
    model = Transformer(network.config, compute(), "tokens")
    tokens, segments, positions = rows([(1, [3, 1, 4, 5]), (5, [9, 2, 6, 8])])
    # Distinct ids, so that the gradient of an id is that of its column.
    tokens = tokens.at[0].set(jnp.arange(COLUMNS))
    directions = jax.random.normal(jax.random.key(0), (network.config.embed_dim,))

    @jax.jit
    @jax.jacrev
    def jacobian(embedding):
        params = {**network.params, "embedding": embedding}
        return (
            model.apply({"params": params}, tokens, segments, positions)[0][0] @ directions
        )

    sizes_of_gradients = np.abs(jacobian(network.params["embedding"])[:, :COLUMNS]).max(
        axis=-1
    )
    segment = np.asarray(segments[0])
    seen = (segment[:, None] == segment[None, :]) & np.tri(COLUMNS, dtype=bool)
    real = segment > 0
    assert (sizes_of_gradients[real][:, ~real] == 0).all()
    assert ((sizes_of_gradients > 0) == seen)[real].all()
    assert sizes_of_gradients[real][:, real][seen[real][:, real]].min() > 1e-5


@pytest.mark.parametrize("network", [*FAMILIES, "gemma"], indirect=True)
def test_packed_rows_equal_separate_rows(network):
    first, second, third = texts(5, 4, 3)
    packed = network.forward(*rows([(0, first), (5, second), (9, third)], []))
    alone = network.forward(*rows([(0, first)], [(0, second)]))
    last = network.forward(*rows([(0, third)], []))
    np.testing.assert_allclose(packed[0, :5], alone[0, :5], atol=1e-5)
    np.testing.assert_allclose(packed[0, 5:9], alone[1, :4], atol=1e-5)
    np.testing.assert_allclose(packed[0, 9:], last[0, :3], atol=1e-5)


def test_padding_has_no_effect(network):
    (text,) = texts(7)
    outputs = network.forward(*rows([(0, text)], [(5, text)]))
    np.testing.assert_allclose(outputs[0, :7], outputs[1, 5:], atol=1e-5)
    for fill in (
        0,
        text[3],
        text[-1],
    ):  # includes pad == eos, for every id of the text as eos
        filled = network.forward(*rows([(0, text)], [(5, text)], fill=fill))
        np.testing.assert_array_equal(filled[0, :7], outputs[0, :7])
        np.testing.assert_array_equal(filled[1, 5:], outputs[1, 5:])
    tokens, segments, positions = rows([(0, text)], [(5, text)])
    filled = network.forward(tokens, segments, jnp.where(segments == 0, 17, positions))
    np.testing.assert_array_equal(filled[0, :7], outputs[0, :7])
    np.testing.assert_array_equal(filled[1, 5:], outputs[1, 5:])


def test_positions_count_real_tokens():
    mask = jnp.array(
        [[False, False, True, True, False], [True, True, True, False, True], [False] * 5]
    )
    assert positions_from_mask(mask).tolist() == [
        [0, 0, 0, 1, 1],
        [0, 1, 2, 2, 3],
        [0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize("network", [*FAMILIES, "gemma"], indirect=True)
def test_cached_calls_equal_uncached_ones(network):
    model = Transformer(network.config, compute(), "tokens")
    append = jax.jit(
        lambda cache, *columns: model.apply(
            {"params": network.params}, *columns, cache=cache
        )
    )
    # The second row's first seven columns are padding: a whole chunk without a real token.
    inputs = rows([(1, texts(11)[0])], [(8, texts(4)[0])])
    expected = network.forward(*inputs)
    real = np.asarray(inputs[1]) > 0
    for pieces in ([COLUMNS], [7, 4, 1], [1] * COLUMNS):
        cache = init_cache(network.config, compute(), 2, COLUMNS)
        outputs = []
        for first, length in zip(np.cumsum([0, *pieces]), pieces, strict=False):
            hidden, cache = append(cache, *(x[:, first : first + length] for x in inputs))
            outputs.append(hidden)
        joined = np.concatenate(outputs, axis=1)
        assert int(cache.filled) == COLUMNS
        assert np.isfinite(joined).all()
        np.testing.assert_allclose(joined[real], expected[real], atol=1e-5)


def text_gradients(remat: Any, config: ModelConfig) -> Callable[[Params], Params]:
    """Gradient of a sum of hidden states, with dropout."""
    model = Transformer(config, compute(remat=remat), "tokens")
    inputs = rows([(0, texts(COLUMNS)[0])])
    dropout = Dropout(rate=jnp.float32(0.3), keys=jax.random.split(jax.random.key(5), 1))
    return jax.grad(
        lambda params: jnp.sum(
            jnp.sin(model.apply({"params": params}, *inputs, dropout=dropout)[0])
        )
    )


def test_remat_does_not_change_gradients():
    config = gpt_config()
    params = random_params(Transformer(config, compute(), "tokens"))
    none, dots, full = (
        jax.jit(text_gradients(remat, config), compiler_options=QUICK)(params)
        for remat in ("none", "dots", "full")
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(none)) > 0.1
    for other in (dots, full):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), none, other
        )


def test_more_layers_than_one_scan_step_unrolls():
    config = dataclasses.replace(FAMILIES["gpt"], num_layers=SCAN_UNROLL + 1)
    params = random_params(Transformer(config, compute(), "tokens"))
    several, one = (
        jax.jit(text_gradients(remat, config), compiler_options=QUICK)(params)
        for remat in ("none", "full")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), several, one
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_remat_recomputes_only_what_its_policy_allows(family):
    """The policy "none" recomputes no matmul, "dots" those of two activations (attention
    scores, weighted sums), "full" all matmuls of a layer."""
    config = FAMILIES[family]
    params = random_params(Transformer(config, compute(), "tokens"))
    none, dots, full = (
        str(jax.make_jaxpr(text_gradients(remat, config))(params)).count("dot_general")
        for remat in ("none", "dots", "full")
    )
    assert dots - none == 2
    # Three projections, two matmuls of activations, out, up (and gate).
    assert full - none == {"gpt": 7, "llama": 8}[family]


@pytest.mark.parametrize("dtype", ["bf16_matmul", "bf16"])
@pytest.mark.parametrize("head", ["tokens", "scalar"])
def test_bfloat16_outputs_are_close_to_float32(network, head, dtype):
    inputs = rows([(0, texts(COLUMNS)[0])])
    exact = Transformer(network.config, compute(), head)
    params = random_params(exact)
    rounded = Transformer(network.config, compute(dtype=dtype), head)
    expected, _ = jax.jit(exact.apply)({"params": params}, *inputs)
    outputs, _ = jax.jit(rounded.apply)({"params": params}, *inputs)
    assert outputs.dtype == (jnp.bfloat16 if head == "tokens" else jnp.float32)
    scale = float(jnp.std(expected))
    error = float(jnp.sqrt(jnp.mean((outputs.astype(jnp.float32) - expected) ** 2))) / scale
    assert 1e-4 < error < 0.05  # 8 bits of mantissa: 0.4% error per operation
    shapes = jax.eval_shape(lambda key: init_params(rounded, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bf16_matmul", "bf16"])
def test_cast_matrices_equals_the_networks_own_casts(network, dtype):
    """So a sampler may cast once. Only matmul operands are cast."""
    model = Transformer(network.config, compute(dtype=dtype), "tokens")
    inputs = rows([(0, texts(9)[0])], [(0, texts(12)[0])])
    cast = cast_matrices(network.params, model.compute)
    run = jax.jit(
        lambda params: (
            model.apply({"params": params}, *inputs)[0],
            head_kernel(network.config, params),
        )
    )
    (hidden, _), (wanted, kernel) = run(cast), run(network.params)
    np.testing.assert_array_equal(
        np.asarray(hidden, np.float32), np.asarray(wanted, np.float32)
    )
    head = head_kernel(network.config, cast)
    if dtype == "bf16_matmul":  # a tied head is the embedding, whose lookup is in float32
        head = head.astype(jnp.bfloat16)
    np.testing.assert_array_equal(head, kernel.astype(jnp.bfloat16))
    kept = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(cast)
        if leaf.dtype == jnp.float32
    }
    assert kept <= {"scale", "bias"} | (
        {"embedding", "positions"} if dtype == "bf16_matmul" else set()
    )


@pytest.mark.parametrize(
    "length",
    [
        MIN_QUERY_BLOCK,
        MIN_QUERY_BLOCK + 1,
        2 * MIN_QUERY_BLOCK,
        MAX_QUERY_BLOCKS * MIN_QUERY_BLOCK + 3,
    ],
)
def test_blocked_causal_attention_equals_attend(length):
    """Outputs and gradients, with grouped queries, for packed documents and for responses
    that share a prompt."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, heads, length, 2)), jnp.float32)
        for heads in (4, 2, 2)
    )
    segments = jnp.asarray(rng.choice([-1, 1, 2, 3, 0], size=(1, length)))
    mask = attention_mask(segments, segments, 0)
    weights = (
        jnp.asarray(rng.normal(size=query.shape), jnp.float32)
        * (segments != 0)[:, None, :, None]
    )

    def outputs(function):
        attended, pull = jax.vjp(
            lambda *inputs: function(*inputs, mask, "float32"), query, key, value
        )
        return attended * (segments != 0)[:, None, :, None], pull(weights)

    ours, wanted = (
        jax.jit(partial(outputs, function))() for function in (attend_causally, attend)
    )
    stages.assert_trees_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean_and_rate_zero_is_the_identity():
    x = jnp.ones((200, 500))
    dropped = apply_dropout(
        x, Dropout(rate=jnp.float32(0.2), keys=jax.random.split(jax.random.key(0), 200)), 0
    )
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1.25], rtol=1e-6)
    # With 10⁵ entries, the mean's standard deviation is √(0.2 / 0.8 / 10⁵) = 0.0016.
    assert abs(float(dropped.mean()) - 1.0) < 0.006
    assert (
        apply_dropout(
            x,
            Dropout(rate=jnp.float32(0.0), keys=jax.random.split(jax.random.key(0), 200)),
            0,
        )
        == x
    ).all()
    assert apply_dropout(x, None, 0) is x


def test_dropout_differs_by_layer_branch_and_key():
    """With zero kernels a branch adds its bias: 1 and 2 in layer 0, 4 and 8 in layer 1. The
    sum reveals the masks."""
    config = gpt_config(embed_dim=64)
    blocks = jax.tree.map(
        jnp.zeros_like, random_params(Transformer(config, compute(), "tokens"))["blocks"]
    )
    blocks["attention"]["out"]["bias"] = jnp.broadcast_to(
        jnp.array([[1.0], [4.0]]), (2, 64)
    )
    blocks["mlp"]["down"]["bias"] = jnp.broadcast_to(jnp.array([[2.0], [8.0]]), (2, 64))
    x = jnp.zeros((4, COLUMNS, 64))
    positions = jnp.zeros((4, COLUMNS), jnp.int32)
    mask = jnp.ones((4, COLUMNS, COLUMNS), bool)

    @jax.jit
    def sums(key):
        dropout = Dropout(rate=jnp.float32(0.5), keys=jax.random.split(key, 4))
        return (
            scan_blocks(
                blocks, x, mask, positions, config, compute(), dropout, attend_causally
            )
            / 2
        )

    masks = []
    for key in jax.random.split(jax.random.key(1), 2):
        codes = np.asarray(sums(key)).round().astype(int)
        assert codes.min() == 0
        assert codes.max() == 15
        masks += [codes >> bit & 1 for bit in range(4)]
    # With 3072 entries, the standard deviation of a fraction is 0.009.
    assert all(abs(kept.mean() - 0.5) < 0.04 for kept in masks)
    assert all(
        abs((a == b).mean() - 0.5) < 0.04 for a, b in itertools.combinations(masks, 2)
    )


def test_initial_standard_deviations():
    """Standard deviations of fresh parameters. The relative error of the estimates is 1 /
    √(2n), 2% or less."""
    config = gpt_config(embed_dim=1023, num_layers=8, mlp_dim=32, init_std=0.02)
    model = Transformer(config, compute(), "scalar")
    params = jax.jit(lambda key: init_params(model, key), compiler_options=QUICK)(
        jax.random.key(3)
    )
    # 1 / √(1023 + 1).
    np.testing.assert_allclose(params["scalar_head"]["kernel"].std(), 1 / 32, rtol=0.09)
    # 1 / √(3 + 1), not 1 / √3.
    narrow = Transformer(gpt_config(embed_dim=3), compute(), "scalar")
    fresh = jax.jit(
        jax.vmap(lambda key: init_params(narrow, key)["scalar_head"]["kernel"]),
        compiler_options=QUICK,
    )
    np.testing.assert_allclose(
        fresh(jax.random.split(jax.random.key(4), 2000)).std(), 1 / 2, rtol=0.05
    )
    np.testing.assert_allclose(params["embedding"].std(), 0.02, rtol=0.03)
    np.testing.assert_allclose(params["positions"].std(), 0.02, rtol=0.03)
    attention = params["blocks"]["attention"]
    mlp = params["blocks"]["mlp"]
    for kernel in (attention["query"], attention["key"], attention["value"], mlp["up"]):
        np.testing.assert_allclose(
            kernel["kernel"].std(axis=(1, *range(2, kernel["kernel"].ndim))),
            0.02,
            rtol=0.05,
        )
    for kernel in (attention["out"], mlp["down"]):  # √(2 · 8 layers) = 4
        np.testing.assert_allclose(kernel["kernel"].std(), 0.005, rtol=0.03)
    assert float(params["scalar_head"]["bias"]) == 0.0
    biases = [attention[name]["bias"] for name in ("query", "key", "value", "out")] + [
        mlp["up"]["bias"]
    ]
    assert all((bias == 0).all() for bias in biases)
    assert (params["final_norm"]["scale"] == 1).all()
    first, second = attention["query"]["kernel"][:2]
    assert (first != second).all()  # each layer has its own random numbers


def test_heads():
    for config, tied in ((gpt_config(), True), (llama_config(), False)):
        tokens = random_params(Transformer(config, compute(), "tokens"))
        assert ("head" in tokens) is not tied
        assert head_kernel(config, tokens) is (
            tokens["embedding"] if tied else tokens["head"]["kernel"]
        )
        assert head_kernel(config, tokens).shape == (config.vocab_size, config.embed_dim)
        scalar = random_params(Transformer(config, compute(), "scalar"))
        assert {name: leaf.shape for name, leaf in scalar["scalar_head"].items()} == {
            "kernel": (16,),
            "bias": (),
        }
        trunk = [
            {k: v for k, v in params.items() if k not in ("head", "scalar_head")}
            for params in (tokens, scalar)
        ]
        assert jax.tree.map(jnp.shape, trunk[0]) == jax.tree.map(jnp.shape, trunk[1])


def test_invalid_architectures_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^model.num_heads = 4 must be a multiple of model.num_kv_heads = 3$",
    ):
        gpt_config(num_kv_heads=3)
    with pytest.raises(
        ValueError, match=r"^model.head_dim = 5 must be even for rotary positions$"
    ):
        llama_config(head_dim=5)
    assert gpt_config(head_dim=5).head_dim == 5  # allowed with learned positions
    for wrong, message in (
        (
            {"head_dim": 6, "rotary_fraction": 0.5},
            r"^model.head_dim = 6 × model.rotary_fraction = 0.5 must be even",
        ),
        (
            {"rotary_fraction": 0.0},
            r"^model.rotary_fraction = 0.0 must be above 0 and at most 1$",
        ),
        (
            {"biases": True, "qkv_biases": True},
            r"^model.qkv_biases = True requires model.biases = False",
        ),
        (
            {"sliding_window": 4},
            r"^model.sliding_window = 4 and model.window_layers = \(\): set both, "
            r"or 0 and \(\) for no window$",
        ),
        (
            {"sliding_window": 4, "window_layers": (1, 0)},
            r"^model.window_layers = \(1, 0\) must be increasing indices from 0 to 1$",
        ),
        (
            {"sliding_window": 4, "window_layers": (2,)},
            r"^model.window_layers = \(2,\) must be increasing indices from 0 to 1$",
        ),
        ({"final_logit_softcap": -1.0}, r"^final_logit_softcap = -1.0 must be at least 0$"),
    ):
        with pytest.raises(ValueError, match=message):
            llama_config(**wrong)
    with pytest.raises(
        ValueError,
        match=r"^rotary_scaling.high_freq_factor = 1.0 must be above "
        r"rotary_scaling.low_freq_factor = 4",
    ):
        RotaryScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=4.0,
            high_freq_factor=1.0,
            original_max_length=8,
        )
