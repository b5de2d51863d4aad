"""What a network makes of contexts that it is not tuned on: greedy continuations, and how
likely given ones are.

The paper's public tasks are read in these two ways (appendix D): completions at temperature
0, and the log-probability of each candidate of a multiple choice. Texts come and go as
token ids; where one is cut is the caller's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructax import sharding
from instructax.config import ConfigError
from instructax.data.batches import left_pad, process_slice
from instructax.generation import generate
from instructax.models import Transformer
from instructax.models.scoring import packed_logprobs, rollout_sequences
from instructax.models.sequence_packing import map_packed_rows
from instructax.types import Array, Params, Prompts, Rollouts


class Completer:
    """Two compiled programs, each of one shape, for all parameters of one network.

    Contexts are padded on the left to `context_tokens`, candidates on the right to
    `answer_tokens`, and rows to `batch_size`, which the mesh must divide. Every process is
    called with the same contexts and gets all results.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        *,
        context_tokens: int,
        answer_tokens: int,
        batch_size: int,
        eos_id: int,
        stops: np.ndarray,
    ):
        self._mesh, self._batch_size, self._eos_id = mesh, batch_size, eos_id
        self._context_tokens, self._answer_tokens = context_tokens, answer_tokens

        def continued(params: Params, prompts: Prompts) -> Rollouts:
            keys = jax.random.split(
                jax.random.key(0), batch_size
            )  # nothing is drawn at temperature 0
            ends = {
                "length": answer_tokens,
                "eos_id": eos_id,
                "stop_token_mask": jnp.asarray(stops),
            }
            return generate(
                model,
                params,
                prompts,
                keys,
                temperature=0.0,
                groups=sharding.num_row_shards(mesh),
                **ends,
            )

        def totals(params: Params, rollouts: Rollouts) -> Array:
            logprobs = partial(packed_logprobs, model, params, temperature=1.0)
            return jnp.sum(
                map_packed_rows(logprobs, rollout_sequences(rollouts), model, mesh), axis=1
            )

        self._continued = jax.jit(continued, out_shardings=sharding.replicated(mesh))
        self._totals = jax.jit(totals, out_shardings=sharding.replicated(mesh))

    def complete(self, params: Params, contexts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The likeliest next token after each context i32[n], again and again, up to
        `answer_tokens`, one of `stops` b[V], or the end token, which is left out: i32[m]
        each. Raises ValueError for a context that is empty or does not fit."""
        prompts, answers = self._prompts(contexts), []
        for rows in self._batches(len(contexts)):
            out = jax.device_get(self._continued(params, self._put(prompts, rows)))
            for i in range(len(np.unique(rows))):
                answer = out.responses[i, : out.mask[i].sum()]
                answers.append(answer[:-1] if answer[-1] == self._eos_id else answer)
        return answers

    def candidate_logprobs(
        self, params: Params, questions: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(total_logprobs f64[N, K], lengths i64[N, K], valid b[N, K]) of N (context,
        candidates), as `choices` takes.

        A total is log p(candidate | context) = Σ log p(token | all before it) at
        temperature 1, in nats; K is the largest number of candidates. Raises ValueError for
        a context or a candidate that is empty or does not fit.
        """
        counts = np.array([len(candidates) for _, candidates in questions], int)
        valid = np.arange(counts.max(initial=0))[None, :] < counts[:, None]
        pairs = [
            (context, candidate)
            for context, candidates in questions
            for candidate in candidates
        ]
        rollouts, totals = self._rollouts(pairs), np.zeros(len(pairs))
        for rows in self._batches(len(pairs)):
            totals[rows] = jax.device_get(self._totals(params, self._put(rollouts, rows)))
        total_logprobs, lengths = np.zeros(valid.shape), np.zeros(valid.shape, int)
        total_logprobs[valid], lengths[valid] = (
            totals,
            [len(candidate) for _, candidate in pairs],
        )
        return total_logprobs, lengths, valid

    def _batches(self, count: int) -> list[np.ndarray]:
        """The rows 0 … count − 1, i64[batch_size] at a time; the last one fills what is
        left."""
        starts = range(0, count, self._batch_size)
        return [
            np.minimum(np.arange(start, start + self._batch_size), count - 1)
            for start in starts
        ]

    def _put(self, tree: Any, rows: np.ndarray) -> Any:
        own = process_slice(rows, jax.process_index(), jax.process_count())
        return sharding.shard_rows(jax.tree.map(lambda x: x[own], tree), self._mesh)

    def _prompts(self, contexts: Sequence[np.ndarray]) -> Prompts:
        _check_lengths(contexts, self._context_tokens, "context", "context_tokens")
        return left_pad(list(enumerate(contexts)), len(contexts), self._context_tokens)

    def _rollouts(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rollouts:
        """Rollouts whose responses are the candidates."""
        contexts, candidates = (
            [context for context, _ in pairs],
            [candidate for _, candidate in pairs],
        )
        _check_lengths(candidates, self._answer_tokens, "candidate", "answer_tokens")
        lengths = np.array([len(candidate) for candidate in candidates], int)
        # Any, since `types` names the jax arrays that they become.
        mask: Any = np.arange(self._answer_tokens) < lengths[:, None]
        tokens: Any = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate(candidates) if candidates else 0
        blank: Any = {
            "logprobs": np.zeros(mask.shape, np.float32),
            "ended": np.zeros(len(pairs), bool),
        }
        return Rollouts(
            prompts=self._prompts(contexts), responses=tokens, mask=mask, **blank
        )


def _check_lengths(texts: Sequence[np.ndarray], longest: int, kind: str, name: str) -> None:
    """Raises ValueError for a text without a token or with more than `longest`, which the
    value `name` sets."""
    for text in texts:
        if not 1 <= len(text) <= longest:
            raise ConfigError(
                f"a {kind} has {len(text)} tokens; between 1 and {longest} are possible: change it, or {name}"
            )
