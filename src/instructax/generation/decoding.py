"""Token-by-token decoding of many samples in a fixed number of slots.

Every step draws one token in each slot. A slot whose sample has finished is refilled with
the next sample, so a batch of short and long responses costs about the sum of their
lengths. Samples of the same prompt share its prefill: a slot copies the prompt's keys and
values when it is refilled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from instructax.generation.prefill import PrefilledPrompts
from instructax.generation.token_sampling import sample_token
from instructax.models.attention import positions_from_mask
from instructax.models.kv_cache import Cache, init_cache
from instructax.models.logprobs import compute_logits
from instructax.models.ops import any_over_batch
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, Prompts, pytree


@pytree
class SampleBatch:
    """N samples to generate for M prompts; sample i continues prompt i // (N / M)."""

    prompts: Prompts  # [M, P]
    prefilled: PrefilledPrompts
    keys: Array  # key[N]
    # Only the first num_samples of the N samples are generated; the rest pad the batch.
    num_samples: Array  # i32[]
    max_new_tokens: Array  # i32[N], from 1 to R
    temperature: Array  # f32[N]


@pytree
class DecodeSlots:
    """The samples in progress, in S slots, and the results of all N samples so far."""

    # Per slot. The cache has P columns for the prompt, then those of the response.
    cache: Cache
    # The last hidden states, from which the next tokens are drawn.
    hidden: Array  # dtype[S, D]
    # Which sample is in the slot; N means that the slot is idle.
    sample_index: Array  # i32[S]
    # Response tokens generated so far.
    num_tokens: Array  # i32[S]
    last_token: Array  # i32[S]

    # Index of the first sample that has not entered a slot yet.
    next_sample: Array  # i32[]

    # Per sample: right-padded with the end token, False and zeros.
    responses: Array  # i32[N, R]
    mask: Array  # b[N, R]
    logprobs: Array  # f32[N, R]
    # Whether the response ended with the end token or a stop token.
    ended: Array  # b[N]


