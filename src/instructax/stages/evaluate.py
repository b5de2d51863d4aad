"""Compares finished policies on held-out data, and the reward model with people: a run that
trains nothing.

Departure from the paper: its win rates are people's; `proxy_win_rate` is by the reward
model's scores.

Every policy answers the same held-out prompts; its responses go to `samples.jsonl` with the
reward model's score and the KL from the reference, its figures to `summary.json`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from instructax.checkpoints.parents import ExpectedParent, Head, Parent
from instructax.config import ConfigError, Seed, check_range, format_value, require_distinct
from instructax.data.limits import DataLimits
from instructax.data.prepare import prepare_comparisons, prepare_prompts, prepare_text
from instructax.data.prompt_format import PLAIN_FORMAT, PromptFormat
from instructax.data.schema import Demonstration, read_jsonl
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.intervals import mean_estimate, win_rate
from instructax.evals.policy_responses import PolicyEvaluator, ResponseMode
from instructax.evals.validation import Ranking, ValidationLoss
from instructax.models import ComputeConfig, ModelConfig, Transformer
from instructax.models.init import abstract_params
from instructax.models.sequence_packing import packed_width
from instructax.runtime.metric_log import MetricLog
from instructax.sharding import MeshConfig
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_lengths, check_rows
from instructax.training.run import Run
from instructax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateData:
    """Files of which the held-out split is read; () of text or comparisons leaves their
    figures out. The prompts that worked examples are chosen on are of no held-out split."""

    prompts: tuple[str, ...]
    text: tuple[str, ...]
    comparisons: tuple[
        tuple[str, tuple[str, ...]], ...
    ]  # (name of a group of labelers, files of what they ranked)
    demonstrations: tuple[str, ...]  # what the worked examples of "few-shot" are taken from
    chat: bool  # whether prompts are worded by the policies' chat template
    limits: DataLimits
    folder: str  # where prepared rows are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A comparison of policies."""

    head: ClassVar[Head | None] = None

    stage: Literal["evaluate"]
    seed: Seed
    policies: tuple[
        tuple[str, str, str], ...
    ]  # (name, workdir, how it is asked: one of `policy_responses.ResponseMode`)
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
    best_of: int  # answers of which "best-of" takes one
    shots: int  # worked examples before a prompt that is asked "few-shot"
    prefixes: int  # sets of them that are tried

    def __post_init__(self):
        least = dict.fromkeys(
            ("batch_size", "prompts", "batches", "best_of", "shots", "prefixes"), 1
        )
        check_range(self, least | {"temperature": 0})
        names = [name for name, _, _ in self.policies]
        require_distinct("policies", names)
        require_distinct("data.comparisons", [name for name, _ in self.data.comparisons])
        for name, _, how in self.policies:
            if how not in get_args(ResponseMode):
                raise ConfigError(
                    f"policies.{name} is asked {format_value(how)}: allowed are {', '.join(get_args(ResponseMode))}"
                )
        if any(how == "few-shot" for _, _, how in self.policies) and self.data.chat:
            raise ConfigError(
                "data.chat = True has no few-shot: worked examples stand before plain prompts"
            )
        if (
            any(how == "few-shot" for _, _, how in self.policies)
            and not self.data.demonstrations
        ):
            raise ConfigError(
                "data.demonstrations must be given: a policy is asked few-shot, behind some of them"
            )
        if self.reference not in names:
            raise ConfigError(
                f"reference = {format_value(self.reference)} must be one of the policies {format_value(names)}"
            )
        if not (
            self.data.prompts
            and self.reward_parent
            and all(path for _, path, _ in self.policies)
        ):
            raise ConfigError(
                "data.prompts, reward_parent and the workdir of every policy must be given"
            )

    def parents(self) -> dict[str, ExpectedParent]:
        """The policies, and the reward model that scores them."""
        expected: dict[str, ExpectedParent] = {}
        for name, path, _ in self.policies:
            expected[f"policies.{name}"] = ExpectedParent(path, self.model, "tokens")
        expected["reward_parent"] = ExpectedParent(
            self.reward_parent, self.reward_model, "scalar"
        )
        return expected

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat = PLAIN_FORMAT
    ) -> dict[str, PreparedData]:
        """Prompts, and text and comparisons where there are files of them."""
        data = self.data
        folder = Path(data.folder)
        prompts = [Path(path) for path in data.prompts]
        prepared = {
            "prompts": prepare_prompts(
                prompts, tokenizer, data.limits, folder, prompt_format
            )
        }
        if data.text:
            text = [Path(path) for path in data.text]
            prepared["text"] = prepare_text(text, tokenizer, data.limits, folder)
        for name, paths in data.comparisons:
            files = [Path(path) for path in paths]
            prepared[f"comparisons.{name}"] = prepare_comparisons(
                files, tokenizer, data.limits, folder, prompt_format
            )
        return prepared


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_rows("batch_size", config.batch_size, 1, mesh)
    check_lengths(config.data.limits, config.model)
    check_lengths(config.data.limits, config.reward_model)


