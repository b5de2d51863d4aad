"""Sampling: one model code with the scorers, at one temperature, without dropout.

The prompts are run first, and their keys and values are kept (`prefill`); then responses
are drawn side by side, a token of each at a step (`slots`). `generate` is all of it in one
compiled program; `start_sampling` and `advance_sampling` are the same loop in pieces, for
whoever shows a sample while it is drawn, and what is drawn does not depend on the pieces.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from instructax.generation.decoding import SampleBatch, Sampler, Slots
from instructax.generation.prefill import filled, prefilled
from instructax.models import (
    Transformer,
    cast_matrices,
    decoding_config,
    head_kernel,
    layers_of,
)
from instructax.types import Array, Params, Prompts, Rollouts, pytree


@pytree
class SamplingState:
    """Samples that are being drawn; `advance_sampling` goes on with them."""

    draws: SampleBatch
    slots: Slots

    @property
    def rollouts(self) -> Rollouts:
        """What has been drawn so far: N rows, `ended` only where the end token, or a stop,
        has been."""
        count, s = len(self.draws.keys) // len(self.draws.prompts.tokens), self.slots
        prompts = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self.draws.prompts)
        return Rollouts(
            prompts=prompts,
            responses=s.responses,
            mask=s.mask,
            logprobs=s.logprobs,
            ended=s.ended,
        )


def start_sampling(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    max_new_tokens: Array,
    temperature: Array,
    eos_id: int,
    stop_token_mask: Array | None = None,
) -> SamplingState:
    """Runs the prompts, and draws the first token of as many samples as there are slots.

    As `generate` on one device, but each sample has a temperature of its own, f32[N], and
    its own number of tokens that it may have, `max_new_tokens` i32[N], from 1 to `length`.
    """
    network = _network(model, params)
    draws = SampleBatch(
        prompts=prompts,
        prefilled=prefilled(network["model"], network["params"], prompts),
        keys=keys,
        wanted=filled(prompts) * (len(keys) // len(prompts.tokens)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    sampler = Sampler(
        **network,
        draws=draws,
        eos_id=eos_id,
        stop_token_mask=_stops(model, stop_token_mask),
    )
    return SamplingState(draws=draws, slots=sampler.begin(length))


def advance_sampling(
    model: Transformer,
    params: Params,
    sampling: SamplingState,
    *,
    steps: Array | None = None,
    eos_id: int,
    stop_token_mask: Array | None = None,
) -> SamplingState:
    """Draws up to `steps` i32[] further tokens of each sample under way, by default all;
    `eos_id` and `stop_token_mask` as in `start_sampling`."""
    sampler = Sampler(
        **_network(model, params),
        draws=sampling.draws,
        eos_id=eos_id,
        stop_token_mask=_stops(model, stop_token_mask),
    )
    return dataclasses.replace(sampling, slots=sampler.advance(sampling.slots, steps))


def generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    temperature: Array | float,
    eos_id: int,
    stop_token_mask: Array | None = None,
    groups: int = 1,
) -> Rollouts:
    """Samples up to `length` tokens after each prompt.

    `prompts` [M, P]; `keys` key[N], one for each sample, so that a sample depends neither
    on its neighbours nor on its slot; N is a multiple of M, and sample i is of prompt i //
    (N / M). Token t uses fold_in(key, t). A row ends with `eos_id`, or with one of `stop_token_mask`
    b[V] if they are given, which belongs to the response; columns after it are masked and
    hold `eos_id`. Nothing is sampled after prompts without a token that come last in a
    share of the rows. `groups`: how many devices share rows; each has slots for its own
    share of the prompts. Returns Rollouts of N rows with R = `length`.
    """
    ends = {"eos_id": eos_id, "stop_token_mask": stop_token_mask}

    def sample(prompts: Prompts, keys: Array) -> Rollouts:
        max_new_tokens = jnp.full((len(keys),), length, jnp.int32)
        temperatures = jnp.full((len(keys),), temperature, jnp.float32)
        begun = start_sampling(
            model,
            params,
            prompts,
            keys,
            length=length,
            max_new_tokens=max_new_tokens,
            temperature=temperatures,
            **ends,
        )
        return advance_sampling(model, params, begun, **ends).rollouts

    prompts = jax.tree.map(
        jnp.asarray, prompts
    )  # NumPy's are not indexed by what is traced
    if groups == 1:
        return sample(prompts, keys)
    split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (prompts, keys))
    rollouts = jax.vmap(sample)(*split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


def _network(model: Transformer, params: Params) -> dict[str, Any]:
    """The network as it samples, and its parameters in the dtypes that it uses them in:
    fields of `Sampler`."""
    model = model.clone(compute=decoding_config(model.compute))
    head = head_kernel(model.config, params).astype(model.compute.matmul_dtype)
    params = cast_matrices(params, model.compute)
    return {
        "model": model,
        "params": params,
        "head": head,
        "layers": layers_of(params["blocks"]),
    }


def _stops(model: Transformer, stop_token_mask: Array | None) -> Array:
    return (
        jnp.zeros((model.config.vocab_size,), bool)
        if stop_token_mask is None
        else stop_token_mask
    )
