"""The schedule of the decoding slots: when they are refilled and compacted."""

import jax
import jax.numpy as jnp
import numpy as np
from tests.support.tiny_models import compute, gpt_config, ragged_prompts, random_params

from instructax.generation import decoding
from instructax.generation.sampler import generate
from instructax.models.transformer import Transformer
from instructax.types import Array

EOS = 4
MAX_TOKENS = 12  # R


def slots_per_step(
    monkeypatch, lengths: list[int], slots: int, compaction_steps: int = 0
) -> list[int]:
    """How many slots draw a token at each step, for responses of these lengths."""
    model = Transformer(
        # The smallest network: only the schedule matters here.
        gpt_config(num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, mlp_dim=4),
        compute(slots=slots, compaction_steps=compaction_steps),
        "tokens",
    )
    params = random_params(model)
    keys = jax.random.split(jax.random.key(0), len(lengths))
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    # u32[sample, token, 2]: no two are alike, so a key tells its sample and token.
    token_keys = jax.random.key_data(fold(keys, jnp.arange(MAX_TOKENS)))
    counts = []

    def scripted_sampler(logits: Array, keys: Array, _: Array) -> tuple[Array, Array]:
        """Ends each response at its given length."""
        jax.debug.callback(lambda: counts.append(len(logits)))
        key_data = jax.random.key_data(keys)[:, None, None]
        matches = jnp.all(token_keys[None] == key_data, axis=-1)  # [S, N, R]
        place = jnp.argmax(matches.reshape(len(logits), -1), axis=1)
        sample, token = jnp.divmod(place, MAX_TOKENS)
        is_last = token + 1 >= jnp.asarray(lengths)[sample]
        return jnp.where(is_last, EOS, 0), jnp.zeros(len(logits))

    monkeypatch.setattr(decoding, "sample_token", scripted_sampler)
    prompts = ragged_prompts([2] * len(lengths), columns=3)

    @jax.jit
    def sample():
        return generate(
            model, params, prompts, keys, length=MAX_TOKENS, temperature=1.0, eos_id=EOS
        )

    rollouts = sample()
    jax.effects_barrier()
    assert np.asarray(rollouts.mask).sum(axis=1).tolist() == lengths
    return counts


def test_a_slot_is_refilled_as_soon_as_its_sample_has_finished(monkeypatch):
    lengths = [2, 9, 1, 3, 4, 2]
    # One slot generates 2 + 1 + 3 + 4 tokens, the other 9 and the last 2.
    assert slots_per_step(monkeypatch, lengths, 2) == [2] * 11
    assert slots_per_step(monkeypatch, lengths, 1) == [1] * sum(lengths)
    assert slots_per_step(monkeypatch, lengths, 6) == [6] * max(lengths)


def test_slots_are_compacted_when_half_of_them_suffice(monkeypatch):
    lengths = [2, 9, 1, 3, 4, 2]
    counts = slots_per_step(monkeypatch, lengths, 6, compaction_steps=1)
    assert counts == [6, 6, *[3] * 7]
    counts = slots_per_step(monkeypatch, lengths, 6, compaction_steps=5)
    assert counts == [6, 6, 3, 3, 1, 1, 1, 1, 1]
    # The first four slots take over the last two samples; only then may slots be dropped.
    counts = slots_per_step(monkeypatch, lengths, 4, compaction_steps=1)
    assert counts == [4] * 4 + [2] * 5
