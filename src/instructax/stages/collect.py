"""Collects comparisons: policies answer prompts of the simulated world, and its labelers
rank the answers.

The paper's step 2 (sections 3.2 and 3.4): what is compared comes mostly from supervised
policies, and K = 4 … 9 answers to a prompt are ranked together. Two files are written:
`comparisons.jsonl.gz` by the labelers whose judgement a reward model is trained on,
`held_out.jsonl.gz` with the same answers ranked by held-out labelers.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from instructax import rng
from instructax.checkpoints.parents import open_parent
from instructax.config import ConfigError, Seed, check_range, format_value, require
from instructax.data.batches import left_pad
from instructax.data.prompt_format import add_separator
from instructax.data.tokenizer import Tokenizer
from instructax.generation import generate
from instructax.models import ComputeConfig, ModelConfig, Transformer
from instructax.runtime.files import write_json
from instructax.serving.policy import open_policy
from instructax.simulation.files import read_world_spec, recreate_prompts
from instructax.simulation.labelers import create_labelers
from instructax.simulation.lexicon import generator, pick
from instructax.simulation.prompts import LABELERS_PER_GROUP, SimulatedPrompt
from instructax.simulation.write import (
    RESPONSES_PER_PROMPT,
    comparison_record,
    write_jsonl_gz,
)
from instructax.training.attention import NO_ROWS, RowLengths
from instructax.training.run import Run

Policy = tuple[Transformer, Any, Tokenizer]  # network, parameters, tokenizer
FILES = {"comparisons": "labeler", "held_out": "held-out"}  # file → group of labelers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared and by whom."""

    stage: Literal["collect"]
    seed: Seed
    world: str  # workdir of the world
    policies: tuple[tuple[str, int], ...]  # (workdir, answers it gives to each prompt)
    compute: ComputeConfig
    prompts: int  # the most prompts; the world's first
    prompt_tokens: int  # longer prompts are left out
    response_tokens: int
    batch_size: int
    noise: float  # times the labelers' own: 0 = labelers who never waver
    round: int  # another round samples other answers and asks other labelers

    def __post_init__(self):
        least = dict.fromkeys(
            ("prompts", "prompt_tokens", "response_tokens", "batch_size"), 1
        )
        check_range(self, least | {"noise": 0, "round": 0})
        if not self.policies or min(count for _, count in self.policies) < 1:
            raise ConfigError(
                f"policies = {format_value(self.policies)} must be one at least, each with one answer at least"
            )


def validate(config: Config, mesh: Any) -> None:
    """Raises ConfigError if several processes share the run: there is no mesh."""
    require(
        jax.process_count() == 1,
        "stage collect runs on one process: leave out --coordinator and --processes",
    )


def row_lengths(config: Config) -> RowLengths:
    """No rows: policies only sample, through a cache."""
    return NO_ROWS


def memory(config: Config, mesh: Any) -> dict[str, int]:
    """Nothing stays on a device."""
    return {}


def train(run: Run) -> None:
    """Writes the two files into the workdir; an interrupted run starts over. The policies
    answer on the first device."""
    config: Config = run.config
    workdir = run.workdir
    asked = recreate_prompts(Path(config.world), "comparisons")[: config.prompts]
    parents = [
        open_parent(path, f"config.policies.{i}")
        for i, (path, _) in enumerate(config.policies)
    ]
    policies = [open_policy(path, config.compute) for path, _ in config.policies]
    for model, _, _ in policies:
        check_policy_length(config, model.config)
    compared = draw_compared(
        sampled(config, policies, asked), generator(config.seed, f"compared {config.round}")
    )
    require(
        bool(compared),
        f"no prompt of {config.world} has two different answers: raise config.prompt_tokens = {config.prompt_tokens} "
        "if all are longer, or let config.policies give more",
    )
    for file, group in FILES.items():
        write_jsonl_gz(
            workdir / f"{file}.jsonl.gz", rankings(config, group, asked, compared)
        )
    figures = {"prompts": len(compared), "answers": sum(map(len, compared.values()))}
    lineage = {str(parent.workdir): parent.lineage() for parent in parents}
    write_json(
        workdir / "summary.json", {"stage": config.stage, **figures, "parents": lineage}
    )


