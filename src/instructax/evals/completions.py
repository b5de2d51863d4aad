"""Greedy completions and candidate log-probabilities, for the paper's public tasks.

The paper evaluates its public tasks in these two ways (appendix D): completions at
temperature 0, and the log-probability of each candidate of a multiple-choice question.
Inputs and outputs are token ids; the caller tokenizes.
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
from instructax.generation.sampler import generate
from instructax.models.scoring import packed_logprobs, rollout_sequences
from instructax.models.sequence_packing import map_packed_rows
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, Prompts, Rollouts


class Completer:
    """Two compiled programs of one shape each, for all parameters of one network.

    Contexts are padded on the left to `context_tokens` and candidates on the right to
    `answer_tokens`. Every process must pass the same contexts and gets all results.

    The programs are compiled at their first use.

    Args:
      model: the network.
      mesh: the device mesh.
      context_tokens: most tokens of a context.
      answer_tokens: most tokens of a completion or candidate.
      batch_size: rows of a batch; the mesh must divide it.
      eos_id: the end token.
      stop_token_mask: further tokens that end a completion, b[V].
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
        stop_token_mask: np.ndarray,
    ):
        self._mesh = mesh
        self._batch_size = batch_size
        self._eos_id = eos_id
        self._context_tokens = context_tokens
        self._answer_tokens = answer_tokens

        # Closures over the network: parameters are the only large argument.
        def complete(params: Params, prompts: Prompts) -> Rollouts:
            # Temperature 0 draws nothing, so the keys do not matter.
            keys = jax.random.split(jax.random.key(0), batch_size)
            return generate(
                model,
                params,
                prompts,
                keys,
                length=answer_tokens,
                temperature=0.0,
                eos_id=eos_id,
                stop_token_mask=jnp.asarray(stop_token_mask),
                groups=sharding.num_row_shards(mesh),
            )

        def total_logprobs(params: Params, rollouts: Rollouts) -> Array:
            sequences = rollout_sequences(rollouts)
            score = partial(packed_logprobs, model, params, temperature=1.0)
            # [B, T] -> [B]
            return jnp.sum(map_packed_rows(score, sequences, model, mesh), axis=1)

        # Every process needs all results.
        replicated = sharding.replicated(mesh)
        self._complete_batch = jax.jit(complete, out_shardings=replicated)
        self._total_logprobs = jax.jit(total_logprobs, out_shardings=replicated)

    def complete(self, params: Params, contexts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Greedy completions.

        A completion ends after `answer_tokens` tokens, with a stop token (included) or with
        the end token (left out).

        Args:
          params: parameters of the network.
          contexts: token ids i32[n] of each context.

        Returns:
          Token ids i32[m] of each completion.

        Raises:
          ConfigError: a context is empty or too long.
        """
        # [N, P]; every batch is a selection of its rows.
        prompts = self._pad_contexts(contexts)
        completions = []
        for rows in self._batches(len(contexts)):
            batch = self._put(prompts, rows)
            rollouts = jax.device_get(self._complete_batch(params, batch))
            # The last batch repeats its last row.
            for row in range(len(np.unique(rows))):
                completion = rollouts.responses[row, : rollouts.mask[row].sum()]
                # A stop token stays, because it has a text.
                if completion[-1] == self._eos_id:
                    completion = completion[:-1]
                completions.append(completion)
        return completions

    def candidate_logprobs(
        self, params: Params, questions: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probabilities of multiple-choice candidates, as `multiple_choice` takes them.

        Args:
          params: parameters of the network.
          questions: (context i32[n], candidates i32[m] each) of N questions.

        Returns:
          total_logprobs f64[N, K], lengths i64[N, K] in tokens and valid b[N, K], where K
          is the largest number of candidates. A total is
          log p(candidate | context) = Σ log p(token | all tokens before it) at
          temperature 1, in nats.

        Raises:
          ConfigError: a context or a candidate is empty or too long.
        """
        # All candidates in one list, each with its context.
        pairs = []
        lengths_of_pairs = []
        for context, candidates in questions:
            for candidate in candidates:
                pairs.append((context, candidate))
                lengths_of_pairs.append(len(candidate))

        # The filled-up rows of the last batch write the same value again.
        rollouts = self._as_rollouts(pairs)
        totals = np.zeros(len(pairs))
        for rows in self._batches(len(pairs)):
            batch = self._put(rollouts, rows)
            totals[rows] = jax.device_get(self._total_logprobs(params, batch))

        # [N, K], true for candidates that exist; pairs are in the same order.
        counts = np.array([len(candidates) for _, candidates in questions], int)
        valid = np.arange(counts.max(initial=0))[None, :] < counts[:, None]
        total_logprobs = np.zeros(valid.shape)
        total_logprobs[valid] = totals
        lengths = np.zeros(valid.shape, int)
        lengths[valid] = lengths_of_pairs
        return total_logprobs, lengths, valid

    def _batches(self, count: int) -> list[np.ndarray]:
        """Rows 0 … count − 1 in batches i64[batch_size]; the last batch is filled up."""
        batches = []
        # All batches have one shape, so one program serves them all.
        for start in range(0, count, self._batch_size):
            rows = np.arange(start, start + self._batch_size)
            batches.append(np.minimum(rows, count - 1))
        return batches

    def _put(self, tree: Any, rows: np.ndarray) -> Any:
        """Puts `rows` of the arrays onto the mesh."""
        # Each process puts only the rows that its devices hold.
        own = process_slice(rows, jax.process_index(), jax.process_count())
        return sharding.shard_rows(jax.tree.map(lambda x: x[own], tree), self._mesh)

    def _pad_contexts(self, contexts: Sequence[np.ndarray]) -> Prompts:
        _check_lengths(contexts, self._context_tokens, "context", "context_tokens")
        return left_pad(list(enumerate(contexts)), len(contexts), self._context_tokens)

    def _as_rollouts(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rollouts:
        """Rollouts whose responses are the candidates."""
        # A context is repeated for each of its candidates.
        contexts = [context for context, _ in pairs]
        candidates = [candidate for _, candidate in pairs]
        _check_lengths(candidates, self._answer_tokens, "candidate", "answer_tokens")

        # Candidates are padded on the right: [N, R].
        lengths = np.array([len(candidate) for candidate in candidates], int)
        # The fields of Rollouts are annotated as jax arrays, which these become.
        mask: Any = np.arange(self._answer_tokens) < lengths[:, None]
        tokens: Any = np.zeros(mask.shape, np.int32)
        if candidates:
            tokens[mask] = np.concatenate(candidates)
        # Scoring reads neither of these two.
        logprobs: Any = np.zeros(mask.shape, np.float32)
        ended: Any = np.zeros(len(pairs), bool)
        return Rollouts(
            prompts=self._pad_contexts(contexts),
            responses=tokens,
            mask=mask,
            logprobs=logprobs,
            ended=ended,
        )


def _check_lengths(texts: Sequence[np.ndarray], longest: int, kind: str, name: str) -> None:
    """Raises ConfigError for a text that is empty or longer than the limit `name`."""
    for text in texts:
        if not 1 <= len(text) <= longest:
            raise ConfigError(
                f"a {kind} has {len(text)} tokens; between 1 and {longest} are possible: "
                f"change it, or {name}"
            )