def row_lengths(config: Config) -> RowLengths:
    """Pieces of packed text, of prompts with their responses, and of comparisons, whose
    responses share a prompt."""
    limits = config.data.limits
    packed = limits.sequence_tokens
    pair = max(packed, limits.prompt_tokens + limits.response_tokens)
    widths = [packed, pair]
    if any(how == "few-shot" for _, _, how in config.policies):
        # Examples before a prompt fill the context.
        widths.append(max(pair, config.model.max_length))
    if config.data.comparisons:
        widths.append(limits.comparison_tokens)
    return split_lengths(config.compute, *widths), bool(config.data.comparisons)


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Nothing is trained."""
    return {}


def train(run: Run) -> None:
    """Runs the comparison; an interrupted run starts over."""
    config: Config = run.config
    mesh, tokenizer = run.mesh, run.tokenizer
    parents, data, workdir = run.parents, run.data, run.workdir
    run.write_manifest()
    load = partial(_load, config, mesh)
    ref_params = load(parents[f"policies.{config.reference}"], "tokens")
    reward_params = load(parents["reward_parent"], "scalar")
    policy = Transformer(config.model, config.compute, "tokens", mesh)
    scorer = Transformer(config.reward_model, config.compute, "scalar", mesh)
    limits = config.data.limits
    sampling = {
        "temperature": config.temperature,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }
    answering = PolicyEvaluator(
        policy, scorer, mesh, tokenizer, limits, ref_params, reward_params, **sampling
    )
    sets = {name: data[f"comparisons.{name}"] for name, _ in config.data.comparisons}
    longest = [tokens for rows in sets.values() for tokens in rows.report.longest.values()]
    width = packed_width(longest, limits.comparison_tokens, config.compute)
    token_loss = ValidationLoss(
        policy,
        mesh,
        batch_size=config.batch_size,
        max_batches=config.batches,
        sequence_tokens=limits.sequence_tokens,
    )
    ranking = Ranking(
        scorer,
        mesh,
        limits,
        batch_size=config.batch_size,
        max_batches=config.batches,
        width=width,
    )
    figures: dict[str, Any] = {"stage": config.stage, "policies": {}, "prefixes": {}}
    scores: dict[str, np.ndarray] = {}
    log = MetricLog(
        workdir,
        total_steps=len(config.policies),
        log_every=1,
        start_step=0,
        tensorboard=False,
        console=True,
    )
    with log:
        for number, (name, _, how) in enumerate(config.policies, start=1):
            params = load(parents[f"policies.{name}"], "tokens")
            prefix = np.zeros(0, np.int32)
            if how == "few-shot":
                train, examples = data["prompts"].sources["train"], read_examples(config)
                choice = {
                    "shots": config.shots,
                    "prefixes": config.prefixes,
                    "seed": config.seed,
                }
                figures["prefixes"][name], prefix = answering.best_prefix(
                    params, train, examples, **choice
                )
            draws = config.best_of if how == "best-of" else 1
            source = data["prompts"].sources["validation"]
            responses = answering.responses(
                params, source, config.prompts, prefix=prefix, num_samples=draws
            )
            scores[name] = np.array([response["score"] for response in responses])
            for response in responses:
                log.write_sample(number, {"policy": name, **response})
            figures["policies"][name] = figures_of(responses) | (
                {
                    "text_loss": token_loss.estimate(
                        params, data["text"].sources["validation"]
                    )
                }
                if "text" in data
                else {}
            )
            log.record(
                number, {f: x["value"] for f, x in figures["policies"][name].items()}
            )
        for name in scores:
            wins = win_rate(scores[name], scores[config.reference])
            figures["policies"][name]["proxy_win_rate"] = dataclasses.asdict(wins)
        figures["reward_model"] = {
            name: ranking.estimates(reward_params, rows.sources["validation"])
            for name, rows in sets.items()
        }
        log.flush()
        log.write_summary(figures)


def read_examples(config: Config) -> list[Demonstration]:
    """The demonstrations that worked examples are taken from."""
    return list(
        read_jsonl([Path(path) for path in config.data.demonstrations], Demonstration)
    )


def _load(
    config: Config,
    mesh: jax.sharding.Mesh,
    parent: Parent,
    head: Literal["tokens", "scalar"],
) -> Params:
    model = Transformer(
        config.model if head == "tokens" else config.reward_model, config.compute, head
    )
    return parent.load(abstract_params(model, mesh))


def figures_of(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over one policy's responses."""
    names = {
        "scores": "score",
        "kl": "kl",
        "response_length": "tokens",
        "ended_share": "ended",
    }
    return {
        name: dataclasses.asdict(
            mean_estimate(np.array([response[of_one] for response in responses]))
        )
        for name, of_one in names.items()
    }
