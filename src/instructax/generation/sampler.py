"""Samples responses with the same model code that scores them, without dropout.

`generate` samples a whole batch in one compiled program: prefill, then decoding.
`start_sampling` and `advance_sampling` run the same loop piece by piece, for streaming. A
sample depends only on its prompt and its key, not on batch composition or streaming.
"""

import dataclasses

import jax
import jax.numpy as jnp

from instructax.generation.decoding import (
    Decoder,
    DecodeSlots,
    DecodingNetwork,
    SampleBatch,
)
from instructax.generation.prefill import count_prompts, prefill
from instructax.models.config import decoding_config
from instructax.models.transformer import (
    Transformer,
    cast_matrices,
    head_kernel,
    unstack_layers,
)
from instructax.types import Array, Params, Prompts, Rollouts, pytree


@pytree
class SamplingState:
    """A batch of samples in progress; `advance_sampling` continues it."""

    batch: SampleBatch
    slots: DecodeSlots

    @property
    def rollouts(self) -> Rollouts:
        """The N samples so far; `ended` is True only once the end token or a stop token was
        drawn."""
        # [M, P] → [N, P]
        samples_per_prompt = len(self.batch.keys) // len(self.batch.prompts.tokens)
        prompts = jax.tree.map(
            lambda x: jnp.repeat(x, samples_per_prompt, axis=0), self.batch.prompts
        )
        return Rollouts(
            prompts=prompts,
            responses=self.slots.responses,
            mask=self.slots.mask,
            logprobs=self.slots.logprobs,
            ended=self.slots.ended,
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
    """Runs the prompts and draws the first token of as many samples as there are slots.

    Like `generate` on one device, except for per-sample limits and temperatures.

    Args:
      model: the policy.
      params: its parameters.
      prompts: [M, P].
      keys: key[N], one per sample.
      length: R, the largest response length.
      max_new_tokens: i32[N], tokens each sample may have, from 1 to `length`.
      temperature: f32[N].
      eos_id: the end token.
      stop_token_mask: b[V], further tokens that end a response.

    Returns:
      The state to pass to `advance_sampling`.
    """
    network = _decoding_network(model, params)
    batch = SampleBatch(
        prompts=prompts,
        prefilled=prefill(network.model, network.params, prompts),
        keys=keys,
        num_samples=count_prompts(prompts) * (len(keys) // len(prompts.tokens)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    decoder = Decoder(
        network=network,
        batch=batch,
        eos_id=eos_id,
        stop_token_mask=_mask_or_empty(stop_token_mask, model.config.vocab_size),
    )
    return SamplingState(batch=batch, slots=decoder.start(length))


def advance_sampling(
    model: Transformer,
    params: Params,
    sampling: SamplingState,
    *,
    steps: Array | None = None,
    eos_id: int,
    stop_token_mask: Array | None = None,
) -> SamplingState:
    """Draws up to `steps` i32[] further tokens of each sample in a slot, or all tokens of
    all samples if None.

    `model`, `params`, `eos_id` and `stop_token_mask` must be those of `start_sampling`.
    """
    decoder = Decoder(
        network=_decoding_network(model, params),
        batch=sampling.batch,
        eos_id=eos_id,
        stop_token_mask=_mask_or_empty(stop_token_mask, model.config.vocab_size),
    )
    return dataclasses.replace(sampling, slots=decoder.advance(sampling.slots, steps))


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

    Prompts without a token at the end of a group are padding of the batch: nothing is
    sampled after them.

    Args:
      model: the policy.
      params: its parameters.
      prompts: [M, P].
      keys: key[N], N a multiple of M. Sample i continues prompt i // (N / M), and its token
        t is drawn with fold_in(keys[i], t), whatever the other samples are.
      length: R, the largest response length.
      temperature: of all samples; 0 takes the most likely token.
      eos_id: the end token. It belongs to the response; the columns after it are masked and
        hold `eos_id` too.
      stop_token_mask: b[V], further tokens that end a response, and belong to it.
      groups: number of devices that share the batch. Each has its own prompts and slots.

    Returns:
      Rollouts of N rows.
    """

    def sample(prompts: Prompts, keys: Array) -> Rollouts:
        temperatures = jnp.full((len(keys),), temperature, jnp.float32)
        return _sample_group(
            model, params, prompts, keys, length, temperatures, eos_id, stop_token_mask
        )

    # NumPy arrays cannot be indexed with traced values.
    prompts = jax.tree.map(jnp.asarray, prompts)
    if groups == 1:
        return sample(prompts, keys)
    # [rows, ...] → [groups, rows of a group, ...] and back.
    grouped = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (prompts, keys))
    rollouts = jax.vmap(sample)(*grouped)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


def _sample_group(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    length: int,
    temperatures: Array,
    eos_id: int,
    stop_token_mask: Array | None,
) -> Rollouts:
    """`generate` for prompts that share one set of slots; temperatures f32[N]."""
    sampling = start_sampling(
        model,
        params,
        prompts,
        keys,
        length=length,
        max_new_tokens=jnp.full((len(keys),), length, jnp.int32),
        temperature=temperatures,
        eos_id=eos_id,
        stop_token_mask=stop_token_mask,
    )
    sampling = advance_sampling(
        model, params, sampling, eos_id=eos_id, stop_token_mask=stop_token_mask
    )
    return sampling.rollouts


def _decoding_network(model: Transformer, params: Params) -> DecodingNetwork:
    # The head is cast on its own: a tied embedding has another dtype as an input table.
    model = model.clone(compute=decoding_config(model.compute))
    head = head_kernel(model.config, params).astype(model.compute.matmul_dtype)
    params = cast_matrices(params, model.compute)
    return DecodingNetwork(
        model=model, params=params, head=head, layers=unstack_layers(params["blocks"])
    )


def _mask_or_empty(stop_token_mask: Array | None, vocab_size: int) -> Array:
    """The mask, or one that marks no token."""
    if stop_token_mask is None:
        return jnp.zeros((vocab_size,), bool)
    return stop_token_mask
