"""On realistic lengths, less than a tenth of the tokens in each stage's batches is padding.

The lengths are interpolated between percentiles measured on real data, with a tokenizer of
8,192 words trained on its text: books, encyclopedia and speeches; six sets of
demonstrations; six sets of comparisons, mostly K = 2 and up to 8; and one set of prompts.
"small" are lengths within the limits of the size small, 256 tokens in all; "long" are those
within the paper's 2,048.
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from configs import ppo as ppo_config
from configs import reward_model as reward_config
from configs import sizes
from tests.support import stages, tiny_models

from instructax.config import construct
from instructax.data import document_packing
from instructax.generation.prefill import prefill_padding
from instructax.models.config import ComputeConfig
from instructax.models.sequence_packing import plan_packing
from instructax.models.transformer import Transformer
from instructax.types import Prompts

PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
TOKENS = {
    "texts": (21, 594, 848, 939, 1013, 1068, 1105, 1188, 1438),
    "demonstrations, small": (11, 23, 45, 76, 107, 134, 151, 181, 211),
    "demonstrations, long": (11, 26, 60, 107, 184, 429, 615, 910, 1835),
    "comparisons, small": (
        29,
        55,
        89,
        123,
        160,
        200,
        220,
        260,
        297,
    ),  # a prompt with all its responses
    "comparisons, long": (29, 79, 185, 323, 519, 777, 999, 1415, 2721),
    "prompts, small": (3, 10, 14, 19, 39, 71, 91, 117, 128),
    "prompts, long": (3, 10, 14, 22, 61, 169, 273, 512, 952),
    "responses, small": (2, 2, 8, 31, 64, 82, 89, 95, 96),  # the lengths of demonstrations
    "responses, long": (2, 2, 7, 36, 82, 121, 162, 409, 1014),
}
ROWS = {"small": 256, "long": 2048}
SIZES = {"small": "small", "long": "1.3b"}
BATCHES = 40


def sample_lengths(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """`count` sampled lengths of a kind, i64."""
    uniforms = 100 * np.random.default_rng([seed, *kind.encode()]).random(count)
    return np.round(np.interp(uniforms, PERCENTILES, TOKENS[kind])).astype(int)


def compute(size: str, **changes: int) -> ComputeConfig:
    return construct(ComputeConfig, sizes.compute(size).to_dict() | changes)


def padding(batches: Sequence[np.ndarray], width: int, config: ComputeConfig) -> float:
    """The padding fraction of packed sequences of these lengths, averaged over batches."""

    def of_batch(lengths):
        real = jnp.arange(width)[None] < lengths[:, None]
        return plan_packing(
            real, width=width, compute=config, mesh=stages.mesh_of()
        ).padding_fraction()

    return float(jnp.mean(jax.jit(jax.vmap(of_batch))(jnp.asarray(np.array(batches)))))


def share_of_rows(documents: Sequence[document_packing.Document], length: int) -> float:
    rows = document_packing.pack_documents(documents, length)
    return 1 - sum(len(row.tokens) for row in rows) / (len(rows) * length)


@pytest.mark.parametrize("limits", ROWS)
def test_padding_of_packed_text(limits):
    texts = [
        document_packing.text_documents(np.zeros(n, np.int32), 0, ROWS[limits])
        for n in sample_lengths("texts", 2000)
    ]
    assert (
        0
        < share_of_rows(
            [document for documents in texts for document in documents], ROWS[limits]
        )
        < 0.1
    )


@pytest.mark.parametrize("limits", ROWS)
def test_padding_of_packed_demonstrations(limits):
    lengths = sample_lengths(f"demonstrations, {limits}", 2000)
    documents = [
        document_packing.Document(np.zeros(n, np.int32), np.arange(n) > 0) for n in lengths
    ]
    assert 0 < share_of_rows(documents, ROWS[limits]) < 0.1
    # With one document per row.
    assert 1 - lengths.sum() / (len(lengths) * ROWS[limits]) > 0.6


@pytest.mark.parametrize(("limits", "width"), [("small", 320), ("long", 2752)])
def test_padding_of_comparisons(limits, width):
    size = SIZES[limits]
    prompts = reward_config.get_config(size).batch_size
    batches = sample_lengths(f"comparisons, {limits}", BATCHES * prompts).reshape(
        BATCHES, prompts
    )
    assert 0 < padding(batches, width, compute(size)) < 0.1


@cache
def rollouts(limits: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the prompts and of the responses of several PPO iterations, [BATCHES, B]
    each."""
    rows = ppo_config.get_config(SIZES[limits]).batch_size
    kinds = (f"prompts, {limits}", f"responses, {limits}")
    return tuple(
        sample_lengths(kind, BATCHES * rows).reshape(BATCHES, rows) for kind in kinds
    )


@pytest.mark.parametrize("limits", ROWS)
def test_padding_of_prompts_for_sampling(limits):
    lengths = rollouts(limits)[0][:4]
    columns = sizes.limits(SIZES[limits]).prompt_tokens
    model = Transformer(tiny_models.gpt_config(), compute(SIZES[limits]), "tokens")
    for batch in lengths:
        mask = jnp.arange(columns)[None] >= columns - jnp.asarray(batch)[:, None]
        prompts = Prompts(tokens=jnp.zeros(mask.shape, jnp.int32), mask=mask)
        assert 0 < prefill_padding(model, prompts, 1) < 0.1
    assert 1 - lengths.mean() / columns > 0.7  # with one sequence per row


@pytest.mark.parametrize("limits", ROWS)
def test_padding_of_scored_rollouts(limits):
    batches = np.sum(rollouts(limits), axis=0)[:8]
    assert 0 < padding(batches, ROWS[limits], compute(SIZES[limits])) < 0.1


@pytest.mark.parametrize("limits", ROWS)
def test_padding_of_minibatches(limits):
    count = ppo_config.get_config(SIZES[limits]).minibatches
    lengths = np.sum(rollouts(limits), axis=0)
    batches = lengths.reshape(BATCHES * count, -1)
    assert 0 < padding(batches, ROWS[limits], compute(SIZES[limits])) < 0.1


def test_full_microbatches_alone_would_pad_too_much():
    """With microbatches of four rows and no tail splits, more than a quarter of a
    minibatch, and of a batch of comparisons, would be padding."""
    whole = compute("small", microbatch_rows=4, tail_splits=0)
    minibatches = np.sum(rollouts("small"), axis=0).reshape(4 * BATCHES, -1)
    assert padding(minibatches, 256, whole) > 0.25
    assert (
        padding(
            sample_lengths("comparisons, small", 16 * BATCHES).reshape(BATCHES, 16),
            512,
            whole,
        )
        > 0.25
    )
