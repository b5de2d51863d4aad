"""Supervised fine-tuning on demonstrations: the SFT baseline (paper, C.1) and the policy
that PPO starts from (C.3), which also trains on pretraining text.

The loss covers the tokens of the completions, not those of the prompts.

Departure from the paper: several demonstrations are packed into a row, and a batch counts
rows, so a batch of 32 holds more than 32 demonstrations.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from jax.sharding import AbstractMesh, Mesh

from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import Seed, check_range
from instructax.data.loaders import LmDataConfig, lm_reader, read_lm_data
from instructax.data.prompt_format import PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.validation import validation_losses
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.lora import LoraConfig
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig
from instructax.stages.memory import training_bytes
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import (
    check_lengths,
    check_lora,
    check_rows,
    count_steps,
)
from instructax.training.optimizer import OptimizerConfig
from instructax.training.run import Run, RunConfig
from instructax.training.state import adapter_initializer
from instructax.training.supervised import train_supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of supervised fine-tuning."""

    head: ClassVar[Head] = "tokens"

    stage: Literal["sft"]
    seed: Seed
    # Workdir of the run to start from; "" = fresh parameters.
    parent: str
    # Path of a tokenizer, or "bytes".
    tokenizer: str
    model: ModelConfig
    compute: ComputeConfig
    lora: LoraConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    data: LmDataConfig
    # Packed rows per batch.
    batch_size: int
    # Microbatches of a batch, computed one after the other.
    accumulate: int
    # Dropout rate of the residual branches.
    dropout: float
    # Passes over the demonstrations, or over the text if there are none; 0 = use `steps`.
    epochs: float
    # Optimizer steps; 0 = use `epochs`.
    steps: int
    run: RunConfig

    def __post_init__(self):
        counts = {"batch_size": 1, "accumulate": 1, "dropout": 0, "epochs": 0, "steps": 0}
        check_range(self, counts, {"dropout": 1})

    def parents(self) -> dict[str, ExpectedParent]:
        """The run to start from."""
        return {"parent": ExpectedParent(self.parent, self.model, "tokens")}

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat
    ) -> dict[str, PreparedData]:
        """Packed demonstrations and text, as far as there are files of them."""
        return read_lm_data(self.data, tokenizer, prompt_format)


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_rows("batch_size", config.batch_size, config.accumulate, mesh)
    check_lengths(config.data.limits, config.model)
    check_lora(config.lora, config.model, config.parent)


def row_lengths(config: Config) -> RowLengths:
    """Training runs whole rows, evaluation also pieces of them."""
    # False: no rows have a shared prefix.
    return split_lengths(config.compute, config.data.limits.sequence_tokens), False


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of the model and its optimizer."""
    return training_bytes("model", config, config.model, "tokens", config.optimizer, mesh)


def train(run: Run) -> None:
    """Fine-tunes the model on demonstrations, mixed with pretraining text if the config
    names any."""
    config: Config = run.config
    model = Transformer(config.model, config.compute, "tokens", run.mesh)
    read_batch = lm_reader(
        run.data,
        "train",
        text_fraction=config.data.text_fraction,
        sequence_tokens=config.data.limits.sequence_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    # Demonstrations and text are evaluated separately: their losses cannot be compared.
    validation = {}
    for name, prepared in run.data.items():
        validation[name] = prepared.sources["validation"]

    # The preview prints the first row of the first batch, where a wrong prompt format or
    # loss mask is visible.
    train_supervised(
        run,
        model,
        total_steps=_total_steps(config, run.data),
        read_batch=read_batch,
        evaluate=validation_losses(model, run.mesh, config, validation),
        add_adapters=adapter_initializer(config),
        preview=bool(config.data.demonstrations),
    )


def _total_steps(config: Config, data: Mapping[str, PreparedData]) -> int:
    # Epochs count the demonstrations, which fill only a part of each batch if it is mixed
    # with text.
    source = "text"
    share = 1.0
    if config.data.demonstrations:
        source = "demonstrations"
        share = 1.0 - config.data.text_fraction
    return count_steps(
        steps=config.steps,
        epochs=config.epochs,
        rows=len(data[source].sources["train"]),
        rows_per_step=share * config.batch_size,
    )
