"""Checks that stages share: how the values of a config fit each other and the mesh."""

import math
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from instructax import sharding
from instructax.config import INT_LIMIT, require
from instructax.data.limits import DataLimits
from instructax.models.config import ModelConfig
from instructax.models.lora import LoraConfig


def check_lengths(limits: DataLimits, model: ModelConfig) -> None:
    """Raises ConfigError unless the splits `train` and `validation` exist, and packed rows,
    as well as a prompt with its response, fit the model's positions."""
    # The two splits that stages read by name; other splits are allowed.
    names = [name for name, _ in limits.splits]
    require(
        {"train", "validation"} <= set(names),
        f"config.data.limits.splits has the names {names}: train and validation must be "
        "among them",
    )
    # The sampler's prompts and responses, and the packed rows of training.
    lengths = {
        "sequence_tokens": limits.sequence_tokens,
        "prompt_tokens + response_tokens": limits.prompt_tokens + limits.response_tokens,
    }
    for name, length in lengths.items():
        require(
            length <= model.max_length,
            f"config.data.limits.{name} = {length} is above config.model.max_length = "
            f"{model.max_length}: lower it",
        )


def check_lora(lora: LoraConfig, model: ModelConfig, parent: str) -> None:
    """Raises ConfigError for a LoRA rank above the model's width, or without a parent whose
    weights could stay frozen."""
    require(
        # A larger rank would have more parameters than the matrix that it adapts.
        lora.rank <= model.embed_dim,
        f"config.lora.rank = {lora.rank} is above config.model.embed_dim = "
        f"{model.embed_dim}: lower it, or set 0 to train all weights",
    )
    require(
        # Adapters of random weights could not learn much: the weights themselves stay as
        # they are.
        lora.rank == 0 or bool(parent),
        f"config.lora.rank = {lora.rank}, but there is no parent whose weights could stay "
        "frozen: name one, or set rank 0",
    )


def check_rows(name: str, rows: int, parts: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError unless `rows` split into `parts`, each spread evenly over the
    devices that share rows.

    Args:
      name: the config field that holds `rows`.
      rows: rows of one batch.
      parts: microbatches or minibatches that run one after the other.
      mesh: the mesh of the run.
    """
    # Devices that hold different rows; the others hold parts of the same parameters.
    row_shards = sharding.num_row_shards(mesh)
    # Every part is a batch of its own, with the same number of rows on every device.
    multiple = parts * row_shards
    require(
        rows > 0 and rows % multiple == 0,
        f"config.{name} = {rows} rows must be a positive multiple of {multiple} = {parts} "
        f"parts × {row_shards} devices that share rows; change it or config.mesh",
    )


def count_steps(*, steps: int, epochs: float, rows: int, rows_per_step: float) -> int:
    """Number of steps of a run: `steps`, or `epochs` over `rows`; the other must be 0."""
    require(
        # Exactly one of the two is set.
        min(steps, epochs) == 0 < max(steps, epochs),
        f"config.steps = {steps} and config.epochs = {epochs}: set one, the other to 0",
    )
    # The last epoch is completed: rounded up.
    total = steps or math.ceil(epochs * rows / rows_per_step)
    require(
        # Steps are int32 on the device.
        total < INT_LIMIT,
        f"config.epochs = {epochs} are {total:.3g} steps of {rows} rows: lower it",
    )
    return total


def uses_chat(config: Any) -> bool:
    """Whether a stage formats prompts with its parents' chat template. Stages without such
    prompts have no field for it."""
    # Not a field of all stages, hence the defaults.
    return bool(getattr(getattr(config, "data", None), "chat", False))
