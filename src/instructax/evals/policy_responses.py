"""Responses of policies to validation prompts, with reward-model scores and KL.

A policy answers in one of three modes:

- "plain": a response runs to its end token or the length limit. The pretrained model mostly
  reaches the limit.
- "few-shot": few-shot examples precede the prompt, and a line break ends the response (the
  paper's "GPT (prompted)", section 3.5). The reward model chooses the examples.
- "best-of": of n responses the one with the highest reward-model score; the first of them
  is the plain one.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from instructax import rng, sharding
from instructax.config import require
from instructax.data.batches import (
    NO_ROW,
    Source,
    evaluation_rows,
    process_slice,
    prompt_batch,
)
from instructax.data.limits import DataLimits
from instructax.data.schema import Demonstration
from instructax.data.tokenizer import Tokenizer
from instructax.evals.few_shot import (
    plain_examples,
    prepend_prefix,
    random_prefixes,
    truncate_at_stops,
)
from instructax.generation.sampler import generate
from instructax.models.scoring import (
    packed_logprobs,
    packed_outputs,
    rollout_sequences,
    select_last_token,
)
from instructax.models.sequence_packing import map_packed_rows
from instructax.models.transformer import Transformer
from instructax.types import Array, Params, Prompts, Rollouts, pytree

ResponseMode = Literal["plain", "few-shot", "best-of"]


@pytree
class PolicyResponses:
    """Responses to a batch of prompts."""

    # After the prompts alone, without few-shot examples.
    rollouts: Rollouts
    # f32[B], reward-model scores.
    scores: Array
    # f32[B, R], log(π / π_ref) of each token; 0 where masked. With few-shot examples π has
    # read them and π_ref has not.
    token_kl: Array


@pytree
class _Sampled:
    """Responses before they are scored by the policies."""

    # After few-shot examples and prompts.
    sampled: Rollouts
    # The same responses after the prompts alone, truncated at line breaks.
    rollouts: Rollouts
    # b[B, R], sampled tokens, without an end token that truncation inserted.
    kept: Array
    # f32[B], reward-model scores.
    scores: Array


class PolicyEvaluator:
    """Compiled programs to sample and score, shared by all policies of an architecture.

    The programs are compiled at their first use.

    Args:
      policy: architecture of the policies.
      reward_model: architecture of the reward model.
      mesh: the device mesh.
      tokenizer: the tokenizer.
      limits: prompt and response lengths.
      ref_params: parameters of the reference policy.
      reward_params: parameters of the reward model.
      temperature: sampling temperature; 0 = greedy, scored at temperature 1.
      batch_size: prompts per batch.
      seed: random seed of the responses.
    """

    def __init__(
        self,
        policy: Transformer,
        reward_model: Transformer,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        limits: DataLimits,
        ref_params: Params,
        reward_params: Params,
        *,
        temperature: float,
        batch_size: int,
        seed: int,
    ):
        self._policy = policy
        self._reward_model = reward_model
        self._mesh = mesh
        self._tokenizer = tokenizer
        self._limits = limits
        self._ref_params = ref_params
        self._reward_params = reward_params
        self._temperature = temperature
        self._batch_size = batch_size
        self._seed = seed
        # b[V], tokens that contain a line break.
        self._line_breaks = jnp.asarray(tokenizer.tokens_containing("\n"))
        # Tokens that prompt and response leave for few-shot examples.
        self._prefix_room = (
            policy.config.max_length - limits.prompt_tokens - limits.response_tokens
        )

        rows = sharding.row_sharding(mesh)
        self._sample = jax.jit(
            self._sample_batch, static_argnames="num_samples", out_shardings=rows
        )
        # One program for both policies, so that the KL of the reference against itself is
        # exactly 0.
        self._logprobs = jax.jit(self._response_logprobs, out_shardings=rows)
        # Every process reads all results.
        self._replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))

    def _sample_batch(
        self,
        params: Params,
        reward_params: Params,
        prefixed: Prompts,
        prompts: Prompts,
        samples: Array,
        *,
        num_samples: int,
    ) -> _Sampled:
        """Samples `num_samples` responses to each prompt and keeps the best-scored one.

        Args:
          params: parameters of the policy.
          reward_params: parameters of the reward model.
          prefixed: prompts after few-shot examples, [B, P'], or `prompts` without any.
          prompts: prompts alone, [B, P].
          samples: row of each prompt in its source, i32[B]; determines the random key.
          num_samples: responses to each prompt.
        """
        keys = self._sample_keys(samples, num_samples)
        # Known at compile time: prefixed prompts are wider.
        few_shot = prefixed.tokens.shape != prompts.tokens.shape
        eos_id = self._tokenizer.eos_id
        sampled = generate(
            self._policy,
            params,
            prefixed,
            keys,
            length=self._limits.response_tokens,
            temperature=self._temperature,
            eos_id=eos_id,
            stop_token_mask=self._line_breaks if few_shot else None,
            groups=sharding.num_row_shards(self._mesh),
        )
        # Few-shot responses end at a line break, so the text after it does not count.
        truncated = sampled
        kept = sampled.mask
        if few_shot:
            truncated, kept = truncate_at_stops(sampled, self._line_breaks, eos_id)

        # The reward model reads the prompts alone, [B * num_samples, P + R].
        repeated = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prompts)
        truncated = dataclasses.replace(truncated, prompts=repeated)
        score = partial(packed_outputs, self._reward_model, reward_params)
        scores = select_last_token(self._map_packed(score, truncated), truncated)
        responses = _Sampled(sampled=sampled, rollouts=truncated, kept=kept, scores=scores)
        if num_samples == 1:
            return responses
        return _best_of(responses, num_samples)

    def _sample_keys(self, samples: Array, num_samples: int) -> Array:
        """Random keys, key[B * num_samples], with those of one prompt adjacent.

        A key depends on the prompt's row in its source and on the number of the draw alone,
        so the first of n responses is the one that is drawn for n = 1.
        """
        draws = jnp.arange(num_samples)
        step_keys = jax.vmap(partial(rng.step_key, self._seed, "evaluate"))(draws)
        # key[num_samples] and i32[B] → key[B, num_samples]
        return jax.vmap(rng.sample_keys, (0, None), 1)(step_keys, samples).reshape(-1)

    def _response_logprobs(self, params: Params, rollouts: Rollouts) -> Array:
        """Log-probabilities of the responses, f32[B, R]."""
        # Greedy samples are scored at temperature 1, as the sampler reports them.
        temperature = self._temperature if self._temperature > 0 else 1.0
        score = partial(packed_logprobs, self._policy, params, temperature=temperature)
        logprobs = self._map_packed(score, rollouts)
        return logprobs[:, rollouts.prompts.tokens.shape[1] :]

    def _map_packed(self, function: Any, rollouts: Rollouts) -> Array:
        """Applies `function` to packed prompts and responses: [B, P + R]."""
        # The prompt is scored with its response, since the response attends to it.
        sequences = rollout_sequences(rollouts)
        # Rows are at least as wide as those of training; few-shot prompts need more.
        width = max(self._limits.sequence_tokens, sequences.tokens.shape[1])
        return map_packed_rows(function, sequences, self._policy, self._mesh, width=width)

    def _prompt_batches(
        self, source: Source, count: int, prefix: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[Any, ...]]]:
        """Yields batches of the first `count` prompts.

        A batch is (marks of the real rows b[B], arguments of `_sample_batch` after the
        parameters).
        """
        for index, rows in enumerate(evaluation_rows(len(source), self._batch_size)):
            # Rows beyond `count` become padding, so that all batches have one shape.
            num_left = count - index * self._batch_size
            rows = np.where(np.arange(self._batch_size) < num_left, rows, NO_ROW)
            if (rows == NO_ROW).all():
                return
            # Each process reads only the rows that its devices hold.
            own = process_slice(rows, jax.process_index(), jax.process_count())
            prompts = prompt_batch(source, own, self._limits.prompt_tokens)
            prefixed = prompts
            if len(prefix):
                prefixed = prepend_prefix(prefix, prompts, self._prefix_room)
            # The row ids select the random keys, so a response does not depend on the batch
            # size.
            batch = (prefixed, prompts, np.asarray(own, np.int32))
            yield rows != NO_ROW, sharding.shard_rows(batch, self._mesh)

    def batches(
        self,
        params: Params,
        source: Source,
        count: int,
        *,
        prefix: np.ndarray,
        num_samples: int,
    ) -> Iterator[tuple[np.ndarray, PolicyResponses]]:
        """Responses to the first `count` prompts, in batches.

        Args:
          params: parameters of the policy.
          source: validation prompts.
          count: number of prompts.
          prefix: few-shot examples before each prompt, i32[n]; may be empty.
          num_samples: responses to each prompt, of which the best-scored one is returned.

        Yields:
          (marks of the real rows b[B], responses on the host).
        """
        for real, batch in self._prompt_batches(source, count, prefix):
            sampled = self._sample(
                params, self._reward_params, *batch, num_samples=num_samples
            )
            # The policy reads few-shot examples; the reference does not.
            logprobs = self._logprobs(params, sampled.sampled)
            ref_logprobs = self._logprobs(self._ref_params, sampled.rollouts)
            token_kl = jnp.where(sampled.kept, logprobs - ref_logprobs, 0.0)
            responses = PolicyResponses(
                rollouts=sampled.rollouts, scores=sampled.scores, token_kl=token_kl
            )
            yield real, jax.device_get(self._replicate(responses))

    def best_prefix(
        self,
        params: Params,
        source: Source,
        examples: list[Demonstration],
        *,
        shots: int,
        prefixes: int,
        seed: int,
    ) -> tuple[str, np.ndarray]:
        """Chooses few-shot examples by the mean score of the responses to one batch.

        Args:
          params: parameters of the policy.
          source: training prompts.
          examples: demonstrations; only those in plain format are used.
          shots: examples in a prefix.
          prefixes: random prefixes to compare.
          seed: random seed of the prefixes.

        Returns:
          The text and the tokens i32[n] of the best prefix.

        Raises:
          ConfigError: there are fewer than `shots` examples, or they never fit.
        """
        plain = plain_examples(examples, shots)
        best_score = -np.inf
        best_text = ""
        best_tokens = np.zeros(0, np.int32)
        candidates = random_prefixes(
            plain,
            self._tokenizer,
            shots=shots,
            count=prefixes,
            max_tokens=self._prefix_room,
            seed=seed,
        )
        for text, tokens in candidates:
            score = self._mean_score(params, source, tokens)
            # The first one of a tie.
            if score > best_score:
                best_score = score
                best_text = text
                best_tokens = tokens
        require(
            len(best_tokens) > 0,
            f"no {shots} examples fit into {self._prefix_room} tokens: lower config.shots",
        )
        return best_text, best_tokens

    def _mean_score(self, params: Params, source: Source, prefix: np.ndarray) -> float:
        """Mean score of one response to each prompt of the first batch, after `prefix`."""
        ((real, batch),) = self._prompt_batches(source, self._batch_size, prefix)
        sampled = self._sample(params, self._reward_params, *batch, num_samples=1)
        scores = self._replicate(sampled.scores)
        return float(scores[real].mean())

    def responses(
        self,
        params: Params,
        source: Source,
        count: int,
        *,
        prefix: np.ndarray,
        num_samples: int,
    ) -> list[dict[str, Any]]:
        """Responses to the first `count` prompts as text with metrics; see `batches`."""
        records = []
        batches = self.batches(
            params, source, count, prefix=prefix, num_samples=num_samples
        )
        for real, responses in batches:
            for row in np.flatnonzero(real):
                # Padding rows are left out.
                records.append(self._record(responses, int(row)))
        return records

    def _record(self, responses: PolicyResponses, row: int) -> dict[str, Any]:
        """One response as it is written to samples.jsonl."""
        # Arrays are on the host here; rows are read one by one.
        rollouts = responses.rollouts
        decode = self._tokenizer.decode
        mask = np.asarray(rollouts.mask[row])
        response = np.asarray(rollouts.responses[row])[mask]
        prompt_mask = np.asarray(rollouts.prompts.mask[row])
        # Padding is cut from both sides: prompts are padded on the left, responses on the
        # right.
        prompt = np.asarray(rollouts.prompts.tokens[row])[prompt_mask]
        token_kl = np.asarray(responses.token_kl[row])[mask]
        # Pieces are the texts of single tokens, for a viewer that colors them by KL.
        return {
            "prompt": decode(prompt),
            "response": decode(response),
            "score": float(responses.scores[row]),
            "kl": float(responses.token_kl[row].sum()),
            "tokens": int(mask.sum()),
            "ended": bool(rollouts.ended[row]),
            "pieces": [decode([token]) for token in response],
            "token_kl": [round(float(value), 4) for value in token_kl],
        }


def _best_of(responses: _Sampled, num_samples: int) -> _Sampled:
    """The best-scored response to each prompt: [B * num_samples, ...] → [B, ...]."""
    scores = responses.scores
    # The first of several equally good responses.
    offsets = jnp.argmax(scores.reshape(-1, num_samples), axis=1)
    best = jnp.arange(0, len(scores), num_samples) + offsets
    return jax.tree.map(lambda x: x[best], responses)
