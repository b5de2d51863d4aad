"""Sampling and scoring: one model code for both, at one temperature, without dropout.

`generate` fills a cache with the left-padded prompts and then adds one column a step, until every row has ended. The
scorers run the same parameters over prompt and response at once; sampled and scored log-probabilities agree up to
rounding, and nothing is ever turned into text on the way.
"""

from typing import Any

import jax
import jax.numpy as jnp

from instructax.model import SHARED, Cache, Dropout, Transformer, head_kernel, init_cache, positions_of
from instructax.types import Array, Comparisons, LmBatch, Params, Prompts, Rollouts, pytree
from instructax.vocabulary import logits_of, sequence_logprobs, sequence_logprobs_and_entropy


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
class _Decoding:
    """State of the sampling loop after `column` response tokens."""

    column: Array  # i32[]
    cache: Cache
    responses: Array  # i32[B, R]
    mask: Array  # b[B, R]
    logprobs: Array  # f32[B, R]
    ended: Array  # b[B]


def generate(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    keys: Array,
    *,
    length: int,
    temperature: Array | float,
    eos_id: int,
) -> Rollouts:
    """Samples up to `length` tokens after each prompt.

    `prompts` [B, P]; `keys` key[B], one for each sample, so that a sample depends neither on its neighbours nor on its
    row; token t uses fold_in(key, t). A row ends with `eos_id`, which belongs to the response; columns after it are
    masked and hold `eos_id`. Returns Rollouts with R = `length`.
    """
    batch, prompt_length = prompts.tokens.shape
    kernel = head_kernel(model.config, params)
    temperature = jnp.asarray(temperature, jnp.float32)
    prompt_lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)

    def forward(tokens: Array, real: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        outputs: Any = model.apply({"params": params}, tokens, real.astype(jnp.int32), positions, cache=cache)
        return outputs[0][:, -1], outputs[1]

    def add_token(s: _Decoding, hidden: Array, cache: Cache) -> _Decoding:
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, s.column)
        tokens, logprobs = sample_token(logits_of(hidden, kernel), token_keys, temperature)
        real = ~s.ended
        tokens = jnp.where(real, tokens, eos_id)
        return _Decoding(
            column=s.column + 1,
            cache=cache,
            responses=s.responses.at[:, s.column].set(tokens),
            mask=s.mask.at[:, s.column].set(real),
            logprobs=s.logprobs.at[:, s.column].set(jnp.where(real, logprobs, 0.0)),
            ended=s.ended | (tokens == eos_id),
        )

    def step(s: _Decoding) -> _Decoding:
        last = s.column - 1
        tokens, real = (jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1) for x in (s.responses, s.mask))
        return add_token(s, *forward(tokens, real, (prompt_lengths + last)[:, None], s.cache))

    blank = _Decoding(
        column=jnp.int32(0),
        cache=init_cache(model.config, model.compute, batch, prompt_length + length - 1),
        responses=jnp.full((batch, length), eos_id, jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        ended=jnp.zeros((batch,), bool),
    )
    start = add_token(blank, *forward(prompts.tokens, prompts.mask, positions_of(prompts.mask), blank.cache))
    end = jax.lax.while_loop(lambda s: (s.column < length) & ~jnp.all(s.ended), step, start)
    return Rollouts(prompts=prompts, responses=end.responses, mask=end.mask, logprobs=end.logprobs, ended=end.ended)


def _forward(model: Transformer, params: Params, prompts: Prompts, responses: Array, mask: Array) -> Array:
    """Outputs of the network over prompt and response, from the prompt's last column on: [B, R + 1, ...].

    Entry t stands before response token t, entry t + 1 after it.
    """
    tokens = jnp.concatenate([prompts.tokens, responses], axis=1)
    real = jnp.concatenate([prompts.mask, mask], axis=1)
    outputs, _ = model.apply({"params": params}, tokens, real.astype(jnp.int32), positions_of(real))
    return outputs[:, prompts.tokens.shape[1] - 1 :]


def token_logprobs(model: Transformer, params: Params, rollouts: Rollouts, *, temperature: Array | float) -> Array:
    """Log-probability of each response token given all before it, at `temperature`: f32[B, R], zero where masked."""
    hidden = _forward(model, params, rollouts.prompts, rollouts.responses, rollouts.mask)[:, :-1]
    kernel = head_kernel(model.config, params)
    chunk = model.compute.head_chunk
    logprobs = sequence_logprobs(hidden, kernel, rollouts.responses, temperature=temperature, chunk=chunk)
    return jnp.where(rollouts.mask, logprobs, 0.0)


def token_logprobs_and_entropy(
    model: Transformer, params: Params, rollouts: Rollouts, *, temperature: Array | float
) -> tuple[Array, Array]:
    """As `token_logprobs`, and the policy's entropy in nats before each token; both f32[B, R], zero where masked."""
    hidden = _forward(model, params, rollouts.prompts, rollouts.responses, rollouts.mask)[:, :-1]
    kernel = head_kernel(model.config, params)
    logprobs, entropy = sequence_logprobs_and_entropy(
        hidden, kernel, rollouts.responses, temperature=temperature, chunk=model.compute.head_chunk
    )
    return jnp.where(rollouts.mask, logprobs, 0.0), jnp.where(rollouts.mask, entropy, 0.0)


def token_values(model: Transformer, params: Params, rollouts: Rollouts) -> Array:
    """The value network's estimate before each response token: f32[B, R], zero where masked."""
    outputs = _forward(model, params, rollouts.prompts, rollouts.responses, rollouts.mask)[:, :-1]
    return jnp.where(rollouts.mask, outputs, 0.0)


def sequence_scores(model: Transformer, params: Params, responses: Comparisons | Rollouts) -> Array:
    """The scalar head's output at the last real token: f32[B] for Rollouts, f32[B, K] for Comparisons.

    A response without any real token is scored at the prompt's last token.
    """
    if isinstance(responses, Comparisons):
        return _scores_behind_one_prompt(model, params, responses)
    outputs = _forward(model, params, responses.prompts, responses.responses, responses.mask)
    columns = jnp.arange(responses.mask.shape[1]) + 1
    last = jnp.max(jnp.where(responses.mask, columns[None, :], 0), axis=1)
    return jnp.take_along_axis(outputs, last[:, None], axis=1)[:, 0]


def _scores_behind_one_prompt(model: Transformer, params: Params, responses: Comparisons) -> Array:
    """Scores f32[B, K] from one row for each prompt: the prompt once, then its K responses, which see the prompt and
    themselves, at the positions that each would have alone."""
    prompts, (batch, count, length) = responses.prompts, responses.responses.shape
    lengths, numbers = jnp.sum(responses.mask, axis=2, dtype=jnp.int32), jnp.arange(count, dtype=jnp.int32)
    own_segments = jnp.where(responses.mask, numbers[None, :, None] + 1, 0)
    own_positions = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)[:, None, None] + jnp.arange(length)[None, None, :]
    own_positions = jnp.broadcast_to(own_positions, responses.mask.shape)

    def joined(of_prompts: Array, of_responses: Array) -> Array:
        return jnp.concatenate([of_prompts, of_responses.reshape(batch, -1)], axis=1)

    outputs, _ = model.apply(
        {"params": params},
        joined(prompts.tokens, responses.responses),
        joined(jnp.where(prompts.mask, SHARED, 0), own_segments),
        joined(positions_of(prompts.mask), own_positions),
    )
    start = prompts.tokens.shape[1]
    last = jnp.where(lengths > 0, start + numbers[None, :] * length + lengths, start) - 1
    return jnp.take_along_axis(outputs, last, axis=1)


def row_logprobs(model: Transformer, params: Params, batch: LmBatch, *, dropout: Dropout | None = None) -> Array:
    """Log-probability of each token of packed rows given its segment so far: LmBatch [B, T] → f32[B, T].

    Zero in column 0, which nothing predicts; the other tokens that open a segment get a value that no loss mask marks.
    """
    hidden, _ = model.apply({"params": params}, batch.tokens, batch.segments, batch.positions, dropout=dropout)
    kernel = head_kernel(model.config, params)
    chunk = model.compute.head_chunk
    logprobs = sequence_logprobs(hidden[:, :-1], kernel, batch.tokens[:, 1:], temperature=1.0, chunk=chunk)
    return jnp.pad(logprobs, ((0, 0), (1, 0)))
