"""Sequences packed inside a compiled program: every token in its place, no row too many, and the parts that are run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
import stages
from instructax.inference import comparison_rows, last_columns, rollout_rows, row_logprobs, row_outputs
from instructax.model import Transformer
from instructax.rows import Layout, lay_out, pack, scan_parts
from instructax.types import LmBatch, Rollouts

MESH = stages.mesh_of()


def marked(lengths: list[int], columns: int, seed: int = 0) -> np.ndarray:
    """b[N, L] with so many marks in each row, at random columns."""
    rng = np.random.default_rng(seed)
    rows = [np.isin(np.arange(columns), rng.permutation(columns)[:length]) for length in lengths]
    return np.array(rows)


def placed(real: np.ndarray, width: int, part_rows: int) -> Layout:
    return jax.device_get(jax.jit(partial(lay_out, width=width, part_rows=part_rows, mesh=MESH))(jnp.asarray(real)))


def test_first_fit_the_longest_first_by_hand():
    layout = placed(marked([3, 6, 2, 5, 1], 6), 8, 2)
    # 6 | 5 | 3 behind the 5 | 2 behind the 6 | 1 in a row of its own
    wanted = [[[2] * 6 + [3] * 2, [4] * 5 + [1] * 3], [[5] + [0] * 7, [0] * 8], [[0] * 8, [0] * 8]]
    np.testing.assert_array_equal(layout.texts, wanted)
    assert layout.used == 2
    assert float(layout.padding()) == pytest.approx(1 - 17 / 32)


def test_tokens_stand_in_order_and_come_back():
    real = marked([4, 0, 7, 1, 7, 3], 7, seed=1)
    layout = placed(real, 10, 1)
    x = np.arange(1, 43).reshape(6, 7).astype(np.float32)
    rows = layout.spread(jnp.asarray(x))
    np.testing.assert_array_equal(layout.collect(rows), np.where(real, x, 0))
    flat, texts = np.asarray(rows).ravel(), layout.texts.ravel()
    for text in range(6):
        np.testing.assert_array_equal(flat[texts == text + 1], x[text][real[text]])
        cells = np.flatnonzero(texts == text + 1)
        assert len(cells) == 0 or ((np.diff(cells) == 1).all() and cells[0] // 10 == cells[-1] // 10)


@pytest.mark.parametrize("seed", range(8))
def test_no_token_is_lost_and_no_row_overflows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, 40)
    layout = placed(marked(list(lengths), 12, seed), int(rng.integers(12, 40)), int(rng.integers(1, 6)))
    np.testing.assert_array_equal(np.bincount(layout.texts.ravel(), minlength=41)[1:], lengths)
    parts = (layout.texts > 0).any(axis=(1, 2))
    assert parts[: layout.used].all() and not parts[layout.used :].any()


def test_nothing_at_all_uses_no_part():
    layout = placed(np.zeros((3, 4), bool), 4, 2)
    assert layout.used == 0
    assert np.isfinite(layout.padding())


def test_a_sequence_wider_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sequences of up to 6 tokens do not fit rows of 5"):
        lay_out(jnp.ones((2, 6), bool), width=5, part_rows=1, mesh=MESH)


def ragged_rollouts() -> Rollouts:
    lengths = np.array([3, 0, 5, 2, 1, 5, 4, 2])
    rng = np.random.default_rng(3)
    return Rollouts(
        prompts=small.ragged_prompts([1, 5, 3, 6, 2, 4, 6, 1], columns=6),
        responses=jnp.asarray(rng.integers(small.VOCAB_SIZE, size=(8, 5)), jnp.int32),
        mask=jnp.asarray(np.arange(5) < lengths[:, None]),
        logprobs=jnp.zeros((8, 5)),
        ended=jnp.ones(8, bool),
    )


def by_rows(function, batch: LmBatch, width: int):
    """`function` of a batch that is packed, part by part, and of the batch as it is, both [N, L]; the parts used."""
    layout = lay_out(batch.segments != 0, width=width, part_rows=2, mesh=MESH)
    _, packed = scan_parts(lambda _, part: (None, function(part)), None, pack(batch, layout), layout.used)
    return layout.collect(packed), jnp.where(batch.segments != 0, function(batch), 0.0), layout.used


@pytest.mark.parametrize("config", [small.gpt_config(), small.llama_config()])
def test_packed_rollouts_are_as_if_alone(config):
    batch = rollout_rows(ragged_rollouts())
    policy = Transformer(config, small.compute(), "tokens")
    params = small.random_params(policy)
    logprobs = partial(row_logprobs, policy, params, temperature=0.7)
    packed, alone, used = jax.jit(lambda b: by_rows(logprobs, b, 24))(batch)
    assert used == 2  # of four parts
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(alone) == 22


@pytest.mark.parametrize("config", [small.gpt_config(), small.llama_config()])
def test_packed_responses_to_one_prompt_are_as_if_alone(config):
    comparisons = jax.tree.map(jnp.asarray, stages.comparisons((3, 1, 4, 2, 4, 2, 3, 4), 5))
    batch = comparison_rows(comparisons)
    scorer = Transformer(config, small.compute(), "scalar")
    params = small.random_params(scorer)
    width = batch.tokens.shape[1] + 4
    packed, _, used = jax.jit(lambda b: by_rows(partial(row_outputs, scorer, params), b, width))(batch)
    assert used < 4
    scores = np.take_along_axis(np.asarray(packed), np.asarray(last_columns(comparisons.mask, 6)), axis=1)
    for prompt in range(8):
        start = comparisons.prompts.tokens[prompt][comparisons.prompts.mask[prompt]]
        rows = zip(comparisons.responses[prompt], comparisons.mask[prompt], strict=True)
        valid = np.asarray(comparisons.valid[prompt])
        documents = [np.concatenate([start, response[mask]]) for response, mask in rows]
        alone = stages.plain_scores(scorer, params, documents)
        np.testing.assert_allclose(scores[prompt][valid], alone[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 2, 3])
def test_a_scan_that_ends_early(used):
    def step(total, part):
        return total + part, 2 * part

    total, outs = jax.jit(lambda used: scan_parts(step, jnp.float32(1.0), jnp.array([3.0, 5.0, 7.0]), used))(used)
    parts = np.array([3.0, 5.0, 7.0])
    assert float(total) == 1 + parts[:used].sum()
    np.testing.assert_array_equal(outs, np.where(np.arange(3) < used, 2 * parts, 0))