def compact_slots(slots: DecodeSlots, count: int) -> DecodeSlots:
    """Keeps `count` slots: busy ones first, then idle ones if there are too few."""
    idle = slots.sample_index == len(slots.responses)
    # A stable sort keeps the busy slots in order; their order changes no sample.
    kept = jnp.argsort(idle, stable=True)[:count]
    return dataclasses.replace(
        slots,
        cache=jax.tree.map(lambda x: x[kept], slots.cache),
        hidden=slots.hidden[kept],
        sample_index=slots.sample_index[kept],
        num_tokens=slots.num_tokens[kept],
        last_token=slots.last_token[kept],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingNetwork:
    """A policy prepared for decoding: its matrices are cast once, before the loops, because
    a decoding step mostly reads them."""

    model: Transformer
    params: Params
    head: Array  # matmul_dtype[V, D], the output projection
    # The parameters of each block, sliced from the stacked ones.
    layers: tuple[Params, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decodes one batch of samples.

    Under `vmap` (one batch per device) every loop runs until the slowest device is done.
    """

    network: DecodingNetwork
    batch: SampleBatch
    eos_id: int
    # Tokens that end a response just as `eos_id` does.
    stop_token_mask: Array  # b[V]

    def start(self, length: int) -> DecodeSlots:
        """Fills the slots and draws the first token in each; R = `length`."""
        return self._draw(self._empty_slots(length))

    def advance(self, slots: DecodeSlots, steps: Array | None = None) -> DecodeSlots:
        """Draws further tokens: up to `steps` i32[] per slot, or all if None.

        A first reading may skip compaction, which changes the cost but no sample: towards
        the end most slots are idle, yet a step still costs as much as all slots. So, up to
        `compaction_steps` times, the samples in progress move to half as many slots as soon
        as they fit. This happens only if `steps` is None, because it changes shapes.
        """
        if steps is not None:
            return self._decode(slots, 0, steps)
        for _ in range(self.network.model.compute.compaction_steps):
            half = len(slots.sample_index) // 2
            if half:
                slots = compact_slots(self._decode(slots, half, None), half)
        return self._decode(slots, 0, None)

    def _decode(
        self, slots: DecodeSlots, max_busy: int, steps: Array | None
    ) -> DecodeSlots:
        """Decodes, for up to `steps` steps, while more than `max_busy` slots are busy or a
        sample waits for a slot."""

        def is_unfinished(state: tuple[DecodeSlots, Array | None]) -> Array:
            slots, steps_left = state
            busy = jnp.sum(slots.sample_index < len(self.batch.keys))
            more = (busy > max_busy) | (slots.next_sample < self.batch.num_samples)
            if steps_left is None:
                return any_over_batch(more)
            return any_over_batch(more) & (steps_left > 0)

        def step(
            state: tuple[DecodeSlots, Array | None],
        ) -> tuple[DecodeSlots, Array | None]:
            slots, steps_left = state
            return self._step(slots), None if steps_left is None else steps_left - 1

        return jax.lax.while_loop(is_unfinished, step, (slots, steps))[0]

    def _empty_slots(self, length: int) -> DecodeSlots:
        """All slots idle, nothing sampled."""
        model = self.network.model
        num_samples = len(self.batch.keys)
        num_slots = min(model.compute.slots, num_samples)
        columns = self.batch.prompts.tokens.shape[1]

        # The last token of a response is never run through the network.
        cache_length = columns + max(length - 1, 1)
        cache = init_cache(model.config, model.compute, num_slots, cache_length)
        hidden_dtype = self.batch.prefilled.hidden.dtype
        return DecodeSlots(
            cache=dataclasses.replace(
                cache, filled=jnp.full((num_slots,), columns, jnp.int32)
            ),
            hidden=jnp.zeros((num_slots, model.config.embed_dim), hidden_dtype),
            sample_index=jnp.full((num_slots,), num_samples, jnp.int32),
            num_tokens=jnp.zeros((num_slots,), jnp.int32),
            last_token=jnp.zeros((num_slots,), jnp.int32),
            next_sample=jnp.int32(0),
            responses=jnp.full((num_samples, length), self.eos_id, jnp.int32),
            mask=jnp.zeros((num_samples, length), bool),
            logprobs=jnp.zeros((num_samples, length), jnp.float32),
            ended=jnp.zeros((num_samples,), bool),
        )

    def _can_refill(self, slots: DecodeSlots) -> Array:
        """Whether there are both an idle slot and a sample that waits for one: b[]."""
        any_idle = jnp.any(slots.sample_index == len(self.batch.keys))
        return any_idle & (slots.next_sample < self.batch.num_samples)

    def _prompt_index(self, sample_index: Array) -> Array:
        """Index of the sample's prompt; of an idle slot, the last prompt."""
        num_prompts = len(self.batch.prompts.tokens)
        samples_per_prompt = len(self.batch.keys) // num_prompts
        return jnp.minimum(sample_index // samples_per_prompt, num_prompts - 1)

    def _refill_one(self, slots: DecodeSlots) -> DecodeSlots:
        """Puts the next sample into the first idle slot; does nothing if either is missing
        (under `vmap` other devices may still refill)."""
        prefilled = self.batch.prefilled
        columns = self.batch.prompts.tokens.shape[1]
        can_refill = self._can_refill(slots)
        first_idle = jnp.argmax(slots.sample_index == len(self.batch.keys))
        # A slot out of range makes every write below a no-op.
        slot = jnp.where(can_refill, first_idle, len(slots.sample_index))
        prompt = self._prompt_index(slots.next_sample)

        def put(per_slot: Array, value: Array | int) -> Array:
            return per_slot.at[slot].set(value, mode="drop")

        def copy_prompt(
            cached: tuple[Array, ...], packed: tuple[Array, ...]
        ) -> tuple[Array, ...]:
            updated = []
            for layer, packed_layer in zip(cached, packed, strict=True):
                # [P, num_kv_heads, head_dim] → [num_kv_heads, P, head_dim]
                window = prefilled.window(packed_layer, prompt, columns).swapaxes(0, 1)
                updated.append(layer.at[slot, :, :columns].set(window, mode="drop"))
            return tuple(updated)

        # The window also holds tokens of neighboring prompts; the mask excludes them. Where
        # the prompt lies within the P columns makes no difference, because every token
        # carries its position.
        segment_ids = prefilled.window(prefilled.segment_ids, prompt, columns)
        visible = jnp.pad(
            segment_ids == prompt + 1, (0, slots.cache.segments.shape[1] - columns)
        )
        positions = slots.cache.positions
        if positions is not None:
            positions = put(positions, positions_from_mask(visible))
        cache = Cache(
            keys=copy_prompt(slots.cache.keys, prefilled.keys),
            values=copy_prompt(slots.cache.values, prefilled.values),
            segments=put(slots.cache.segments, visible.astype(jnp.int32)),
            positions=positions,
            filled=put(slots.cache.filled, columns),
        )
        return dataclasses.replace(
            slots,
            cache=cache,
            hidden=put(slots.hidden, prefilled.hidden[prompt]),
            sample_index=put(slots.sample_index, slots.next_sample),
            num_tokens=put(slots.num_tokens, 0),
            next_sample=slots.next_sample + can_refill.astype(jnp.int32),
        )

    def _draw(self, slots: DecodeSlots) -> DecodeSlots:
        """Refills idle slots, then draws one token in every busy slot."""
        batch = self.batch
        network = self.network
        slots = jax.lax.while_loop(
            lambda slots: any_over_batch(self._can_refill(slots)), self._refill_one, slots
        )

        # Idle slots draw too, with the settings of the last sample; their results are
        # dropped because their sample index is out of range.
        num_samples = len(batch.keys)
        sample = jnp.minimum(slots.sample_index, num_samples - 1)
        keys = jax.vmap(jax.random.fold_in)(batch.keys[sample], slots.num_tokens)
        logits = compute_logits(
            slots.hidden, network.head, network.model.config.final_logit_softcap
        )
        tokens, logprobs = sample_token(logits, keys, batch.temperature[sample])

        # The token that ends a response belongs to it.
        stopped = (tokens == self.eos_id) | self.stop_token_mask[tokens]
        done = stopped | (slots.num_tokens + 1 == batch.max_new_tokens[sample])
        # [S] row and column of each token in the results [N, R].
        place = (slots.sample_index, slots.num_tokens)
        return dataclasses.replace(
            slots,
            sample_index=jnp.where(done, num_samples, slots.sample_index),
            num_tokens=slots.num_tokens + 1,
            last_token=tokens,
            responses=slots.responses.at[place].set(tokens, mode="drop"),
            mask=slots.mask.at[place].set(True, mode="drop"),
            logprobs=slots.logprobs.at[place].set(logprobs, mode="drop"),
            ended=slots.ended.at[slots.sample_index].set(stopped, mode="drop"),
        )

    def _step(self, slots: DecodeSlots) -> DecodeSlots:
        """Runs the last tokens through the network and draws the next ones."""
        active = slots.sample_index < len(self.batch.keys)  # [S]
        # The last token stands at position prompt length + num_tokens - 1.
        prompt_lengths = jnp.sum(self.batch.prompts.mask, axis=1, dtype=jnp.int32)
        prompt_length = prompt_lengths[self._prompt_index(slots.sample_index)]
        # Idle slots run as well, at a position that surely exists; nothing attends to what
        # they write.
        positions = jnp.where(active, prompt_length + slots.num_tokens - 1, 0)
        # One new column per slot, [S, 1].
        outputs: Any = self.network.model.apply(
            {"params": self.network.params},
            slots.last_token[:, None],
            active[:, None].astype(jnp.int32),
            positions[:, None],
            cache=slots.cache,
            layers=self.network.layers,
        )
        hidden, cache = outputs
        return self._draw(dataclasses.replace(slots, cache=cache, hidden=hidden[:, 0]))
