"""Collects comparisons: policies answer prompts of the simulated world, and its labelers
rank the responses.

This is the first half of the paper's step 2: most responses come from supervised policies
(section 3.1), the K = 4 … 9 responses to a prompt are ranked together (section 3.5), and a
second group of labelers produces no training data (section 3.4). Two files are written:
`comparisons.jsonl.gz` has the rankings that the reward model is trained on,
`held_out.jsonl.gz` those of the held-out labelers for the same responses.

Departure from the paper: the labelers are simulated, see `simulation.labelers`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from instructax import rng
from instructax.checkpoints.parents import Parent, open_parent
from instructax.config import ConfigError, Seed, check_range, format_value, require
from instructax.data.batches import left_pad
from instructax.data.prompt_format import add_separator
from instructax.data.tokenizer import Tokenizer
from instructax.generation.sampler import generate
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.transformer import Transformer
from instructax.runtime.files import write_json
from instructax.serving.policy import open_policy
from instructax.simulation.files import read_world_spec, recreate_prompts
from instructax.simulation.labelers import create_labelers
from instructax.simulation.lexicon import pick, rng_for
from instructax.simulation.prompts import LABELERS_PER_GROUP, SimulatedPrompt
from instructax.simulation.write import (
    RESPONSES_PER_PROMPT,
    comparison_record,
    write_jsonl_gz,
)
from instructax.training.attention import NO_ROWS, RowLengths
from instructax.training.run import Run
from instructax.types import Rollouts

# Network, parameters, tokenizer.
CollectPolicy = tuple[Transformer, Any, Tokenizer]

# Name of an output file → the group of labelers who rank for it.
FILES = {"comparisons": "labeler", "held_out": "held-out"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which responses are compared, and how noisy the labelers are."""

    stage: Literal["collect"]
    seed: Seed
    # Workdir of the world.
    world: str
    # (workdir, responses to each prompt) of each policy.
    policies: tuple[tuple[str, int], ...]
    compute: ComputeConfig
    # At most this many; the first prompts of the world are used.
    prompts: int
    # Longer prompts are left out.
    prompt_tokens: int
    response_tokens: int
    batch_size: int
    # Multiplies the labelers' own noise; 0 = labelers without noise.
    noise: float
    # Another round samples other responses and draws other labelers.
    round: int

    def __post_init__(self):
        least = {
            "prompts": 1,
            "prompt_tokens": 1,
            "response_tokens": 1,
            "batch_size": 1,
            "noise": 0,
            "round": 0,
        }
        check_range(self, least)
        if not self.policies or min(count for _, count in self.policies) < 1:
            raise ConfigError(
                f"policies = {format_value(self.policies)} must be one at least, each with "
                "one response at least"
            )


def validate(config: Config, mesh: Any) -> None:
    """Raises ConfigError if several processes share the run: there is no mesh."""
    require(
        jax.process_count() == 1,
        "stage collect runs on one process: leave out --coordinator and --processes",
    )


def row_lengths(config: Config) -> RowLengths:
    """No rows: policies only sample, from a KV cache."""
    return NO_ROWS


def memory(config: Config, mesh: Any) -> dict[str, int]:
    """Nothing is held on a device throughout the run."""
    return {}


def train(run: Run) -> None:
    """Writes the two files into the workdir, sampling on the first device.

    An interrupted run starts over.
    """
    config: Config = run.config
    prompts = recreate_prompts(Path(config.world), "comparisons")[: config.prompts]

    # Everything that can be refused is refused before anything is sampled. Parents are
    # opened for the summary, policies for sampling.
    parents: list[Parent] = []
    for i, (path, _) in enumerate(config.policies):
        parents.append(open_parent(path, f"config.policies.{i}"))
    policies = [open_policy(path, config.compute) for path, _ in config.policies]
    for model, _, _ in policies:
        check_policy_length(config, model.config)

    responses = sample_policies(config, policies, prompts)
    compared = draw_compared(responses, rng_for(config.seed, f"compared {config.round}"))
    require(
        bool(compared),
        f"no prompt of {config.world} has two different responses: raise "
        f"config.prompt_tokens = {config.prompt_tokens} if all are longer, or let "
        "config.policies give more",
    )

    # Both groups rank the same responses, so their agreement can be measured.
    for file, group in FILES.items():
        records = rankings(config, group, prompts, compared)
        write_jsonl_gz(run.workdir / f"{file}.jsonl.gz", records)
    _write_summary(run, parents, compared)


def _write_summary(
    run: Run, parents: list[Parent], compared: Mapping[int, list[str]]
) -> None:
    """Counts and parents; the file marks the run as finished, so it comes last."""
    lineage: dict[str, Any] = {}
    for parent in parents:
        lineage[str(parent.workdir)] = parent.lineage()
    summary = {
        "stage": run.config.stage,
        "prompts": len(compared),
        "answers": sum(map(len, compared.values())),
        "parents": lineage,
    }
    write_json(run.workdir / "summary.json", summary)


