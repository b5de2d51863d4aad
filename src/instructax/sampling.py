"""Sampling: one model code with the scorers, at one temperature, without dropout.

The prompts are run first, packed side by side and a few rows at a time, and their keys and values are kept. Responses
are then made in `slots`, one token in each at a step: a slot whose response has ended takes the next sample, with a
copy of its prompt's keys and values, so that a batch of long and short responses costs about the sum of their lengths.
Samples of one prompt share its forward pass. All of it is one compiled program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from instructax.model import (
    Cache,
    Transformer,
    cast_matrices,
    head_kernel,
    init_cache,
    layers_of,
    positions_of,
    while_sampling,
)
from instructax.operations import anywhere
from instructax.rows import Layout, lay_out, scan_rows
from instructax.types import Array, Params, Prompts, Rollouts, pytree
from instructax.vocabulary import logits_of


def sample_token(logits: Array, keys: Array, temperature: Array) -> tuple[Array, Array]:
    """One token for each row, and its log-probability: f32[B, V], key[B], f32[] → (i32[B], f32[B]).

    The inverse of the cumulative distribution at one uniform number a row: a vocabulary of Gumbel noise costs a
    quarter of a decoding step on a CPU. Probabilities below 2⁻²⁴ are beyond the resolution of the uniform number and
    of the running sum; a token whose probability is zero is never drawn.
    Temperature 0 takes the likeliest token and reports its log-probability at temperature 1.
    """
    logprobs = jax.nn.log_softmax(logits / jnp.where(temperature > 0, temperature, 1.0), axis=-1)
    probabilities = jnp.exp(logprobs)
    # The running sum is rounded in no fixed order, so it can rise at a token of probability zero: that one is left out.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1, keepdims=True)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (1,)))(keys)
    # Kept below the total, or rounding could leave no token above the point.
    points = jnp.minimum(uniforms * total, jnp.nextafter(total, jnp.zeros_like(total)))
    sampled = jnp.argmax(cumulative > points, axis=-1).astype(jnp.int32)
    tokens = jnp.where(temperature > 0, sampled, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


@pytree
class _Prefilled:
    """Prompts that were run through the network, where they stand in packed rows of width W."""

    hidden: Array  # dtype[M, D], after each prompt
    keys: tuple[Array, ...]  # per layer, operands' dtype[rows, W, kv_heads, head_width]
    values: tuple[Array, ...]
    texts: Array  # i32[rows, W], the number from 1 of the prompt that a cell belongs to; 0 = padding
    rows: Array  # i32[M], the row of each prompt
    columns: Array  # i32[M], its first column

    def window(self, packed: Array, prompt: Array, columns: int) -> Array:
        """Of [rows, W, ...] so many columns of one row, the prompt's among them: [columns, ...]."""
        start = (self.rows[prompt], self.columns[prompt], *(0,) * (packed.ndim - 2))  # or earlier, at the row's end
        return jax.lax.dynamic_slice(packed, start, (1, columns, *packed.shape[2:]))[0]


@pytree
class _Slots:
    """What is under way, S responses at a time, and what has been made of all N samples."""

    cache: Cache  # of S rows: P columns that hold the prompt, then those of the response
    hidden: Array  # dtype[S, D], from which the next token is drawn
    sample: Array  # i32[S], which sample a slot makes; N = none
    column: Array  # i32[S], response tokens that it has so far
    token: Array  # i32[S], the last of them
    next: Array  # i32[], the first sample that no slot has taken
    responses: Array  # i32[N, R]
    mask: Array  # b[N, R]
    logprobs: Array  # f32[N, R]
    ended: Array  # b[N]


def generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    temperature: Array | float,
    eos_id: int,
    stops: Array | None = None,
    groups: int = 1,
) -> Rollouts:
    """Samples up to `length` tokens after each prompt.

    `prompts` [M, P]; `keys` key[N], one for each sample, so that a sample depends neither on its neighbours nor on its
    slot; N is a multiple of M, and sample i is of prompt i // (N / M). Token t uses fold_in(key, t). A row ends with
    `eos_id`, or with one of `stops` b[V] if they are given, which belongs to the response; columns after it are masked
    and hold `eos_id`. Nothing is sampled after prompts without a token that come last in a share of the rows. `groups`:
    how many devices share rows; each has slots for its own share of the prompts. Returns Rollouts of N rows with R =
    `length`.
    """
    model = model.clone(compute=while_sampling(model.compute))
    prompts = jax.tree.map(jnp.asarray, prompts)  # NumPy's are not indexed by what is traced
    head = head_kernel(model.config, params).astype(model.compute.operands)
    params = cast_matrices(params, model.compute)

    def sample(prompts: Prompts, keys: Array) -> Rollouts:
        sampler = _Sampler(
            model=model,
            params=params,
            head=head,
            layers=layers_of(params["blocks"]),
            prompts=prompts,
            prefilled=_prefilled(model, params, prompts),
            keys=keys,
            wanted=_filled(prompts) * (len(keys) // len(prompts.tokens)),
            length=length,
            temperature=jnp.asarray(temperature, jnp.float32),
            eos_id=eos_id,
            stops=jnp.zeros((model.config.vocab_size,), bool) if stops is None else stops,
        )
        return sampler.run()

    if groups == 1:
        return sample(prompts, keys)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (prompts, keys))
    rollouts = jax.vmap(sample)(*split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampler:
    """One group's samples. Where there are several groups, all of them loop until the last has ended."""

    model: Transformer
    params: Params
    head: Array  # operands[V, D]
    layers: tuple[Params, ...]
    prompts: Prompts  # [M, P]
    prefilled: _Prefilled
    keys: Array  # key[N]
    wanted: Array  # i32[], samples that are made, the first ones
    length: int
    temperature: Array
    eos_id: int
    stops: Array  # b[V]

    def run(self) -> Rollouts:
        count = len(self.keys)

        def goes_on(s: _Slots) -> Array:
            return anywhere(jnp.any(s.sample < count) | (s.next < self.wanted))

        end = jax.lax.while_loop(goes_on, self._step, self._draw(self._start()))
        prompts = jax.tree.map(lambda x: jnp.repeat(x, count // len(self.prompts.tokens), axis=0), self.prompts)
        return Rollouts(prompts=prompts, responses=end.responses, mask=end.mask, logprobs=end.logprobs, ended=end.ended)

    def _start(self) -> _Slots:
        """All slots idle, nothing sampled."""
        model, count = self.model, len(self.keys)
        slots, columns = min(model.compute.slots, count), self.prompts.tokens.shape[1]
        cache = init_cache(model.config, model.compute, slots, columns + max(self.length - 1, 1))
        return _Slots(
            cache=dataclasses.replace(cache, filled=jnp.full((slots,), columns, jnp.int32)),
            hidden=jnp.zeros((slots, model.config.width), self.prefilled.hidden.dtype),
            sample=jnp.full((slots,), count, jnp.int32),
            column=jnp.zeros((slots,), jnp.int32),
            token=jnp.zeros((slots,), jnp.int32),
            next=jnp.int32(0),
            responses=jnp.full((count, self.length), self.eos_id, jnp.int32),
            mask=jnp.zeros((count, self.length), bool),
            logprobs=jnp.zeros((count, self.length), jnp.float32),
            ended=jnp.zeros((count,), bool),
        )

    def _waits(self, s: _Slots) -> Array:
        """Whether there are a sample and a slot for it."""
        return jnp.any(s.sample == len(self.keys)) & (s.next < self.wanted)

    def _prompt_of(self, sample: Array) -> Array:
        """The row of its prompt; of no sample, the last one."""
        count = len(self.prompts.tokens)
        return jnp.minimum(sample // (len(self.keys) // count), count - 1)

    def _take(self, s: _Slots) -> _Slots:
        """Gives the next sample to the first idle slot; nothing, if there is none of either."""
        slot = jnp.where(self._waits(s), jnp.argmax(s.sample == len(self.keys)), len(s.sample))
        prompt, columns, prefilled = self._prompt_of(s.next), self.prompts.tokens.shape[1], self.prefilled

        def put(all_: Array, one: Array | int) -> Array:
            return all_.at[slot].set(one, mode="drop")

        def copied(cached: tuple[Array, ...], packed: tuple[Array, ...]) -> tuple[Array, ...]:
            windows = [prefilled.window(one, prompt, columns).swapaxes(0, 1) for one in packed]
            pairs = zip(cached, windows, strict=True)
            return tuple(all_.at[slot, :, :columns].set(one, mode="drop") for all_, one in pairs)

        # Where in its columns the prompt stands is all the same: each token knows its position.
        seen = (prefilled.window(prefilled.texts, prompt, columns) == prompt + 1).astype(jnp.int32)
        return dataclasses.replace(
            s,
            cache=Cache(
                keys=copied(s.cache.keys, prefilled.keys),
                values=copied(s.cache.values, prefilled.values),
                segments=put(s.cache.segments, jnp.pad(seen, (0, s.cache.segments.shape[1] - columns))),
                filled=put(s.cache.filled, columns),
            ),
            hidden=put(s.hidden, prefilled.hidden[prompt]),
            sample=put(s.sample, s.next),
            column=put(s.column, 0),
            next=s.next + self._waits(s).astype(jnp.int32),
        )

    def _draw(self, s: _Slots) -> _Slots:
        """Fills idle slots, and adds a token to every response under way."""
        s = jax.lax.while_loop(lambda s: anywhere(self._waits(s)), self._take, s)
        count = len(self.keys)
        keys = jax.vmap(jax.random.fold_in)(self.keys[jnp.minimum(s.sample, count - 1)], s.column)
        logits = logits_of(s.hidden, self.head)
        tokens, logprobs = sample_token(logits, keys, self.temperature)
        stopped = (tokens == self.eos_id) | self.stops[tokens]
        over = stopped | (s.column + 1 == self.length)
        return dataclasses.replace(
            s,
            sample=jnp.where(over, count, s.sample),
            column=s.column + 1,
            token=tokens,
            responses=s.responses.at[s.sample, s.column].set(tokens, mode="drop"),
            mask=s.mask.at[s.sample, s.column].set(True, mode="drop"),
            logprobs=s.logprobs.at[s.sample, s.column].set(logprobs, mode="drop"),
            ended=s.ended.at[s.sample].set(stopped, mode="drop"),
        )

    def _step(self, s: _Slots) -> _Slots:
        """Runs the last tokens through the network, and draws the next ones."""
        active = s.sample < len(self.keys)
        lengths = jnp.sum(self.prompts.mask, axis=1, dtype=jnp.int32)[self._prompt_of(s.sample)]
        # Idle slots are run too; their positions must exist, and what they write is seen by none.
        positions = jnp.where(active, lengths + s.column - 1, 0)
        outputs: Any = self.model.apply(
            {"params": self.params},
            s.token[:, None],
            active[:, None].astype(jnp.int32),
            positions[:, None],
            cache=s.cache,
            layers=self.layers,
        )
        return self._draw(dataclasses.replace(s, cache=outputs[1], hidden=outputs[0][:, 0]))


def _filled(prompts: Prompts) -> Array:
    """How many prompts there are up to the last one with a token: i32[]."""
    count = len(prompts.mask)
    return jnp.max(jnp.where(jnp.any(prompts.mask, axis=1), jnp.arange(1, count + 1, dtype=jnp.int32), 0))


def prompt_layout(model: Transformer, prompts: Prompts) -> Layout:
    """Where prompts [M, P] stand while they are run: in rows of 2 · P, which waste little and are soon attended to."""
    count, columns = prompts.tokens.shape
    return lay_out(prompts.mask, width=min(count, 2) * columns, compute=model.compute, mesh=None)


def prefill_padding(model: Transformer, prompts: Prompts, groups: int) -> Array:
    """Share of the cells that `generate` runs for prompts [M, P] that hold no token, the mean over groups: f32[]."""
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), prompts)
    return jnp.mean(jax.vmap(lambda prompts: prompt_layout(model, prompts).padding())(split))


def _prefilled(model: Transformer, params: Params, prompts: Prompts) -> _Prefilled:
    """Runs the prompts, a few rows of them at a time."""
    layout = prompt_layout(model, prompts)

    def fill(_: None, part: tuple[Array, Array, Array]) -> tuple[None, Any]:
        cache = init_cache(model.config, model.compute, *part[0].shape)
        outputs: Any = model.apply({"params": params}, *part, cache=cache)
        kept = jax.tree.map(lambda x: x.swapaxes(1, 2), (outputs[1].keys, outputs[1].values))
        return None, (outputs[0], *kept)

    rows = (layout.spread(prompts.tokens), layout.texts, layout.spread(positions_of(prompts.mask)))
    _, packed = scan_rows(fill, None, rows, layout)
    hidden, keys, values = jax.tree.map(lambda x: x[:, 0], packed)  # one device's: a row is a line
    ends = jnp.minimum(layout.cells[:, -1], layout.texts.size - 1)
    starts = jnp.maximum(ends - jnp.sum(prompts.mask, axis=1, dtype=jnp.int32) + 1, 0)
    row, column = jnp.divmod(starts, hidden.shape[1])
    return _Prefilled(
        hidden=hidden.reshape(-1, hidden.shape[-1])[ends],
        keys=keys,
        values=values,
        texts=layout.texts[:, 0],
        rows=row,
        columns=column,
    )