def check_policy_length(config: Config, model: ModelConfig) -> None:
    """Raises ConfigError unless a prompt with its answer fits the positions of a policy."""
    length = config.prompt_tokens + config.response_tokens
    require(
        length <= model.max_length,
        f"config.prompt_tokens + config.response_tokens = {length} is above the {model.max_length} tokens of a policy: "
        "lower one of them",
    )


def sampled(
    config: Config, policies: list[Policy], asked: list[SimulatedPrompt]
) -> list[list[str]]:
    """What all policies answer to each prompt."""
    answers: list[list[str]] = [[] for _ in asked]
    for number, (path, count) in enumerate(config.policies):
        for index, response in sample_answers(
            config, policies[number], count, number, asked
        ):
            answers[index].append(response)
        print(f"{path}: {count} answers to each of {len(asked)} prompts", flush=True)
    return answers


def sample_answers(
    config: Config,
    policy: Policy,
    count: int,
    number: int,
    asked: list[SimulatedPrompt],
) -> Iterator[tuple[int, str]]:
    """(index of the prompt, answer) for `count` answers of a policy to each prompt that is
    not too long."""
    model, params, tokenizer = policy
    sample = partial(
        generate,
        model,
        length=config.response_tokens,
        temperature=1.0,
        eos_id=tokenizer.eos_id,
    )
    sample = jax.jit(sample)
    encoded = tokenizer.encode_batch([add_separator(one.task.prompt) for one in asked])
    fits = [i for i, tokens in enumerate(encoded) if len(tokens) <= config.prompt_tokens]
    # No two answers share a key: a round has its step, a policy and an answer their own
    # numbers.
    key = jax.random.fold_in(rng.step_key(config.seed, "collect", config.round), number)
    for start in range(0, len(fits), config.batch_size):
        rows = fits[start : start + config.batch_size]
        # The last batch is filled up with its first prompt, so that no shape changes.
        filled = rows + rows[:1] * (config.batch_size - len(rows))
        prompts = left_pad(
            [(i, encoded[row]) for i, row in enumerate(filled)],
            len(filled),
            config.prompt_tokens,
        )
        draws = np.array(filled)[:, None] + np.arange(count) * len(asked)
        rollouts = jax.device_get(
            sample(params, prompts, rng.sample_keys(key, jnp.array(draws.reshape(-1))))
        )
        for i, row in enumerate(np.repeat(rows, count)):
            length = int(rollouts.mask[i].sum()) - bool(rollouts.ended[i])
            yield int(row), tokenizer.decode(rollouts.responses[i][:length])


def draw_compared(
    answers: list[list[str]], rng: np.random.Generator
) -> dict[int, list[str]]:
    """By prompt, the answers that are compared: K = 4 … 9 of them at random, no two alike;
    prompts with fewer than two different ones are left out. Blank answers cannot be shown
    to anyone, and are none."""
    compared = {}
    for index, given in enumerate(answers):
        different = list(dict.fromkeys(answer for answer in given if answer.strip()))
        count = int(rng.integers(RESPONSES_PER_PROMPT[0], RESPONSES_PER_PROMPT[1] + 1))
        order = rng.permutation(len(different))[:count]
        if len(order) > 1:
            compared[index] = [different[i] for i in order]
    return compared


def rankings(
    config: Config,
    group: str,
    asked: list[SimulatedPrompt],
    compared: Mapping[int, list[str]],
) -> Iterator[dict[str, Any]]:
    """The records of the labelers of a group, each prompt by one of them."""
    rng = generator(config.seed, f"rankings {group} {config.round}")
    seed, _ = read_world_spec(Path(config.world))
    labelers = create_labelers(seed, group, LABELERS_PER_GROUP)
    for index, responses in compared.items():
        labeler = pick(rng, labelers)
        labeler = dataclasses.replace(labeler, noise=labeler.noise * config.noise)
        yield comparison_record(index, asked[index], responses, labeler, rng)
