"""Packing sequences within a compiled program: every token is kept, the row bound holds,
and microbatches cover all rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.models.scoring import (
    comparison_sequences,
    last_token_columns,
    packed_logprobs,
    packed_outputs,
    rollout_sequences,
)
from instructax.models.sequence_packing import (
    PackedLayout,
    microbatch_shapes,
    pack,
    plan_packing,
    scan_packed_rows,
)
from instructax.models.transformer import Transformer
from instructax.types import LmBatch, Rollouts

MESH = stages.mesh_of()


def random_masks(lengths: list[int], columns: int, seed: int = 0) -> np.ndarray:
    """b[N, L] with `lengths[n]` True values in row n, at random columns."""
    rng = np.random.default_rng(seed)
    rows = [
        np.isin(np.arange(columns), rng.permutation(columns)[:length]) for length in lengths
    ]
    return np.array(rows)


def plan(
    real: np.ndarray, width: int, microbatch_rows: int, splits: int = 0, mesh=MESH
) -> PackedLayout:
    compute = tiny_models.compute(microbatch_rows=microbatch_rows, tail_splits=splits)
    return jax.device_get(
        jax.jit(partial(plan_packing, width=width, compute=compute, mesh=mesh))(
            jnp.asarray(real)
        )
    )


def test_first_fit_by_hand():
    layout = plan(random_masks([3, 6, 2, 5, 1], 6), 8, 2)
    # 6 | 5 | 3 after the 5 | 2 after the 6 | 1 in its own row
    wanted = [
        [2] * 6 + [3] * 2,
        [4] * 5 + [1] * 3,
        [5] + [0] * 7,
        [0] * 8,
        [0] * 8,
        [0] * 8,
    ]
    np.testing.assert_array_equal(layout.segment_ids[:, 0], wanted)
    assert layout.used_tokens == 4 * 8
    assert layout.microbatch_shapes == ((2, 8),)
    assert float(layout.padding_fraction()) == pytest.approx(1 - 17 / 32)
    halved = plan(random_masks([3, 6, 2, 5, 1], 6), 8, 2, splits=2)
    np.testing.assert_array_equal(halved.segment_ids[:, 0], wanted[:5])
    assert halved.microbatch_shapes == ((2, 8), (1, 8), (1, 4))
    assert halved.used_tokens == 2 * 8 + 4
    assert float(halved.padding_fraction()) == pytest.approx(1 - 17 / 20)


def test_microbatch_shapes():
    assert microbatch_shapes(4, 0, 8) == ((4, 8),)
    assert microbatch_shapes(4, 2, 8) == ((4, 8), (2, 8), (1, 8))
    assert microbatch_shapes(4, 4, 8) == ((4, 8), (2, 8), (1, 8), (1, 4), (1, 2))
    # A row of one token predicts nothing.
    assert microbatch_shapes(4, 9, 8) == microbatch_shapes(4, 4, 8)
    assert microbatch_shapes(3, 2, 9) == ((3, 9), (1, 9), (1, 4))
    assert microbatch_shapes(5, 1, 8) == ((5, 8), (1, 8))
    assert microbatch_shapes(12, 3, 8) == ((12, 8), (6, 8), (3, 8), (1, 8))


@pytest.mark.parametrize(
    "lengths",
    [[1] * 9, [6] * 9, [6, 1, 1, 4, 4, 2, 6, 5, 3], [0] * 9, [3, 3, 0, 0, 0, 0, 0, 0, 0]],
)
@pytest.mark.parametrize("width", [6, 7, 13, 20])
def test_rows_suffice_for_the_worst_case_of_first_fit(width, lengths):
    layout = plan(random_masks(lengths, 6), width, 2, splits=1)
    assert len(layout.segment_ids) == -(-9 // (width // 6))
    np.testing.assert_array_equal(
        np.bincount(layout.segment_ids.ravel(), minlength=10)[1:], lengths
    )


def test_scatter_keeps_the_order_and_gather_inverts_it():
    real = random_masks([4, 0, 7, 1, 7, 3], 7, seed=1)
    layout = plan(real, 10, 1)
    x = np.arange(1, 43).reshape(6, 7).astype(np.float32)
    rows = layout.scatter(jnp.asarray(x))
    np.testing.assert_array_equal(layout.gather(rows), np.where(real, x, 0))
    flat = np.asarray(rows).ravel()
    texts = layout.segment_ids.ravel()
    for text in range(6):
        np.testing.assert_array_equal(flat[texts == text + 1], x[text][real[text]])
        tokens_run = np.flatnonzero(texts == text + 1)
        assert len(tokens_run) == 0 or (
            (np.diff(tokens_run) == 1).all() and tokens_run[0] // 10 == tokens_run[-1] // 10
        )


@pytest.mark.parametrize("seed", range(8))
def test_no_token_is_lost_and_no_row_overflows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, 40)
    width = int(rng.integers(12, 40))
    layout = plan(random_masks(list(lengths), 12, seed), width, int(rng.integers(1, 6)))
    np.testing.assert_array_equal(
        np.bincount(layout.segment_ids.ravel(), minlength=41)[1:], lengths
    )
    fills = (layout.segment_ids > 0).sum(axis=(1, 2))
    rows = np.count_nonzero(fills)
    assert not fills[rows:].any()
    assert (fills[: rows - 1] > width // 2).all()
    assert (
        layout.used_tokens
        == -(-rows // layout.microbatch_shapes[0][0])
        * layout.microbatch_shapes[0][0]
        * width
    )


def test_an_empty_batch_uses_no_tokens():
    layout = plan(np.zeros((3, 4), bool), 4, 2)
    assert layout.used_tokens == 0
    assert np.isfinite(layout.padding_fraction())


def test_sequences_longer_than_a_row_are_refused():
    with pytest.raises(
        ValueError, match="sequences of up to 6 tokens do not fit rows of 5"
    ):
        plan_packing(
            jnp.ones((2, 6), bool), width=5, compute=tiny_models.compute(), mesh=MESH
        )


def ragged_rollouts() -> Rollouts:
    lengths = np.array([3, 0, 5, 2, 1, 5, 4, 2])
    rng = np.random.default_rng(3)
    return Rollouts(
        prompts=tiny_models.ragged_prompts([1, 5, 3, 6, 2, 4, 6, 1], columns=6),
        responses=jnp.asarray(rng.integers(tiny_models.VOCAB_SIZE, size=(8, 5)), jnp.int32),
        mask=jnp.asarray(np.arange(5) < lengths[:, None]),
        logprobs=jnp.zeros((8, 5)),
        ended=jnp.ones(8, bool),
    )


def packed_and_unpacked(function, batch: LmBatch, width: int, splits: int):
    """`function` of a packed batch, by microbatch, and of the unpacked batch, both [N, L];
    and the number of tokens run."""
    compute = tiny_models.compute(microbatch_rows=2, tail_splits=splits)
    layout = plan_packing(batch.segments != 0, width=width, compute=compute, mesh=MESH)
    _, packed = scan_packed_rows(
        lambda _, part: (None, function(part)), None, pack(batch, layout), layout
    )
    return (
        layout.gather(packed),
        jnp.where(batch.segments != 0, function(batch), 0.0),
        layout.used_tokens,
    )


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("config", [tiny_models.gpt_config(), tiny_models.llama_config()])
def test_packed_rollouts_equal_unpacked_ones(config, splits):
    batch = rollout_sequences(ragged_rollouts())
    policy = Transformer(config, tiny_models.compute(), "tokens")
    params = tiny_models.random_params(policy)
    logprobs = partial(packed_logprobs, policy, params, temperature=0.7)
    packed, alone, used = jax.jit(lambda b: packed_and_unpacked(logprobs, b, 24, splits))(
        batch
    )
    # Two microbatches of two rows, or one and half a row.
    assert used == (2 * 24 + 12 if splits else 4 * 24)
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(alone) == 22


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("config", [tiny_models.gpt_config(), tiny_models.llama_config()])
def test_packed_comparisons_equal_unpacked_ones(config, splits):
    comparisons = jax.tree.map(jnp.asarray, stages.comparisons((3, 1, 4, 2, 4, 2, 3, 4), 5))
    batch = comparison_sequences(comparisons)
    scorer = Transformer(config, tiny_models.compute(), "scalar")
    params = tiny_models.random_params(scorer)
    width = batch.tokens.shape[1] + 4
    packed, _, used = jax.jit(
        lambda b: packed_and_unpacked(
            partial(packed_outputs, scorer, params), b, width, splits
        )
    )(batch)
    assert used < 8 * width
    scores = np.take_along_axis(
        np.asarray(packed), np.asarray(last_token_columns(comparisons.mask, 6)), axis=1
    )
    for prompt in range(8):
        start = comparisons.prompts.tokens[prompt][comparisons.prompts.mask[prompt]]
        rows = zip(comparisons.responses[prompt], comparisons.mask[prompt], strict=True)
        valid = np.asarray(comparisons.valid[prompt])
        documents = [np.concatenate([start, response[mask]]) for response, mask in rows]
        alone = stages.plain_scores(scorer, params, documents)
        np.testing.assert_allclose(
            scores[prompt][valid], alone[valid], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("microbatch_rows", "splits", "ways"),
    [
        *((4, splits, ways) for splits in range(5) for ways in (1, 2)),
        (5, 1, 1),
        (10, 2, 1),
        (6, 2, 1),
        (7, 1, 1),
    ],
)
@pytest.mark.parametrize(
    "lengths",
    [[0] * 12, [1, 2] + [0] * 10, [5] * 5 + [0] * 7, [6] * 12, [*range(7), 6, 5, 3, 2, 1]],
)
def test_microbatches_cover_every_token_once(lengths, microbatch_rows, splits, ways):
    """For every remainder and every number of row shards."""
    real = random_masks(lengths, 6, seed=2)
    mesh = stages.mesh_of(data=ways)
    x = np.arange(1, real.size + 1).reshape(real.shape)

    def step(totals: tuple, part: tuple) -> tuple:
        x, texts = part
        assert x.shape == texts.shape
        totals = (
            totals[0] + texts.size,
            totals[1] + jnp.sum(texts > 0),
            totals[2] + jnp.sum(x),
        )
        return totals, 2 * x

    @jax.jit
    def run(real, x):
        compute = tiny_models.compute(microbatch_rows=microbatch_rows, tail_splits=splits)
        layout = plan_packing(real, width=9, compute=compute, mesh=mesh)
        totals, doubled = scan_packed_rows(
            step, (jnp.int32(0),) * 3, (layout.scatter(x), layout.segment_ids), layout
        )
        return totals, layout.gather(doubled), layout.padding_fraction()

    (tokens_run, tokens, total), doubled, padding = run(jnp.asarray(real), jnp.asarray(x))
    assert (tokens, total) == (real.sum(), x[real].sum())
    np.testing.assert_array_equal(doubled, np.where(real, 2 * x, 0))
    assert float(padding) == pytest.approx(
        1 - real.sum() / max(int(tokens_run), 1), abs=1e-6
    )
    if microbatch_rows == 4:
        assert tokens_run % (9 * ways) in ((0, 4 * ways, 2 * ways) if splits > 2 else (0,))


def test_vmapped_runs_share_the_number_of_microbatches():
    real = np.array([random_masks([6, 6, 6], 6), random_masks([1, 1, 0], 6)])

    def run(real):
        layout = plan_packing(
            real,
            width=6,
            compute=tiny_models.compute(microbatch_rows=2, tail_splits=2),
            mesh=MESH,
        )
        step = lambda count, part: (count + part.size, 2 * part)  # noqa: E731
        tokens_run, doubled = scan_packed_rows(
            step, jnp.int32(0), layout.segment_ids, layout
        )
        return tokens_run, layout.gather(doubled)

    tokens_run, doubled = jax.jit(jax.vmap(run))(jnp.asarray(real))
    assert tokens_run.tolist() == [18, 18]
    np.testing.assert_array_equal(doubled, 2 * np.arange(1, 4)[None, :, None] * real)
