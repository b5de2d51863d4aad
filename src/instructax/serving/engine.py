"""Samples and scores for whoever asks one by one: requests of any length on few compiled
programs.

Shapes are rounded up, lengths to powers of two and rows to one or all, so that few programs
are compiled, and padding changes nothing: a sample is a function of its prompt, seed,
number and temperature. It is drawn in pieces of about `PIECE_SECONDS`, so that it can be
shown or stopped on the way; the pieces change nothing either.
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
from instructax.generation import SamplingState, advance_sampling, start_sampling
from instructax.models import Transformer, head_kernel
from instructax.models.logprobs import sequence_logprobs_and_greedy, top_logprobs
from instructax.models.ops import materialize
from instructax.types import Array, Params, Prompts

SHORTEST = 16  # columns of a program, at least
PIECE_SECONDS = 0.1
MOST_STEPS = (
    64  # tokens of a piece: so soon does whoever has enough of a sample get rid of it
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """One sample that is wanted."""

    prompt: np.ndarray  # i32[n], n ≥ 1
    seed: int
    number: (
        int  # with the seed it decides the random numbers: samples of one seed differ by it
    )
    temperature: float  # 0 = the likeliest token
    limit: int  # the most tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """The next tokens of a sample."""

    tokens: np.ndarray  # i32[m], the token that ends it included
    over: bool  # no more will come
    ended: bool  # the last one is the end token, or a token that stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Of a text i32[n], at temperature 1, in nats; nothing predicts the first token: 0,
    False, and no likeliest."""

    logprobs: (
        np.ndarray
    )  # f32[n], log-probability of each token given all before it; 0 where not asked for
    greedy: np.ndarray  # b[n], whether it is the likeliest; False where not asked for
    top_ids: np.ndarray  # i32[n, K], the likeliest tokens in its place, the likeliest first
    top_logprobs: np.ndarray  # f32[n, K]


