"""Compares finished policies on held-out data, and the reward model with people: a run that trains nothing.

Departure from the paper: its win rates are people's; `proxy_win_rate` is by the reward model's scores.

Every policy answers the same held-out prompts; its responses go to `samples.jsonl` with the reward model's score and
the KL from the reference, its figures to `summary.json`.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from instructax import clock, sharding, stage, training
from instructax.configuration import check_range
from instructax.data.batches import NO_ROW, evaluation_rows, process_slice, prompt_batch
from instructax.data.builders import Prepared
from instructax.data.limits import Limits
from instructax.data.prepare import prepare_comparisons, prepare_prompts, prepare_text
from instructax.data.readers import held_out, held_out_rows, read_comparisons
from instructax.inference import generate, row_logprobs, sequence_scores, token_logprobs
from instructax.lineage import Parent, open_parents, tokenizer_of
from instructax.losses import ordered_pairs
from instructax.model import ComputeConfig, ModelConfig, Transformer
from instructax.runlog import RunLog
from instructax.sharding import MeshConfig
from instructax.statistics import Estimate, mean_estimate, ratio_estimate, win_rate
from instructax.tokenizer import Tokenizer
from instructax.types import Array, Comparisons, LmBatch, Params, Prompts, Rollouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateData:
    """Files of which the held-out split is read; () of text or comparisons leaves their figures out."""

    prompts: tuple[str, ...]
    text: tuple[str, ...]
    comparisons: tuple[str, ...]
    limits: Limits
    folder: str  # where prepared rows are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A comparison of policies."""

    stage: Literal["evaluate"]
    seed: int
    policies: tuple[tuple[str, str], ...]  # (name, workdir)
    reference: str  # name of the policy that the others are measured against: win rate, KL
    reward_parent: str  # workdir of the reward model
    tokenizer: str  # path, or "bytes"
    model: ModelConfig  # of the policies
    reward_model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    data: EvaluateData
    batch_size: int
    prompts: int  # the most held-out prompts
    batches: int  # the most batches of held-out text and of comparisons
    temperature: float  # 0 = the likeliest token

    def __post_init__(self):
        check_range(self, {"batch_size": 1, "prompts": 1, "batches": 1, "temperature": 0})
        if self.reference not in dict(self.policies):
            names = [name for name, _ in self.policies]
            raise ValueError(f"reference = {self.reference!r} must be one of the policies {names}")
        if not (self.data.prompts and self.reward_parent and all(path for _, path in self.policies)):
            raise ValueError("data.prompts, reward_parent and the workdir of every policy must be given")


