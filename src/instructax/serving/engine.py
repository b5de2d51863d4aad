"""Sampling and scoring of single requests on a fixed set of compiled programs.

Lengths are padded to powers of two and batches to one row or all rows, so that few programs
are compiled. Padding does not change results: a sample depends only on its prompt, seed,
sample index and temperature. Samples are drawn in chunks of about `CHUNK_SECONDS`, so that
they can be streamed and cancelled; chunking does not change them either.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from instructax import rng
from instructax.config import require
from instructax.data.batches import left_pad
from instructax.generation.sampler import SamplingState, advance_sampling, start_sampling
from instructax.generation.token_sampling import float32_temperature
from instructax.models.logprobs import sequence_logprobs_and_greedy, top_logprobs
from instructax.models.ops import materialize
from instructax.models.transformer import Transformer, head_kernel
from instructax.types import Array, Params, Prompts

# Columns of the narrowest compiled program; shorter inputs are padded to it.
MIN_LENGTH = 16

# Seconds that one chunk should take; the number of steps per chunk adapts to it.
CHUNK_SECONDS = 0.1

# Most tokens per chunk; bounds how long a cancelled request keeps running.
MAX_CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One sample to draw. Samples of one prompt and seed differ by `sample_index`."""

    # i32[n], n >= 1
    prompt: np.ndarray
    seed: int
    sample_index: int
    # 0 = greedy.
    temperature: float
    # The sample ends after so many tokens, or earlier with its end token.
    max_new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next tokens of a sample."""

    # i32[m], including the end token; may be empty.
    tokens: np.ndarray
    # Whether this is the last chunk.
    done: bool
    # Whether the last token is the end token or a stop token.
    hit_eos: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A text whose tokens from `start` on are scored, each given all tokens before it."""

    # i32[n], n from 1 to the model's maximum length + 1
    tokens: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of a text i32[n] at temperature 1, in nats.

    Positions before the requested start are 0 and False. So is the first token, because
    nothing predicts it.
    """

    # f32[n], log-probability of each token.
    logprobs: np.ndarray
    # b[n], whether the token is the most likely one.
    greedy: np.ndarray
    # i32[n, K], most likely tokens at each position, best first.
    top_ids: np.ndarray
    # f32[n, K]
    top_logprobs: np.ndarray


class Engine:
    """A policy on one device that runs up to `batch_size` requests at a time.

    Not thread-safe: only one thread may call it at a time.
    """

    def __init__(self, model: Transformer, params: Params, *, eos_id: int, batch_size: int):
        # Every request has a decode slot of its own.
        compute = dataclasses.replace(model.compute, slots=batch_size)
        self._model = model.clone(compute=compute)
        self._params = params
        self.batch_size = batch_size
        self.max_length = model.config.max_length
        self.eos_id = eos_id
        self._no_stop_tokens = np.zeros((model.config.vocab_size,), bool)

        # One compiled program per padded shape, reused by all requests.
        self._start = jax.jit(
            partial(_start, self._model, eos_id=eos_id), static_argnames="length"
        )
        self._advance = jax.jit(
            partial(advance_sampling, self._model, eos_id=eos_id),
            donate_argnames="sampling",
        )
        self._score = jax.jit(partial(_score, self._model), static_argnames="top")

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raises ConfigError unless prompt and completion fit the model's context."""
        room = self.max_length - max_new_tokens
        require(
            room > 0,
            f"max_new_tokens = {max_new_tokens} must be below the model's "
            f"{self.max_length} tokens",
        )
        require(
            0 < prompt_tokens <= room,
            f"the prompt has {prompt_tokens} tokens; between 1 and {room} are possible",
        )

    def stream(
        self, requests: Sequence[SampleRequest], stop_token_mask: np.ndarray | None = None
    ) -> Iterator[list[Chunk]]:
        """Draws up to `batch_size` samples side by side.

        Args:
          requests: the samples to draw.
          stop_token_mask: tokens that end a sample as the end token does, b[V].

        Yields:
          The next chunk of every sample, until all samples are done. A sample that is
          already done yields empty chunks.

        Raises:
          ConfigError: a prompt does not fit.
        """
        for request in requests:
            self.check_fits(len(request.prompt), request.max_new_tokens)
        if stop_token_mask is None:
            stop_token_mask = self._no_stop_tokens

        # The first token of each sample is drawn with the prompts.
        sampling = self._start_batch(requests, stop_token_mask)
        num_sent = [0] * len(requests)
        # Decoding steps of the next chunk.
        steps = 1
        while True:
            chunks = _read_chunks(sampling, requests, num_sent)
            for row, chunk in enumerate(chunks):
                num_sent[row] += len(chunk.tokens)
            yield chunks
            if all(chunk.done for chunk in chunks):
                return

            # Double the steps while a chunk is faster than wanted, halve them otherwise.
            started = time.perf_counter()
            sampling = self._advance(
                self._params,
                sampling=sampling,
                steps=jnp.int32(steps),
                stop_token_mask=stop_token_mask,
            )
            # Dispatch is asynchronous: wait, so that the time is that of the steps.
            jax.block_until_ready(sampling.slots.num_tokens)
            if time.perf_counter() - started < CHUNK_SECONDS:
                steps = min(steps * 2, MAX_CHUNK_TOKENS)
            else:
                steps = max(steps // 2, 1)

    def _start_batch(
        self, requests: Sequence[SampleRequest], stop_token_mask: np.ndarray
    ) -> SamplingState:
        """Prefills the prompts and draws the first token of each sample."""
        rows = self._padded_rows(len(requests))
        # Unused rows have an empty prompt and are done after one token.
        seeds = np.zeros((rows,), np.int32)
        sample_indices = np.zeros((rows,), np.int32)
        temperatures = np.zeros((rows,), np.float32)
        max_new_tokens = np.ones((rows,), np.int32)
        for row, request in enumerate(requests):
            seeds[row] = request.seed
            sample_indices[row] = request.sample_index
            temperatures[row] = float32_temperature(request.temperature)
            max_new_tokens[row] = request.max_new_tokens

        prompts = [(row, request.prompt) for row, request in enumerate(requests)]
        width = self._padded_length(max(len(request.prompt) for request in requests))
        return self._start(
            self._params,
            left_pad(prompts, rows, width),
            seeds,
            sample_indices,
            length=self._padded_length(int(max_new_tokens.max())),
            max_new_tokens=max_new_tokens,
            temperature=temperatures,
            stop_token_mask=stop_token_mask,
        )

    def check_score(self, tokens: int) -> None:
        """Raises ConfigError unless a text of `tokens` tokens can be scored."""
        require(
            0 < tokens <= self.max_length + 1,
            f"a text of {tokens} tokens cannot be scored: from 1 to {self.max_length + 1} "
            "are possible",
        )

    def score(self, requests: Sequence[ScoreRequest], top: int = 0) -> list[TokenScores]:
        """Scores texts, and the `top` most likely tokens at each of their positions.

        A text has at most one token more than the model's maximum length, because its last
        token is only predicted. Raises ConfigError for a longer or an empty one.
        """
        # Batches of similar lengths need the least padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].tokens))
        scores: dict[int, TokenScores] = {}
        for first in range(0, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            batch = self._score_batch([requests[i] for i in indices], top)
            scores.update(zip(indices, batch, strict=True))
        return [scores[i] for i in range(len(requests))]

    def _score_batch(self, requests: Sequence[ScoreRequest], top: int) -> list[TokenScores]:
        for request in requests:
            self.check_score(len(request.tokens))
        longest = max(len(request.tokens) for request in requests)

        # Right-padded texts [B, T + 1]; the network reads the first T tokens.
        rows = self._padded_rows(len(requests))
        width = self._padded_length(max(longest - 1, 1))
        tokens = np.zeros((rows, width + 1), np.int32)
        lengths = np.zeros((rows,), np.int32)
        starts = np.ones((rows,), np.int32)
        for row, request in enumerate(requests):
            tokens[row, : len(request.tokens)] = request.tokens
            lengths[row] = len(request.tokens)
            # Nothing predicts token 0.
            starts[row] = max(request.start, 1)

        arrays = jax.device_get(self._score(self._params, tokens, lengths, starts, top=top))
        # Remove the padding again.
        scores = []
        for row, request in enumerate(requests):
            length = len(request.tokens)
            scores.append(
                TokenScores(
                    logprobs=arrays["logprobs"][row, :length],
                    greedy=arrays["greedy"][row, :length],
                    top_ids=arrays["top_ids"][row, :length],
                    top_logprobs=arrays["top_logprobs"][row, :length],
                )
            )
        return scores

    def _padded_rows(self, count: int) -> int:
        """One row for a single request, else all rows."""
        require(
            count <= self.batch_size,
            f"{count} requests at a time are more than {self.batch_size}",
        )
        return 1 if count == 1 else self.batch_size

    def _padded_length(self, longest: int) -> int:
        """The next power of two, within `MIN_LENGTH` and the model's maximum length."""
        power_of_two = 1 << (longest - 1).bit_length()
        return min(self.max_length, max(MIN_LENGTH, power_of_two))


def _read_chunks(
    sampling: SamplingState, requests: Sequence[SampleRequest], num_sent: Sequence[int]
) -> list[Chunk]:
    """The tokens of each sample after the first `num_sent`, copied to the host."""
    slots = sampling.slots
    # Responses and mask [B, R], ended [B].
    responses, mask, ended = jax.device_get((slots.responses, slots.mask, slots.ended))
    # [B]
    num_sampled = mask.sum(axis=1)
    chunks = []
    for row, request in enumerate(requests):
        hit_eos = bool(ended[row])
        full = bool(num_sampled[row] >= request.max_new_tokens)
        tokens = responses[row, num_sent[row] : num_sampled[row]]
        chunks.append(Chunk(tokens=tokens, done=hit_eos or full, hit_eos=hit_eos))
    return chunks


def _start(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    sample_indices: Array,
    *,
    length: int,
    max_new_tokens: Array,
    temperature: Array,
    eos_id: int,
    stop_token_mask: Array,
) -> SamplingState:
    """Starts sampling with one random key per (seed, sample index), both i32[N]."""
    prompts = jax.tree.map(jnp.asarray, prompts)
    # key[N] by seed, then key[N] by seed and sample index.
    step_keys = jax.vmap(partial(rng.step_key, purpose="evaluate", step=0))(seeds)
    keys = jax.vmap(jax.random.fold_in)(step_keys, sample_indices)
    return start_sampling(
        model,
        params,
        prompts,
        keys,
        length=length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_id=eos_id,
        stop_token_mask=stop_token_mask,
    )


def _score(
    model: Transformer,
    params: Params,
    tokens: Array,
    lengths: Array,
    starts: Array,
    *,
    top: int,
) -> dict[str, Array]:
    """Computes the fields of `TokenScores`.

    Args:
      model: the network.
      params: its parameters.
      tokens: right-padded texts, i32[B, T + 1].
      lengths: number of tokens of each text, i32[B].
      starts: first token of each text to score, i32[B].
      top: number of most likely tokens to return for each position.

    Returns:
      Arrays [B, T + 1] and [B, T + 1, top] by field name.
    """
    # Column t of the logits predicts token t + 1: everything below is [B, T].
    targets = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None, :]
    real = targets < lengths[:, None]
    positions = jnp.where(real, targets - 1, 0)
    # Segment 1 for tokens, 0 for padding. hidden: [B, T, D]
    hidden, _ = model.apply(
        {"params": params}, tokens[:, :-1], real.astype(jnp.int32), positions
    )
    hidden = materialize(hidden)
    kernel = head_kernel(model.config, params)

    # The head runs in chunks of positions, so that no [B, T, V] array exists.
    chunk = model.compute.head_chunk
    cap = model.config.final_logit_softcap
    mask = real & (targets >= starts[:, None])
    logprobs, greedy = sequence_logprobs_and_greedy(
        hidden, kernel, tokens[:, 1:], mask, chunk=chunk, cap=cap
    )
    scores = {"logprobs": logprobs, "greedy": greedy}
    # [B, T, top]
    if top:
        scores["top_logprobs"], scores["top_ids"] = top_logprobs(
            hidden, kernel, count=top, chunk=chunk, cap=cap
        )
    else:
        scores["top_logprobs"] = jnp.zeros((*mask.shape, 0))
        scores["top_ids"] = jnp.zeros((*mask.shape, 0), jnp.int32)
    return jax.tree.map(_shift_right, scores)


def _shift_right(x: Array) -> Array:
    """Adds a zero column for the first token, which nothing predicts: [B, T, ...] →
    [B, T + 1, ...]."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (1, 0)
    return jnp.pad(x, padding)