class Engine:
    """A policy on one device; `rows` requests at a time. Not to be called from two threads
    at once."""

    def __init__(self, model: Transformer, params: Params, *, eos_id: int, rows: int):
        compute = dataclasses.replace(model.compute, slots=rows)
        self._model, self._params, self.rows = model.clone(compute=compute), params, rows
        self.max_length, self.eos_id = model.config.max_length, eos_id
        ends = {"eos_id": eos_id}
        self._start = jax.jit(
            partial(_start, self._model, **ends), static_argnames="length"
        )
        self._advance = jax.jit(
            partial(advance_sampling, self._model, **ends), donate_argnames="sampling"
        )
        self._score = jax.jit(partial(_score, self._model), static_argnames="top")
        self._no_stops = np.zeros((model.config.vocab_size,), bool)

    def check(self, prompt_tokens: int, limit: int) -> None:
        """Raises ConfigError unless a prompt and so many tokens after it fit the model."""
        room = self.max_length - limit
        require(
            room > 0, f"length = {limit} must be below the model's {self.max_length} tokens"
        )
        possible = f"between 1 and {room} are possible"
        require(
            0 < prompt_tokens <= room, f"the prompt has {prompt_tokens} tokens; {possible}"
        )

    def stream(
        self, draws: Sequence[Draw], stops: np.ndarray | None = None
    ) -> Iterator[list[Piece]]:
        """Up to `rows` samples, side by side: again and again the next tokens of each,
        until all are over.

        A token of `stops` b[V] ends a sample as the end token does. Raises ConfigError for
        a prompt that does not fit.
        """
        for draw in draws:
            self.check(len(draw.prompt), draw.limit)
        stops = self._no_stops if stops is None else stops
        sampling = self._begun(draws, stops)
        sent, steps = [0] * len(draws), 1
        while True:
            slots = sampling.slots
            responses, mask, ended = jax.device_get(
                (slots.responses, slots.mask, slots.ended)
            )
            counts = mask.sum(axis=1)
            over = [
                bool(ended[i]) or counts[i] >= draw.limit for i, draw in enumerate(draws)
            ]
            yield [
                Piece(
                    tokens=responses[i, sent[i] : counts[i]],
                    over=over[i],
                    ended=bool(ended[i]),
                )
                for i in range(len(draws))
            ]
            if all(over):
                return
            sent = counts[: len(draws)].tolist()
            begun = time.perf_counter()
            sampling = self._advance(
                self._params,
                sampling=sampling,
                steps=jnp.int32(steps),
                stop_token_mask=stops,
            )
            jax.block_until_ready(sampling.slots.num_tokens)
            seconds = time.perf_counter() - begun
            steps = (
                min(steps * 2, MOST_STEPS)
                if seconds < PIECE_SECONDS
                else max(steps // 2, 1)
            )

    def _begun(self, draws: Sequence[Draw], stops: np.ndarray) -> SamplingState:
        rows = self._rows(len(draws))
        columns = self._columns(max(len(draw.prompt) for draw in draws))
        empty = (0,) * (rows - len(draws))
        # A row that nobody asked for has an empty prompt, and is over after one token.
        limits = np.array([*(draw.limit for draw in draws), *(1 for _ in empty)], np.int32)
        return self._start(
            self._params,
            left_pad([(i, draw.prompt) for i, draw in enumerate(draws)], rows, columns),
            np.array([*(draw.seed for draw in draws), *empty], np.int32),
            np.array([*(draw.number for draw in draws), *empty], np.int32),
            length=self._columns(int(limits.max())),
            limits=limits,
            temperature=np.array(
                [*(draw.temperature for draw in draws), *empty], np.float32
            ),
            stops=stops,
        )

    def score(self, texts: Sequence[tuple[np.ndarray, int]], top: int = 0) -> list[Scores]:
        """Scores of each (text i32[n], the first token to score), and of its `top`
        likeliest tokens in each place.

        n is from 1 to the model's longest text and one more, the last being predicted only.
        Raises ConfigError for another.
        """
        found: list[Scores | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
        for start_ in range(0, len(order), self.rows):
            places = order[start_ : start_ + self.rows]
            for place, scores in zip(
                places, self._scored([texts[i] for i in places], top), strict=True
            ):
                found[place] = scores
        return [scores for scores in found if scores is not None]

    def _scored(self, texts: Sequence[tuple[np.ndarray, int]], top: int) -> list[Scores]:
        longest = max(len(tokens) for tokens, _ in texts)
        shortest = min(len(tokens) for tokens, _ in texts)
        require(
            shortest > 0 and longest <= self.max_length + 1,
            f"a text of {longest if shortest else 0} tokens cannot be scored: from 1 to {self.max_length + 1} are "
            "possible",
        )
        rows, columns = self._rows(len(texts)), self._columns(max(longest - 1, 1))
        tokens = np.zeros((rows, columns + 1), np.int32)
        lengths, firsts = np.zeros((rows,), np.int32), np.ones((rows,), np.int32)
        for row, (text, first) in enumerate(texts):
            tokens[row, : len(text)], lengths[row], firsts[row] = (
                text,
                len(text),
                max(first, 1),
            )
        arrays = jax.device_get(self._score(self._params, tokens, lengths, firsts, top=top))
        return [
            Scores(**{name: array[row, : len(text)] for name, array in arrays.items()})
            for row, (text, _) in enumerate(texts)
        ]

    def _rows(self, count: int) -> int:
        require(count <= self.rows, f"{count} requests at a time are more than {self.rows}")
        return 1 if count == 1 else self.rows

    def _columns(self, longest: int) -> int:
        return min(self.max_length, max(SHORTEST, 1 << (longest - 1).bit_length()))


def _start(
    model: Transformer,
    params: Params,
    prompts: Prompts,
    seeds: Array,
    numbers: Array,
    *,
    length: int,
    limits: Array,
    temperature: Array,
    eos_id: int,
    stops: Array,
) -> SamplingState:
    """`sampling.start` with the keys of i32[N] seeds and numbers."""
    prompts = jax.tree.map(jnp.asarray, prompts)
    steps = jax.vmap(partial(rng.step_key, purpose="evaluate", step=0))(seeds)
    keys = jax.vmap(jax.random.fold_in)(steps, numbers)
    ends = {"eos_id": eos_id, "stop_token_mask": stops}
    return start_sampling(
        model,
        params,
        prompts,
        keys,
        length=length,
        max_new_tokens=limits,
        temperature=temperature,
        **ends,
    )


def _score(
    model: Transformer,
    params: Params,
    tokens: Array,
    lengths: Array,
    firsts: Array,
    *,
    top: int,
) -> dict[str, Array]:
    """Fields of `Scores` for rows [B, T + 1] of texts of `lengths`, from token `firsts` on,
    both i32[B]."""
    columns = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[
        None, :
    ]  # of what is predicted
    real = columns < lengths[:, None]
    positions = jnp.where(real, columns - 1, 0)
    hidden, _ = model.apply(
        {"params": params}, tokens[:, :-1], real.astype(jnp.int32), positions
    )
    hidden, kernel = materialize(hidden), head_kernel(model.config, params)
    how = {"chunk": model.compute.head_chunk, "cap": model.config.final_logit_softcap}
    mask = real & (columns >= firsts[:, None])
    logprobs, greedy = sequence_logprobs_and_greedy(
        hidden, kernel, tokens[:, 1:], mask, **how
    )
    blank = jnp.zeros((*mask.shape, 0))
    likeliest = (
        top_logprobs(hidden, kernel, count=top, **how)
        if top
        else (blank, blank.astype(jnp.int32))
    )

    def behind_a_blank(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (1, 0), *(((0, 0),) * (x.ndim - 2))))

    names = ("logprobs", "greedy", "top_logprobs", "top_ids")
    return dict(
        zip(names, map(behind_a_blank, (logprobs, greedy, *likeliest)), strict=True)
    )