def check(config: EvaluateConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    stage.check_rows("batch_size", config.batch_size, 1, mesh)
    stage.check_lengths(config.data.limits, config.model)
    stage.check_lengths(config.data.limits, config.reward_model)


def train(config: EvaluateConfig, workdir: Path, given: Mapping[str, Any]) -> None:
    """Runs the comparison in `workdir`; all of it is done again if it was interrupted."""
    mesh = sharding.make_mesh(config.mesh)
    check(config, mesh)
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    paths = {f"policies.{name}": path for name, path in config.policies} | {"reward_parent": config.reward_parent}
    models: Any = dict.fromkeys(paths, (config.model, "tokens"))
    models["reward_parent"] = (config.reward_model, "scalar")
    parents = open_parents(paths, models, tokenizer, config.tokenizer)
    data = read_data(config, tokenizer)
    stage.Record(config=config, given=given, tokenizer=tokenizer, data=data, parents=parents).write(workdir)
    load = partial(_load, config, mesh)
    ref_params = load(parents[f"policies.{config.reference}"], "tokens")
    programs = Programs(config, mesh, tokenizer.eos_id, ref_params, load(parents["reward_parent"], "scalar"))
    figures: dict[str, Any] = {"stage": config.stage, "policies": {}}
    scores: dict[str, np.ndarray] = {}
    log = RunLog(workdir, total_steps=len(config.policies), log_every=1, start_step=0, tensorboard=False, console=True)
    with log:
        for number, (name, _) in enumerate(config.policies, start=1):
            params = load(parents[f"policies.{name}"], "tokens")
            responses = programs.responses(params, data["prompts"], tokenizer)
            scores[name] = np.array([response["score"] for response in responses])
            for response in responses:
                log.sample(number, {"policy": name, **response})
            figures["policies"][name] = figures_of(responses) | programs.text_loss(params, data.get("text"))
            log.record(number, {f: x["value"] for f, x in figures["policies"][name].items()})
        for name in scores:
            wins = win_rate(scores[name], scores[config.reference])
            figures["policies"][name]["proxy_win_rate"] = dataclasses.asdict(wins)
        figures["reward_model"] = programs.ranking(data.get("comparisons"))
        log.flush()
        log.summary(figures)


def _load(config: EvaluateConfig, mesh: jax.sharding.Mesh, parent: Parent, head: Literal["tokens", "scalar"]) -> Params:
    model = Transformer(config.model if head == "tokens" else config.reward_model, config.compute, head)
    return parent.load(training.abstract_params(model, mesh))


def read_data(config: EvaluateConfig, tokenizer: Tokenizer) -> dict[str, Prepared]:
    """What there are files of, prepared."""
    prepare = {"prompts": prepare_prompts, "text": prepare_text, "comparisons": prepare_comparisons}
    files = {name: [Path(path) for path in getattr(config.data, name)] for name in prepare}
    folder = Path(config.data.folder)
    return {name: prepare[name](files[name], tokenizer, config.data.limits, folder) for name in prepare if files[name]}


def figures_of(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over one policy's responses."""
    names = {"scores": "score", "kl": "kl", "response_length": "tokens", "ended_share": "ended"}
    return {
        name: dataclasses.asdict(mean_estimate(np.array([response[of_one] for response in responses], float)))
        for name, of_one in names.items()
    }


class Programs:
    """The compiled functions that all policies share."""

    def __init__(
        self, config: EvaluateConfig, mesh: jax.sharding.Mesh, eos_id: int, ref_params: Params, reward_params: Params
    ):
        self._config, self._mesh = config, mesh
        self._ref_params, self._reward_params = ref_params, reward_params
        policy = Transformer(config.model, config.compute, "tokens")
        scorer = Transformer(config.reward_model, config.compute, "scalar")
        everywhere = sharding.replicated(mesh)

        def respond(
            params: Params, ref_params: Params, reward_params: Params, prompts: Prompts, samples: Array
        ) -> tuple[Rollouts, Array, Array]:
            keys = clock.sample_keys(clock.step_key(config.seed, "evaluate", 0), samples)
            rollouts = generate(
                policy,
                params,
                prompts,
                keys,
                length=config.data.limits.response_tokens,
                temperature=config.temperature,
                eos_id=eos_id,
            )
            scored_at = config.temperature if config.temperature > 0 else 1.0
            logprobs = token_logprobs(policy, params, rollouts, temperature=scored_at)
            ref_logprobs = token_logprobs(policy, ref_params, rollouts, temperature=scored_at)
            kl = jnp.sum(jnp.where(rollouts.mask, logprobs - ref_logprobs, 0.0), axis=1)
            return rollouts, sequence_scores(scorer, reward_params, rollouts), kl

        def losses(params: Params, batch: LmBatch) -> tuple[Array, Array]:
            """Loss summed over each row's trained tokens, and their number: f32[B] each."""
            logprobs = row_logprobs(policy, params, batch)
            return -jnp.sum(jnp.where(batch.loss_mask, logprobs, 0.0), axis=1), jnp.sum(batch.loss_mask, axis=1)

        def right_pairs(params: Params, batch: Comparisons) -> tuple[Array, Array, Array]:
            """Pairs ordered rightly by the scores, by length, and all pairs of each prompt: f32[B] each."""
            pairs = ordered_pairs(batch.ranks, batch.valid)

            def right(x: Array) -> Array:
                return jnp.sum(pairs & (x[:, :, None] > x[:, None, :]), axis=(1, 2))

            longer = right(jnp.sum(batch.mask, axis=2))
            return right(sequence_scores(scorer, params, batch)), longer, jnp.sum(pairs, axis=(1, 2))

        self._respond = jax.jit(respond, out_shardings=everywhere)
        self._losses = jax.jit(losses, out_shardings=everywhere)
        self._right_pairs = jax.jit(right_pairs, out_shardings=everywhere)

    def responses(self, params: Params, prompts: Prepared, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """One response to each held-out prompt, as text and figures."""
        source, limits = prompts.sources["validation"], self._config.data.limits
        size = self._config.batch_size
        responses: list[dict[str, Any]] = []
        for rows in evaluation_rows(len(source), size):
            rows = np.where(np.arange(size) < self._config.prompts - len(responses), rows, NO_ROW)
            if (rows == NO_ROW).all():
                break
            mine = process_slice(rows, jax.process_index(), jax.process_count())
            # An empty row is given the first prompt, so that the sampler has something to read, and left out below.
            batch = prompt_batch(source, np.where(mine == NO_ROW, 0, mine), limits.prompt_tokens)
            batch, samples = sharding.put_rows((batch, np.asarray(mine, np.int32)), self._mesh)
            out = self._respond(params, self._ref_params, self._reward_params, batch, samples)
            rollouts, scores, kl = jax.device_get(out)
            for i in np.flatnonzero(rows != NO_ROW):
                prompt = rollouts.prompts.tokens[i][rollouts.prompts.mask[i]]
                responses.append(
                    {
                        "prompt": tokenizer.decode(prompt),
                        "response": tokenizer.decode(rollouts.responses[i][rollouts.mask[i]]),
                        "score": float(scores[i]),
                        "kl": float(kl[i]),
                        "tokens": int(rollouts.mask[i].sum()),
                        "ended": bool(rollouts.ended[i]),
                    }
                )
        return responses

    def text_loss(self, params: Params, text: Prepared | None) -> dict[str, Any]:
        """Loss in nats per token on held-out text, with an interval over rows; {} without text."""
        if text is None:
            return {}
        source, length = text.sources["validation"], self._config.data.limits.sequence_tokens
        batches = held_out_rows(source, self._config.batch_size, self._config.batches, length)
        out = [jax.device_get(self._losses(params, sharding.put_rows(batch, self._mesh))) for batch in batches]
        return {"text_loss": dataclasses.asdict(_ratio(out, 0, 1))}

    def ranking(self, comparisons: Prepared | None) -> dict[str, Any]:
        """Share of held-out pairs that the reward model orders as people did, and that their length does."""
        if comparisons is None:
            return {}
        source, limits = comparisons.sources["validation"], self._config.data.limits
        out = []
        for rows in held_out(source, self._config.batch_size, self._config.batches):
            batch = sharding.put_rows(read_comparisons(source, rows, limits), self._mesh)
            out.append(jax.device_get(self._right_pairs(self._reward_params, batch)))
        names = {"accuracy": 0, "longer_wins": 1}
        pairs = int(sum(np.sum(x[2]) for x in out))
        return {name: dataclasses.asdict(_ratio(out, i, 2)) for name, i in names.items()} | {"pairs": pairs}


def _ratio(batches: list[tuple[Any, ...]], numerator: int, denominator: int) -> Estimate:
    return ratio_estimate(
        np.concatenate([x[numerator] for x in batches]), np.concatenate([x[denominator] for x in batches])
    )
