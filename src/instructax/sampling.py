"""Sampling: one model code with the scorers, at one temperature, without dropout.

The prompts are run first, a few at a time, and their keys and values are kept. Responses are then made in `slots`, one
token in each at a step: a slot whose response has ended takes the next sample, with a copy of its prompt's keys and
values, so that a batch of long and short responses costs about the sum of their lengths. Samples of one prompt share
its forward pass. All of it is one compiled program.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from instructax.model import Cache, Transformer, head_kernel, init_cache, layers_of, positions_of
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
class _Slots:
    """What is under way, S responses at a time, and what has been made of all N samples."""

    cache: Cache  # of S rows: P columns of the prompt, then those of the response
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
    groups: int = 1,
) -> Rollouts:
    """Samples up to `length` tokens after each prompt.

    `prompts` [M, P]; `keys` key[N], one for each sample, so that a sample depends neither on its neighbours nor on its
    slot; N is a multiple of M, and sample i is of prompt i // (N / M). Token t uses fold_in(key, t). A row ends with
    `eos_id`, which belongs to the response; columns after it are masked and hold `eos_id`. `groups`: how many devices
    share rows; each has slots for its own share of the prompts. Returns Rollouts of N rows with R = `length`.
    """
    sample = partial(_generate, model, params, length=length, temperature=temperature, eos_id=eos_id)
    prompts = jax.tree.map(jnp.asarray, prompts)  # NumPy's are not indexed by what is traced
    if groups == 1:
        return sample(prompts, keys, axis=None)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (prompts, keys))
    rollouts = jax.vmap(partial(sample, axis="groups"), axis_name="groups")(*split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


def _generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    temperature: Array | float,
    eos_id: int,
    axis: str | None,
) -> Rollouts:
    """One group's samples. Where there are several, all of them loop until the last has ended."""
    count, share = keys.shape[0], keys.shape[0] // prompts.tokens.shape[0]
    slots, columns, room = min(model.compute.slots, count), prompts.tokens.shape[1], max(length - 1, 1)
    kernel, layers = head_kernel(model.config, params), layers_of(params["blocks"])
    temperature = jnp.asarray(temperature, jnp.float32)
    prompt_lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)
    prompt_hidden, prompt_keys, prompt_values = _prefilled(model, params, prompts, slots)

    def anywhere(flag: Array) -> Array:
        return flag if axis is None else jax.lax.pmax(flag.astype(jnp.int32), axis) > 0

    def waits(s: _Slots) -> Array:
        """Whether there is a slot for the next sample."""
        return jnp.any(s.sample == count) & (s.next < count)

    def take(s: _Slots) -> _Slots:
        """Gives the next sample to the first idle slot; nothing, if there is none of either."""
        slot = jnp.where(waits(s), jnp.argmax(s.sample == count), slots)
        prompt = jnp.minimum(s.next // share, prompts.tokens.shape[0] - 1)

        def put(all_: Array, one: Array | int) -> Array:
            return all_.at[slot].set(one, mode="drop")

        def copied(cached: tuple[Array, ...], filled: tuple[Array, ...]) -> tuple[Array, ...]:
            pairs = zip(cached, filled, strict=True)
            return tuple(all_.at[slot, :, :columns].set(one[prompt], mode="drop") for all_, one in pairs)

        segments = jnp.pad(prompts.mask[prompt].astype(jnp.int32), (0, room))
        cache = Cache(
            keys=copied(s.cache.keys, prompt_keys),
            values=copied(s.cache.values, prompt_values),
            segments=put(s.cache.segments, segments),
            filled=put(s.cache.filled, columns),
        )
        taken = waits(s).astype(jnp.int32)
        return dataclasses.replace(
            s,
            cache=cache,
            hidden=put(s.hidden, prompt_hidden[prompt]),
            sample=put(s.sample, s.next),
            column=put(s.column, 0),
            next=s.next + taken,
        )

    def draw(s: _Slots) -> _Slots:
        """Fills idle slots, and adds a token to every response under way."""
        s = jax.lax.while_loop(lambda s: anywhere(waits(s)), take, s)
        token_keys = jax.vmap(jax.random.fold_in)(keys[jnp.minimum(s.sample, count - 1)], s.column)
        tokens, logprobs = sample_token(logits_of(s.hidden, kernel), token_keys, temperature)
        over = (tokens == eos_id) | (s.column + 1 == length)
        return dataclasses.replace(
            s,
            sample=jnp.where(over, count, s.sample),
            column=s.column + 1,
            token=tokens,
            responses=s.responses.at[s.sample, s.column].set(tokens, mode="drop"),
            mask=s.mask.at[s.sample, s.column].set(True, mode="drop"),
            logprobs=s.logprobs.at[s.sample, s.column].set(logprobs, mode="drop"),
            ended=s.ended.at[s.sample].set(tokens == eos_id, mode="drop"),
        )

    def step(s: _Slots) -> _Slots:
        active = s.sample < count
        prompt = jnp.minimum(s.sample // share, prompts.tokens.shape[0] - 1)
        positions = jnp.where(active, prompt_lengths[prompt] + s.column - 1, 0)
        outputs: Any = model.apply(
            {"params": params},
            s.token[:, None],
            active[:, None].astype(jnp.int32),
            positions[:, None],
            cache=s.cache,
            layers=layers,
        )
        return draw(dataclasses.replace(s, cache=outputs[1], hidden=outputs[0][:, 0]))

    blank = init_cache(model.config, model.compute, slots, columns + room)
    start = _Slots(
        cache=dataclasses.replace(blank, filled=jnp.full((slots,), columns, jnp.int32)),
        hidden=jnp.zeros((slots, model.config.width), prompt_hidden.dtype),
        sample=jnp.full((slots,), count, jnp.int32),
        column=jnp.zeros((slots,), jnp.int32),
        token=jnp.zeros((slots,), jnp.int32),
        next=jnp.int32(0),
        responses=jnp.full((count, length), eos_id, jnp.int32),
        mask=jnp.zeros((count, length), bool),
        logprobs=jnp.zeros((count, length), jnp.float32),
        ended=jnp.zeros((count,), bool),
    )
    end = jax.lax.while_loop(lambda s: anywhere(jnp.any(s.sample < count) | (s.next < count)), step, draw(start))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, share, axis=0), prompts)
    return Rollouts(prompts=repeated, responses=end.responses, mask=end.mask, logprobs=end.logprobs, ended=end.ended)


def _prefilled(
    model: Transformer, params: Params, prompts: Prompts, rows: int
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(hidden state after each prompt dtype[M', D], its keys and values by layer [M', kv_heads, P, head_width]), a few
    prompts at a time; M' is M, filled up with empty prompts to a multiple of `rows`."""
    count, columns = prompts.tokens.shape
    rows = min(rows, count)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, -count % rows), (0, 0))).reshape(-1, rows, columns), prompts)

    def fill(_: None, part: Prompts) -> tuple[None, Any]:
        cache = init_cache(model.config, model.compute, rows, columns)
        segments = part.mask.astype(jnp.int32)
        outputs: Any = model.apply({"params": params}, part.tokens, segments, positions_of(part.mask), cache=cache)
        return None, (outputs[0][:, -1], outputs[1].keys, outputs[1].values)

    _, filled = jax.lax.scan(fill, None, padded)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), filled)