def check_policy_length(config: Config, model: ModelConfig) -> None:
    """Raises ConfigError unless the context of a policy holds a prompt and a response."""
    length = config.prompt_tokens + config.response_tokens
    require(
        length <= model.max_length,
        f"config.prompt_tokens + config.response_tokens = {length} is above the "
        f"{model.max_length} tokens of a policy: lower one of them",
    )


def sample_policies(
    config: Config, policies: list[CollectPolicy], prompts: list[SimulatedPrompt]
) -> list[list[str]]:
    """The responses of all policies to each prompt, in the order of the policies."""
    responses: list[list[str]] = [[] for _ in prompts]
    for number, (path, count) in enumerate(config.policies):
        policy = policies[number]
        for index, response in sample_policy(config, policy, count, number, prompts):
            responses[index].append(response)
        print(f"{path}: {count} responses to each of {len(prompts)} prompts", flush=True)
    return responses


def sample_policy(
    config: Config,
    policy: CollectPolicy,
    count: int,
    number: int,
    prompts: list[SimulatedPrompt],
) -> Iterator[tuple[int, str]]:
    """Samples responses of one policy; prompts that are too long are passed over.

    Args:
      config: the config of the run.
      policy: the policy.
      count: responses to each prompt.
      number: index of the policy, part of its random keys.
      prompts: the prompts.

    Yields:
      (index of the prompt, response).
    """
    model, params, tokenizer = policy
    sample = _compiled_sampler(config, model, tokenizer.eos_id)
    # The separator that precedes a completion in every stage.
    encoded = tokenizer.encode_batch([add_separator(one.task.prompt) for one in prompts])
    fits = [i for i, tokens in enumerate(encoded) if len(tokens) <= config.prompt_tokens]

    # No two responses share a key: the round is the step of the key, the policy is folded
    # in, and each response has its own sample number.
    key = jax.random.fold_in(rng.step_key(config.seed, "collect", config.round), number)
    for start in range(0, len(fits), config.batch_size):
        rows = fits[start : start + config.batch_size]
        # The last batch is filled up with its first prompt, so that no shape changes and
        # `sample` is compiled once.
        filled = rows + rows[:1] * (config.batch_size - len(rows))
        numbered = [(i, encoded[row]) for i, row in enumerate(filled)]
        # [B, P]
        batch = left_pad(numbered, len(filled), config.prompt_tokens)
        # [B, count] → [B · count], the responses to one prompt next to each other.
        draws = np.array(filled)[:, None] + np.arange(count) * len(prompts)
        keys = rng.sample_keys(key, jnp.array(draws.reshape(-1)))
        rollouts = jax.device_get(sample(params, batch, keys))

        # Only the first `rows` are read: the rest is filling.
        for i, row in enumerate(np.repeat(rows, count)):
            # The mask includes the end token, which is not part of the text.
            length = int(rollouts.mask[i].sum()) - bool(rollouts.ended[i])
            yield int(row), tokenizer.decode(rollouts.responses[i][:length])


def _compiled_sampler(
    config: Config, model: Transformer, eos_id: int
) -> Callable[..., Rollouts]:
    """`sample(params, prompts [B, P], keys [B · count])` at temperature 1, under jit."""
    compiled = jax.jit(
        generate, static_argnums=0, static_argnames=("length", "temperature", "eos_id")
    )
    return partial(
        compiled,
        model,
        length=config.response_tokens,
        temperature=1.0,
        eos_id=eos_id,
    )


def draw_compared(
    sampled: list[list[str]], random: np.random.Generator
) -> dict[int, list[str]]:
    """Draws the K = 4 … 9 responses to each prompt that are compared (paper, section 3.5).

    No two of them are equal, and blank responses are never shown to labelers.

    Args:
      sampled: the responses to each prompt.
      random: the random numbers.

    Returns:
      Index of a prompt → responses in the order drawn. Prompts with fewer than two
      different responses are left out.
    """
    compared = {}
    for index, responses in enumerate(sampled):
        # A dict drops duplicates and keeps the order.
        different = list(dict.fromkeys(text for text in responses if text.strip()))
        count = int(random.integers(RESPONSES_PER_PROMPT[0], RESPONSES_PER_PROMPT[1] + 1))
        order = random.permutation(len(different))[:count]
        if len(order) > 1:
            compared[index] = [different[i] for i in order]
    return compared


def rankings(
    config: Config,
    group: str,
    prompts: list[SimulatedPrompt],
    compared: Mapping[int, list[str]],
) -> Iterator[dict[str, Any]]:
    """Comparison records by one group of labelers; one of them ranks each prompt."""
    random = rng_for(config.seed, f"rankings {group} {config.round}")
    seed, _ = read_world_spec(Path(config.world))
    labelers = create_labelers(seed, group, LABELERS_PER_GROUP)
    for index, responses in compared.items():
        # One labeler per prompt, as in the paper: a ranking is one person's.
        labeler = pick(random, labelers)
        labeler = dataclasses.replace(labeler, noise=labeler.noise * config.noise)
        yield comparison_record(index, prompts[index], responses, labeler, random)
