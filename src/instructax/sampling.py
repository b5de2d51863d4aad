"""Sampling: one model code with the scorers, at one temperature, without dropout.

The prompts are run first, a few at a time, and their keys and values are kept. Responses are then made in `slots`, one
token in each at a step: a slot whose response has ended takes the next sample, with a copy of its prompt's keys and
values, so that a batch of long and short responses costs about the sum of their lengths. Samples of one prompt share
its forward pass. `generate` is all of it in one compiled program; `start` and `advance` are the same loop in pieces,
for whoever shows a sample while it is drawn, and what is drawn does not depend on the pieces.
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
from instructax.types import Array, Params, Prompts, Rollouts, pytree
from instructax.vocabulary import logits_of


def sample_token(logits: Array, keys: Array, temperature: Array) -> tuple[Array, Array]:
    """One token for each row, and its log-probability: f32[B, V], key[B], f32[] or f32[B] → (i32[B], f32[B]).

    The inverse of the cumulative distribution at one uniform number a row: a vocabulary of Gumbel noise costs a
    quarter of a decoding step on a CPU. Probabilities below 2⁻²⁴ are beyond the resolution of the uniform number and
    of the running sum; a token whose probability is zero is never drawn.
    Temperature 0 takes the likeliest token and reports its log-probability at temperature 1.
    """
    divisors = jnp.reshape(jnp.where(temperature > 0, temperature, 1.0), (-1, 1))
    logprobs = jax.nn.log_softmax(logits / divisors, axis=-1)
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


@pytree
class Sampling:
    """N samples that are being drawn; `advance` goes on with them."""

    prompts: Prompts  # [M, P]
    prefilled: tuple[Array, tuple[Array, ...], tuple[Array, ...]]  # of `_prefilled`
    keys: Array  # key[N]
    temperature: Array  # f32[N]
    limits: Array  # i32[N]
    slots: _Slots

    @property
    def rollouts(self) -> Rollouts:
        """What has been drawn so far: N rows, `ended` only where the end token, or a stop, has been."""
        count, s = len(self.keys) // len(self.prompts.tokens), self.slots
        prompts = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self.prompts)
        return Rollouts(prompts=prompts, responses=s.responses, mask=s.mask, logprobs=s.logprobs, ended=s.ended)


def start(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    limits: Array,
    temperature: Array,
    eos_id: int,
    stops: Array | None = None,
) -> Sampling:
    """Runs the prompts, and draws the first token of as many samples as there are slots.

    As `generate` on one device, but each sample has a temperature of its own, f32[N], and its own number of tokens that
    it may have, `limits` i32[N], from 1 to `length`.
    """
    network = _network(model, params)
    sampler = _Sampler(
        **network,
        prompts=prompts,
        prefilled=_prefilled(network["model"], network["params"], prompts, model.compute.slots),
        keys=keys,
        length=length,
        limits=limits,
        temperature=temperature,
        eos_id=eos_id,
        stops=_no_stops(model) if stops is None else stops,
    )
    return Sampling(
        prompts=prompts,
        prefilled=sampler.prefilled,
        keys=keys,
        temperature=temperature,
        limits=limits,
        slots=sampler.begin(),
    )


def advance(
    model: Transformer,
    params: Params,
    sampling: Sampling,
    *,
    steps: Array,
    eos_id: int,
    stops: Array | None = None,
) -> Sampling:
    """Draws up to `steps` i32[] further tokens of each sample under way; `eos_id` and `stops` as in `start`."""
    sampler = _Sampler(
        **_network(model, params),
        prompts=sampling.prompts,
        prefilled=sampling.prefilled,
        keys=sampling.keys,
        length=sampling.slots.responses.shape[1],
        limits=sampling.limits,
        temperature=sampling.temperature,
        eos_id=eos_id,
        stops=_no_stops(model) if stops is None else stops,
    )
    return dataclasses.replace(sampling, slots=sampler.advance(sampling.slots, steps))


def _network(model: Transformer, params: Params) -> dict[str, Any]:
    """The network as it samples, and its parameters in the dtypes that it uses them in: fields of `_Sampler`."""
    model = model.clone(compute=while_sampling(model.compute))
    head = head_kernel(model.config, params).astype(model.compute.operands)
    params = cast_matrices(params, model.compute)
    return {"model": model, "params": params, "head": head, "layers": layers_of(params["blocks"])}


def _no_stops(model: Transformer) -> Array:
    return jnp.zeros((model.config.vocab_size,), bool)


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
    and hold `eos_id`. `groups`: how many devices share rows; each has slots for its own share of the prompts. Returns
    Rollouts of N rows with R = `length`.
    """
    prompts = jax.tree.map(jnp.asarray, prompts)  # NumPy's are not indexed by what is traced
    network = _network(model, params)

    def sample(prompts: Prompts, keys: Array) -> Rollouts:
        sampler = _Sampler(
            **network,
            prompts=prompts,
            prefilled=_prefilled(network["model"], network["params"], prompts, model.compute.slots),
            keys=keys,
            length=length,
            limits=jnp.full((len(keys),), length, jnp.int32),
            temperature=jnp.full((len(keys),), temperature, jnp.float32),
            eos_id=eos_id,
            stops=_no_stops(model) if stops is None else stops,
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
    prefilled: tuple[Array, tuple[Array, ...], tuple[Array, ...]]  # of `_prefilled`
    keys: Array  # key[N]
    length: int
    limits: Array  # i32[N], ≤ length
    temperature: Array  # f32[N]
    eos_id: int
    stops: Array  # b[V]

    def run(self) -> Rollouts:
        count = len(self.keys)
        end = jax.lax.while_loop(self._goes_on, self._step, self.begin())
        prompts = jax.tree.map(lambda x: jnp.repeat(x, count // len(self.prompts.tokens), axis=0), self.prompts)
        return Rollouts(prompts=prompts, responses=end.responses, mask=end.mask, logprobs=end.logprobs, ended=end.ended)

    def begin(self) -> _Slots:
        """The first token in every slot."""
        return self._draw(self._start())

    def advance(self, s: _Slots, steps: Array) -> _Slots:
        """Up to `steps` i32[] further tokens in every slot."""

        def goes_on(state: tuple[_Slots, Array]) -> Array:
            return self._goes_on(state[0]) & (state[1] > 0)

        return jax.lax.while_loop(goes_on, lambda state: (self._step(state[0]), state[1] - 1), (s, steps))[0]

    def _goes_on(self, s: _Slots) -> Array:
        count = len(self.keys)
        return anywhere(jnp.any(s.sample < count) | (s.next < count))

    def _start(self) -> _Slots:
        """All slots idle, nothing sampled."""
        model, count = self.model, len(self.keys)
        slots, columns = min(model.compute.slots, count), self.prompts.tokens.shape[1]
        cache = init_cache(model.config, model.compute, slots, columns + max(self.length - 1, 1))
        return _Slots(
            cache=dataclasses.replace(cache, filled=jnp.full((slots,), columns, jnp.int32)),
            hidden=jnp.zeros((slots, model.config.width), self.prefilled[0].dtype),
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
        return jnp.any(s.sample == len(self.keys)) & (s.next < len(self.keys))

    def _prompt_of(self, sample: Array) -> Array:
        """The row of its prompt; of no sample, the last one."""
        count = len(self.prompts.tokens)
        return jnp.minimum(sample // (len(self.keys) // count), count - 1)

    def _take(self, s: _Slots) -> _Slots:
        """Gives the next sample to the first idle slot; nothing, if there is none of either."""
        slot = jnp.where(self._waits(s), jnp.argmax(s.sample == len(self.keys)), len(s.sample))
        prompt, columns = self._prompt_of(s.next), self.prompts.tokens.shape[1]
        hidden, keys, values = self.prefilled

        def put(all_: Array, one: Array | int) -> Array:
            return all_.at[slot].set(one, mode="drop")

        def copied(cached: tuple[Array, ...], filled: tuple[Array, ...]) -> tuple[Array, ...]:
            pairs = zip(cached, filled, strict=True)
            return tuple(all_.at[slot, :, :columns].set(one[prompt], mode="drop") for all_, one in pairs)

        def padded(of_prompt: Array) -> Array:
            return jnp.pad(of_prompt, (0, s.cache.segments.shape[1] - columns))

        seen, positions = self.prompts.mask[prompt].astype(jnp.int32), s.cache.positions
        if positions is not None:
            positions = put(positions, padded(positions_of(self.prompts.mask[prompt])))
        return dataclasses.replace(
            s,
            cache=Cache(
                keys=copied(s.cache.keys, keys),
                values=copied(s.cache.values, values),
                segments=put(s.cache.segments, padded(seen)),
                positions=positions,
                filled=put(s.cache.filled, columns),
            ),
            hidden=put(s.hidden, hidden[prompt]),
            sample=put(s.sample, s.next),
            column=put(s.column, 0),
            next=s.next + self._waits(s).astype(jnp.int32),
        )

    def _draw(self, s: _Slots) -> _Slots:
        """Fills idle slots, and adds a token to every response under way."""
        s = jax.lax.while_loop(lambda s: anywhere(self._waits(s)), self._take, s)
        count = len(self.keys)
        own = jnp.minimum(s.sample, count - 1)
        keys = jax.vmap(jax.random.fold_in)(self.keys[own], s.column)
        logits = logits_of(s.hidden, self.head, self.model.config.logit_cap)
        tokens, logprobs = sample_token(logits, keys, self.temperature[own])
        stopped = (tokens == self.eos_id) | self.stops[tokens]
        over = stopped | (s.column + 1 == self.limits[own])
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
