"""Answers of policies to held-out prompts, with the reward model's score and the KL from a
reference.

A policy can be asked in three ways: "plain", where an answer runs on to its end or the
limit, the pretrained model's mostly to the limit; "few-shot", behind worked examples that
the reward model chose among several (the paper's "GPT (prompted)", section 3.6), where a
line break ends the answer; and "best-of", with the best of n answers by the reward model's
score, the first of them the plain one.
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
from instructax.data.prompt_format import add_separator
from instructax.data.schema import Demonstration
from instructax.data.tokenizer import Tokenizer
from instructax.generation import generate
from instructax.models import Transformer
from instructax.models.scoring import (
    packed_logprobs,
    packed_outputs,
    rollout_sequences,
    select_last_token,
)
from instructax.models.sequence_packing import map_packed_rows
from instructax.types import Array, Params, Prompts, Rollouts, pytree

How = Literal["plain", "few-shot", "best-of"]


@pytree
class PolicyResponses:
    """What a batch of prompts was answered."""

    rollouts: Rollouts  # behind the prompts alone
    scores: Array  # f32[B], the reward model's
    token_kl: Array  # f32[B, R], log(π / π_ref) of each token, both of what they read; 0 where masked


@pytree
class _Sampled:
    """Answers before the policies are compared on them."""

    sampled: Rollouts  # behind what was asked
    rollouts: Rollouts  # the same behind the prompts alone, and cut
    kept: Array  # b[B, R], what was not put in its place
    scores: Array  # f32[B], the reward model's


class PolicyEvaluator:
    """The compiled programs that all policies of an architecture share."""

    def __init__(
        self,
        policy: Transformer,
        scorer: Transformer,
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
        self._mesh, self._tokenizer, self._limits = mesh, tokenizer, limits
        self._batch_size = batch_size
        self._room = (
            policy.config.max_length - limits.prompt_tokens - limits.response_tokens
        )
        self._fixed = (ref_params, reward_params)
        line_breaks = jnp.asarray(tokenizer.tokens_containing("\n"))
        scored_at = temperature if temperature > 0 else 1.0

        def packed(function: Any, rollouts: Rollouts) -> Array:
            rows = rollout_sequences(rollouts)
            width = max(limits.sequence_tokens, rows.tokens.shape[1])
            return map_packed_rows(function, rows, policy, mesh, width=width)

        def sample(
            params: Params,
            reward_params: Params,
            asked: Prompts,
            prompts: Prompts,
            samples: Array,
            *,
            draws: int,
        ) -> _Sampled:
            """Of `draws` answers to each prompt the one with the highest score, the first
            of equals."""
            steps = jax.vmap(partial(rng.step_key, seed, "evaluate"))(jnp.arange(draws))
            keys = jax.vmap(rng.sample_keys, (0, None), 1)(steps, samples).reshape(-1)
            prompted = asked.tokens.shape != prompts.tokens.shape
            sampled = generate(
                policy,
                params,
                asked,
                keys,
                length=limits.response_tokens,
                temperature=temperature,
                eos_id=tokenizer.eos_id,
                stop_token_mask=line_breaks if prompted else None,
                groups=sharding.num_row_shards(mesh),
            )
            cut, kept = sampled, sampled.mask
            if prompted:
                cut, kept = truncate_at_stops(sampled, line_breaks, tokenizer.eos_id)
            prompts = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), prompts)
            cut = dataclasses.replace(cut, prompts=prompts)
            scores = select_last_token(
                packed(partial(packed_outputs, scorer, reward_params), cut), cut
            )
            drawn = _Sampled(sampled=sampled, rollouts=cut, kept=kept, scores=scores)
            best = jnp.arange(0, len(keys), draws) + jnp.argmax(
                scores.reshape(-1, draws), axis=1
            )
            return drawn if draws == 1 else jax.tree.map(lambda x: x[best], drawn)

        def logprobs(params: Params, rollouts: Rollouts) -> Array:
            found = packed(
                partial(packed_logprobs, policy, params, temperature=scored_at), rollouts
            )
            return found[:, rollouts.prompts.tokens.shape[1] :]

        rows = sharding.row_sharding(mesh)
        self._sample = jax.jit(sample, static_argnames="draws", out_shardings=rows)
        # One program for both policies: of the reference against itself the KL is 0, to the
        # bit.
        self._logprobs = jax.jit(logprobs, out_shardings=rows)
        self._whole = jax.jit(
            lambda answers: answers, out_shardings=sharding.replicated(mesh)
        )

    def _asked(
        self, source: Source, count: int, prefix: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[Any, ...]]]:
        """(marks of the rows that are real, what `sample` reads) of each batch of the first
        `count` prompts."""
        for start, rows in enumerate(evaluation_rows(len(source), self._batch_size)):
            rows = np.where(
                np.arange(self._batch_size) < count - start * self._batch_size, rows, NO_ROW
            )
            if (rows == NO_ROW).all():
                return
            mine = process_slice(rows, jax.process_index(), jax.process_count())
            prompts = prompt_batch(source, mine, self._limits.prompt_tokens)
            asked = prepend_prefix(prefix, prompts, self._room) if len(prefix) else prompts
            yield (
                rows != NO_ROW,
                sharding.shard_rows(
                    (asked, prompts, np.asarray(mine, np.int32)), self._mesh
                ),
            )

    def batches(
        self, params: Params, source: Source, count: int, prefix: np.ndarray, draws: int
    ) -> Iterator[tuple[np.ndarray, PolicyResponses]]:
        """(marks of the rows that are real, answers on the host) of the first `count`
        held-out prompts of `source`, all behind `prefix` i32[n] unless it is empty; of
        `draws` to each prompt the best."""
        ref_params, reward_params = self._fixed
        for real, asked in self._asked(source, count, prefix):
            found = self._sample(params, reward_params, *asked, draws=draws)
            log_ratios = self._logprobs(params, found.sampled) - self._logprobs(
                ref_params, found.rollouts
            )
            token_kl = jnp.where(found.kept, log_ratios, 0.0)
            answers = PolicyResponses(
                rollouts=found.rollouts, scores=found.scores, token_kl=token_kl
            )
            yield real, jax.device_get(self._whole(answers))

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
        """The one of `prefixes` random sets of `shots` worked examples behind which the
        answers to a batch of prompts get the highest mean score: (its text, its tokens)."""
        plain = [example for example in examples if example.format == "plain"]
        require(
            len(plain) >= shots,
            f"config.shots = {shots} is more than the {len(plain)} plain demonstrations: lower it, or give more",
        )
        rng = np.random.default_rng(seed)
        best = (-np.inf, "", np.zeros(0, np.int32))
        for text, tokens in self._fitting(plain, shots, prefixes, rng):
            ((real, asked),) = self._asked(source, self._batch_size, tokens)
            scores = self._whole(
                self._sample(params, self._fixed[1], *asked, draws=1).scores
            )
            best = max(
                best,
                (float(scores[real].mean()), text, tokens),
                key=lambda candidate: candidate[0],
            )
        require(
            len(best[2]) > 0,
            f"no {shots} examples fit into {self._room} tokens: lower config.shots",
        )
        return best[1], best[2]

    def _fitting(
        self,
        examples: list[Demonstration],
        shots: int,
        prefixes: int,
        rng: np.random.Generator,
    ) -> Iterator[tuple[str, np.ndarray]]:
        found = 0
        for _ in range(100 * prefixes):
            chosen = [examples[i] for i in rng.permutation(len(examples))[:shots]]
            text = "".join(
                f"{add_separator(example.prompt)}{example.completion}\n\n"
                for example in chosen
            )
            tokens = self._tokenizer.encode(text)
            if len(tokens) <= self._room:
                found += 1
                yield text, tokens
            if found == prefixes:
                return

    def responses(
        self, params: Params, source: Source, count: int, *, prefix: np.ndarray, draws: int
    ) -> list[dict[str, Any]]:
        """The answer to each of the first `count` held-out prompts, of `draws` the one with
        the highest score, as text and figures."""
        return [
            self._record(answers, int(row))
            for real, answers in self.batches(params, source, count, prefix, draws)
            for row in np.flatnonzero(real)
        ]

    def _record(self, answers: PolicyResponses, row: int) -> dict[str, Any]:
        rollouts, decode = answers.rollouts, self._tokenizer.decode
        mask = np.asarray(rollouts.mask[row])
        response = np.asarray(rollouts.responses[row])[mask]
        prompt = np.asarray(rollouts.prompts.tokens[row])[
            np.asarray(rollouts.prompts.mask[row])
        ]
        return {
            "prompt": decode(prompt),
            "response": decode(response),
            "score": float(answers.scores[row]),
            "kl": float(answers.token_kl[row].sum()),
            "tokens": int(mask.sum()),
            "ended": bool(rollouts.ended[row]),
            "pieces": [decode([token]) for token in response],
            "token_kl": [
                round(float(x), 4) for x in np.asarray(answers.token_kl[row])[mask]
            ],
        }


def truncate_at_stops(
    rollouts: Rollouts, stops: Array, eos_id: int
) -> tuple[Rollouts, Array]:
    """`rollouts` cut at the first response token that `stops` b[V] marks, with the end
    token in its place; and the mask b[B, R] of what was sampled before it."""
    stopped = jnp.cumsum(stops[rollouts.responses] & rollouts.mask, axis=1) > 0
    first = stopped & ~jnp.pad(stopped, ((0, 0), (1, 0)))[:, :-1]
    kept = rollouts.mask & ~stopped
    cut = Rollouts(
        prompts=rollouts.prompts,
        responses=jnp.where(stopped, eos_id, rollouts.responses),
        mask=kept | first,
        logprobs=jnp.where(kept, rollouts.logprobs, 0.0),
        ended=rollouts.ended | jnp.any(stopped, axis=1),
    )
    return cut, kept


def prepend_prefix(prefix: np.ndarray, prompts: Prompts, room: int) -> Prompts:
    """`prompts` i32[B, P] with `prefix` i32[n] before each, padded on the left: i32[B, room
    + P]; n ≤ `room`. What is empty stays so."""
    tokens, mask = (
        np.pad(np.asarray(x), ((0, 0), (room, 0))) for x in (prompts.tokens, prompts.mask)
    )
    for row in np.flatnonzero(mask.any(axis=1)):
        start = room + int(np.argmax(mask[row, room:]))
        tokens[row, start - len(prefix) : start], mask[row, start - len(prefix) : start] = (
            prefix,
            True,
        )
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))
