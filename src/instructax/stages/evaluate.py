"""Compares finished policies on validation data, and the reward model with people. Trains
nothing.

Every policy answers the same validation prompts. Its responses, with reward-model scores
and the KL from the reference policy, go to `samples.jsonl`; its metrics, with confidence
intervals, go to `summary.json`.

The few-shot prompting of the paper's "GPT (prompted)" (section 3.5) and the accuracy on
held-out labelers (section 4.1) are followed. Departure from the paper: its win rates come
from human preferences; `proxy_win_rate` compares scores of the reward model.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

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
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.sequence_packing import packed_width
from instructax.models.transformer import Transformer
from instructax.runtime.metric_log import MetricLog
from instructax.sharding import MeshConfig
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_lengths, check_rows
from instructax.training.run import Run
from instructax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateData:
    """Files whose validation split is read; without text or comparisons, () leaves their
    metrics out.

    Few-shot examples are chosen on training prompts, never on the validation split.
    """

    prompts: tuple[str, ...]
    text: tuple[str, ...]
    # (name of a group of labelers, files of their rankings)
    comparisons: tuple[tuple[str, tuple[str, ...]], ...]
    # Source of few-shot examples.
    demonstrations: tuple[str, ...]
    # Whether prompts are formatted with the policies' chat template.
    chat: bool
    limits: DataLimits
    # Where prepared rows are kept.
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A comparison of policies."""

    # The run saves no network.
    head: ClassVar[Head | None] = None

    stage: Literal["evaluate"]
    seed: Seed
    # (name, workdir, mode: one of `policy_responses.ResponseMode`)
    policies: tuple[tuple[str, str, str], ...]
    # Name of the policy that win rates and KL are measured against.
    reference: str
    # Workdir of the reward model.
    reward_parent: str
    # Path of a tokenizer, or "bytes".
    tokenizer: str
    # Architecture of the policies.
    model: ModelConfig
    reward_model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    data: EvaluateData
    batch_size: int
    # At most this many validation prompts.
    prompts: int
    # At most this many batches of validation text and of comparisons.
    batches: int
    # Sampling temperature; 0 = greedy.
    temperature: float
    # Responses that "best-of" chooses from.
    best_of: int
    # Examples before a prompt in the mode "few-shot".
    shots: int
    # Random sets of examples that are compared.
    prefixes: int

    def __post_init__(self):
        least = {
            "batch_size": 1,
            "prompts": 1,
            "batches": 1,
            "best_of": 1,
            "shots": 1,
            "prefixes": 1,
            "temperature": 0,
        }
        check_range(self, least)
        # Names are keys of the summary, so they must be unique.
        names = [name for name, _, _ in self.policies]
        require_distinct("policies", names)
        require_distinct("data.comparisons", [name for name, _ in self.data.comparisons])
        self._check_modes()
        if self.reference not in names:
            raise ConfigError(
                f"reference = {format_value(self.reference)} must be one of the policies "
                f"{format_value(names)}"
            )
        workdirs = [self.reward_parent, *(path for _, path, _ in self.policies)]
        if not self.data.prompts or not all(workdirs):
            raise ConfigError(
                "data.prompts, reward_parent and the workdir of every policy must be "
                f"given: data.prompts = {format_value(self.data.prompts)}, reward_parent = "
                f"{format_value(self.reward_parent)}, policies = "
                f"{format_value(self.policies)}"
            )

    def _check_modes(self) -> None:
        allowed = get_args(ResponseMode)
        for name, _, mode in self.policies:
            if mode not in allowed:
                raise ConfigError(
                    f"policies.{name} is asked {format_value(mode)}: allowed are "
                    f"{', '.join(allowed)}"
                )
        if not self.uses_few_shot():
            return
        if self.data.chat:
            raise ConfigError(
                "data.chat = True does not allow few-shot: examples can precede plain "
                "prompts only"
            )
        if not self.data.demonstrations:
            raise ConfigError(
                "data.demonstrations must be given: a policy is asked few-shot, and its "
                "examples are taken from them"
            )

    def uses_few_shot(self) -> bool:
        """Whether any policy gets few-shot examples."""
        return any(mode == "few-shot" for _, _, mode in self.policies)

    def parents(self) -> dict[str, ExpectedParent]:
        """The policies, and the reward model that scores them."""
        expected: dict[str, ExpectedParent] = {}
        for name, path, _ in self.policies:
            expected[f"policies.{name}"] = ExpectedParent(path, self.model, "tokens")
        # The only network with another head.
        expected["reward_parent"] = ExpectedParent(
            self.reward_parent, self.reward_model, "scalar"
        )
        return expected

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat = PLAIN_FORMAT
    ) -> dict[str, PreparedData]:
        """Prompts, and text and comparisons if there are files of them."""
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
        # One data set per group of labelers: their rankings are never mixed.
        for name, paths in data.comparisons:
            files = [Path(path) for path in paths]
            prepared[f"comparisons.{name}"] = prepare_comparisons(
                files, tokenizer, data.limits, folder, prompt_format
            )
        return prepared


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    # 1: no gradients are accumulated.
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
    if config.uses_few_shot():
        # Few-shot examples fill the context up to its last token.
        widths.append(max(pair, config.model.max_length))
    if config.data.comparisons:
        widths.append(limits.comparison_tokens)
    # Only rows of comparisons have a shared prefix.
    return split_lengths(config.compute, *widths), bool(config.data.comparisons)


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Nothing is trained."""
    return {}


def train(run: Run) -> None:
    """Runs the comparison; an interrupted run starts over."""
    config: Config = run.config
    run.write_manifest()
    # The reference and the reward model stay in memory; policies are loaded one by one.
    ref_params = _load(run, run.parents[f"policies.{config.reference}"], "tokens")
    reward_params = _load(run, run.parents["reward_parent"], "scalar")
    policy = Transformer(config.model, config.compute, "tokens", run.mesh)
    reward_model = Transformer(config.reward_model, config.compute, "scalar", run.mesh)

    evaluator = PolicyEvaluator(
        policy,
        reward_model,
        run.mesh,
        run.tokenizer,
        config.data.limits,
        ref_params,
        reward_params,
        temperature=config.temperature,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    validation_loss = ValidationLoss(
        policy,
        run.mesh,
        batch_size=config.batch_size,
        max_batches=config.batches,
        sequence_tokens=config.data.limits.sequence_tokens,
    )
    # Filled below, in the order of the file.
    summary: dict[str, Any] = {"stage": config.stage, "policies": {}, "prefixes": {}}
    # No TensorBoard: a curve over policies would mean nothing.
    log = MetricLog(
        run.workdir,
        total_steps=len(config.policies),
        log_every=1,
        start_step=0,
        tensorboard=False,
        console=True,
    )
    with log:
        scores = _evaluate_policies(run, evaluator, validation_loss, log, summary)
        for name in scores:
            # Both answered the same prompts, so the scores are paired.
            wins = win_rate(scores[name], scores[config.reference])
            summary["policies"][name]["proxy_win_rate"] = dataclasses.asdict(wins)
        summary["reward_model"] = _evaluate_reward_model(run, reward_model, reward_params)
        log.flush()
        log.write_summary(summary)


def _evaluate_policies(
    run: Run,
    evaluator: PolicyEvaluator,
    validation_loss: ValidationLoss,
    log: MetricLog,
    summary: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Evaluates one policy after the other; one policy is a step of the log.

    Args:
      run: the run.
      evaluator: samples and scores responses.
      validation_loss: computes the loss on validation text.
      log: receives samples and metrics.
      summary: receives `policies` (metrics by policy) and `prefixes` (the few-shot text of
        each policy that has one).

    Returns:
      Name of a policy → reward-model score of each prompt, f[prompts].
    """
    config: Config = run.config
    scores: dict[str, np.ndarray] = {}
    for number, (name, _, mode) in enumerate(config.policies, start=1):
        params = _load(run, run.parents[f"policies.{name}"], "tokens")
        # Without examples the prefix is empty, i32[0].
        prefix = np.zeros(0, np.int32)
        if mode == "few-shot":
            summary["prefixes"][name], prefix = _best_prefix(run, evaluator, params)

        # The reward model scores every response; "best-of" keeps the best of several.
        responses = evaluator.responses(
            params,
            run.data["prompts"].sources["validation"],
            config.prompts,
            prefix=prefix,
            num_samples=config.best_of if mode == "best-of" else 1,
        )
        scores[name] = np.array([response["score"] for response in responses])
        for response in responses:
            log.write_sample(number, {"policy": name, **response})

        metrics = response_metrics(responses)
        if "text" in run.data:
            text = run.data["text"].sources["validation"]
            metrics["text_loss"] = validation_loss.estimate(params, text)
        summary["policies"][name] = metrics
        # The log has the values alone, the summary also their intervals.
        log.record(number, {metric: found["value"] for metric, found in metrics.items()})
    return scores


