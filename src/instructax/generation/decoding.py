"""Responses under way: one token in each slot at a step, and a slot whose response has
ended takes the next sample.

It gets a copy of its prompt's keys and values, so that a batch of long and short responses
costs about the sum of their lengths, and samples of one prompt share its forward pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from instructax.generation.prefill import Prefilled
from instructax.models import Cache, Transformer, init_cache, positions_of
from instructax.models.logprobs import logits_of
from instructax.models.ops import any_over_batch
from instructax.types import Array, Params, Prompts, pytree


def sample_token(logits: Array, keys: Array, temperature: Array) -> tuple[Array, Array]:
    """One token for each row, and its log-probability: f32[B, V], key[B], f32[] or f32[B] →
    (i32[B], f32[B]).

    The inverse of the cumulative distribution at one uniform number a row: a vocabulary of
    Gumbel noise costs a quarter of a decoding step on a CPU. Probabilities below 2⁻²⁴ are
    beyond the resolution of the uniform number and of the running sum; a token whose
    probability is zero is never drawn. Temperature 0 takes the likeliest token and reports
    its log-probability at temperature 1.
    """
    divisors = jnp.reshape(jnp.where(temperature > 0, temperature, 1.0), (-1, 1))
    logprobs = jax.nn.log_softmax(logits / divisors, axis=-1)
    probabilities = jnp.exp(logprobs)
    # The running sum is rounded in no fixed order, so it can rise at a token of probability
    # zero: that one is left out.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1, keepdims=True)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (1,)))(keys)
    # Kept below the total, or rounding could leave no token above the point.
    points = jnp.minimum(uniforms * total, jnp.nextafter(total, jnp.zeros_like(total)))
    sampled = jnp.argmax(cumulative > points, axis=-1).astype(jnp.int32)
    tokens = jnp.where(
        temperature > 0, sampled, jnp.argmax(logits, axis=-1).astype(jnp.int32)
    )
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


@pytree
class SampleBatch:
    """N samples that are wanted, and what they are drawn from."""

    prompts: Prompts  # [M, P]; sample i is of prompt i // (N / M)
    prefilled: Prefilled
    keys: Array  # key[N]
    wanted: Array  # i32[], samples that are made, the first ones
    max_new_tokens: Array  # i32[N], the most tokens of each, from 1 to R
    temperature: Array  # f32[N]


@pytree
class Slots:
    """What is under way, S responses at a time, and what has been made of all N samples."""

    cache: Cache  # of S rows: P columns of the prompt, then those of the response
    hidden: Array  # dtype[S, D], from which the next token is drawn
    sample: Array  # i32[S], which sample a slot makes; N = none
    num_tokens: Array  # i32[S], response tokens that it has so far
    token: Array  # i32[S], the last of them
    next: Array  # i32[], the first sample that no slot has taken
    responses: Array  # i32[N, R]
    mask: Array  # b[N, R]
    logprobs: Array  # f32[N, R]
    ended: Array  # b[N]


def compact_slots(s: Slots, count: int) -> Slots:
    """The first `count` busy slots alone; idle ones, if there are fewer."""
    first = jnp.argsort(s.sample == len(s.responses), stable=True)[:count]
    own = s.cache, s.hidden, s.sample, s.num_tokens, s.token
    cache, hidden, sample, num_tokens, token = jax.tree.map(lambda x: x[first], own)
    return dataclasses.replace(
        s, cache=cache, hidden=hidden, sample=sample, num_tokens=num_tokens, token=token
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """One group's samples. Where there are several groups, all of them loop until the last
    has ended."""

    model: Transformer
    params: Params
    head: Array  # matmul_dtype[V, D]
    layers: tuple[Params, ...]
    draws: SampleBatch
    eos_id: int
    stop_token_mask: Array  # b[V], tokens that end a response as `eos_id` does

    def begin(self, length: int) -> Slots:
        """The first token in every slot; R = `length`."""
        return self._draw(self._idle(length))

    def advance(self, s: Slots, steps: Array | None = None) -> Slots:
        """Up to `steps` i32[] further tokens in every slot; None: until all samples are
        made.

        In the end most slots are idle, and a step's cost grows with its slots: with
        `compaction_steps`, what is under way goes on in half as many slots as soon as it
        fits, unless there are `steps`, after which others go on.
        """
        if steps is not None:
            return self._go_on(s, 0, steps)
        for _ in range(self.model.compute.compaction_steps):
            if half := len(s.sample) // 2:
                s = compact_slots(self._go_on(s, half, None), half)
        return self._go_on(s, 0, None)

    def _go_on(self, s: Slots, busy: int, steps: Array | None) -> Slots:
        """Further tokens, up to `steps`, while more than `busy` slots are, or a sample
        waits."""

        def goes_on(state: tuple[Slots, Array | None]) -> Array:
            s, left = state
            more = (jnp.sum(s.sample < len(self.draws.keys)) > busy) | (
                s.next < self.draws.wanted
            )
            return (
                any_over_batch(more) if left is None else any_over_batch(more) & (left > 0)
            )

        def step(state: tuple[Slots, Array | None]) -> tuple[Slots, Array | None]:
            return self._step(state[0]), None if state[1] is None else state[1] - 1

        return jax.lax.while_loop(goes_on, step, (s, steps))[0]

    def _idle(self, length: int) -> Slots:
        """All slots idle, nothing sampled."""
        model, count = self.model, len(self.draws.keys)
        slots, columns = min(model.compute.slots, count), self.draws.prompts.tokens.shape[1]
        cache = init_cache(model.config, model.compute, slots, columns + max(length - 1, 1))
        return Slots(
            cache=dataclasses.replace(cache, filled=jnp.full((slots,), columns, jnp.int32)),
            hidden=jnp.zeros(
                (slots, model.config.embed_dim), self.draws.prefilled.hidden.dtype
            ),
            sample=jnp.full((slots,), count, jnp.int32),
            num_tokens=jnp.zeros((slots,), jnp.int32),
            token=jnp.zeros((slots,), jnp.int32),
            next=jnp.int32(0),
            responses=jnp.full((count, length), self.eos_id, jnp.int32),
            mask=jnp.zeros((count, length), bool),
            logprobs=jnp.zeros((count, length), jnp.float32),
            ended=jnp.zeros((count,), bool),
        )

    def _waits(self, s: Slots) -> Array:
        """Whether there are a sample and a slot for it."""
        return jnp.any(s.sample == len(self.draws.keys)) & (s.next < self.draws.wanted)

    def _prompt_of(self, sample: Array) -> Array:
        """The row of its prompt; of no sample, the last one."""
        count = len(self.draws.prompts.tokens)
        return jnp.minimum(sample // (len(self.draws.keys) // count), count - 1)

    def _take(self, s: Slots) -> Slots:
        """Gives the next sample to the first idle slot; nothing, if there is none of
        either."""
        slot = jnp.where(
            self._waits(s), jnp.argmax(s.sample == len(self.draws.keys)), len(s.sample)
        )
        prompt, prefilled = self._prompt_of(s.next), self.draws.prefilled
        columns = self.draws.prompts.tokens.shape[1]

        def put(all_: Array, one: Array | int) -> Array:
            return all_.at[slot].set(one, mode="drop")

        def copied(
            cached: tuple[Array, ...], packed: tuple[Array, ...]
        ) -> tuple[Array, ...]:
            windows = [
                prefilled.window(one, prompt, columns).swapaxes(0, 1) for one in packed
            ]
            pairs = zip(cached, windows, strict=True)
            return tuple(
                all_.at[slot, :, :columns].set(one, mode="drop") for all_, one in pairs
            )

        # Where in its columns the prompt stands is all the same: each token knows its
        # position.
        own = prefilled.window(prefilled.texts, prompt, columns) == prompt + 1
        seen = jnp.pad(own, (0, s.cache.segments.shape[1] - columns))
        positions = (
            None
            if s.cache.positions is None
            else put(s.cache.positions, positions_of(seen))
        )
        return dataclasses.replace(
            s,
            cache=Cache(
                keys=copied(s.cache.keys, prefilled.keys),
                values=copied(s.cache.values, prefilled.values),
                segments=put(s.cache.segments, seen.astype(jnp.int32)),
                positions=positions,
                filled=put(s.cache.filled, columns),
            ),
            hidden=put(s.hidden, prefilled.hidden[prompt]),
            sample=put(s.sample, s.next),
            num_tokens=put(s.num_tokens, 0),
            next=s.next + self._waits(s).astype(jnp.int32),
        )

    def _draw(self, s: Slots) -> Slots:
        """Fills idle slots, and adds a token to every response under way."""
        s = jax.lax.while_loop(lambda s: any_over_batch(self._waits(s)), self._take, s)
        count = len(self.draws.keys)
        own = jnp.minimum(s.sample, count - 1)
        keys = jax.vmap(jax.random.fold_in)(self.draws.keys[own], s.num_tokens)
        logits = logits_of(s.hidden, self.head, self.model.config.logit_cap)
        tokens, logprobs = sample_token(logits, keys, self.draws.temperature[own])
        stopped = (tokens == self.eos_id) | self.stop_token_mask[tokens]
        over = stopped | (s.num_tokens + 1 == self.draws.max_new_tokens[own])
        return dataclasses.replace(
            s,
            sample=jnp.where(over, count, s.sample),
            num_tokens=s.num_tokens + 1,
            token=tokens,
            responses=s.responses.at[s.sample, s.num_tokens].set(tokens, mode="drop"),
            mask=s.mask.at[s.sample, s.num_tokens].set(True, mode="drop"),
            logprobs=s.logprobs.at[s.sample, s.num_tokens].set(logprobs, mode="drop"),
            ended=s.ended.at[s.sample].set(stopped, mode="drop"),
        )

    def _step(self, s: Slots) -> Slots:
        """Runs the last tokens through the network, and draws the next ones."""
        active = s.sample < len(self.draws.keys)
        lengths = jnp.sum(self.draws.prompts.mask, axis=1, dtype=jnp.int32)[
            self._prompt_of(s.sample)
        ]
        # Idle slots are run too; their positions must exist, and what they write is seen by
        # none.
        positions = jnp.where(active, lengths + s.num_tokens - 1, 0)
        outputs: Any = self.model.apply(
            {"params": self.params},
            s.token[:, None],
            active[:, None].astype(jnp.int32),
            positions[:, None],
            cache=s.cache,
            layers=self.layers,
        )
        return self._draw(dataclasses.replace(s, cache=outputs[1], hidden=outputs[0][:, 0]))