def _best_prefix(
    run: Run, evaluator: PolicyEvaluator, params: Params
) -> tuple[str, np.ndarray]:
    """Text and tokens i32[n] of the few-shot examples of one policy."""
    config: Config = run.config
    # Training prompts, so that no validation prompt takes part in the choice.
    return evaluator.best_prefix(
        params,
        run.data["prompts"].sources["train"],
        read_examples(config),
        shots=config.shots,
        prefixes=config.prefixes,
        seed=config.seed,
    )


def _evaluate_reward_model(
    run: Run, reward_model: Transformer, reward_params: Params
) -> dict[str, Any]:
    """Name of each group of labelers → how well the reward model predicts its rankings."""
    config: Config = run.config
    limits = config.data.limits
    comparisons: dict[str, PreparedData] = {}
    # Tokens of the longest sequence of each split.
    longest: list[int] = []
    for name, _ in config.data.comparisons:
        comparisons[name] = run.data[f"comparisons.{name}"]
        longest += comparisons[name].report.longest.values()

    # One width for all groups, so that the program is compiled once.
    ranking = Ranking(
        reward_model,
        run.mesh,
        limits,
        batch_size=config.batch_size,
        max_batches=config.batches,
        width=packed_width(longest, limits.comparison_tokens, config.compute),
    )
    estimates = {}
    for name, prepared in comparisons.items():
        estimates[name] = ranking.estimates(reward_params, prepared.sources["validation"])
    return estimates


def read_examples(config: Config) -> list[Demonstration]:
    """The demonstrations that few-shot examples are drawn from."""
    files = [Path(path) for path in config.data.demonstrations]
    return list(read_jsonl(files, Demonstration))


def _load(run: Run, parent: Parent, head: Head) -> Params:
    """The parameters of a parent, sharded over the mesh."""
    config: Config = run.config
    # Policies share one architecture; the reward model has its own.
    architecture = config.model if head == "tokens" else config.reward_model
    network = Transformer(architecture, config.compute, head)
    return parent.load(abstract_params(network, run.mesh))


def response_metrics(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the responses of one policy, with confidence intervals.

    Args:
      responses: records as `PolicyEvaluator.responses` returns them.

    Returns:
      Name of a metric → the fields of its `Estimate`.
    """
    # Metric → field of a response. A truth value counts as 0 or 1, so its mean is a share.
    fields = {
        "scores": "score",
        "kl": "kl",
        "response_length": "tokens",
        "ended_share": "ended",
    }
    metrics = {}
    for metric, field in fields.items():
        values = np.array([response[field] for response in responses])
        metrics[metric] = dataclasses.asdict(mean_estimate(values))
    return metrics
