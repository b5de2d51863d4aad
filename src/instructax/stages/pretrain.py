"""Pretraining on text: the base model, "GPT" in the paper's figures.

The paper starts from GPT-3 (section 3.5); this pipeline also trains the base model, so that
every claim can be tested starting from random parameters. The loss is the mean next-token
loss over packed rows of text.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from jax.sharding import AbstractMesh, Mesh

from instructax.checkpoints.parents import ExpectedParent, Head
from instructax.config import ConfigError, Seed, check_range, format_value
from instructax.data.limits import DataLimits
from instructax.data.loaders import lm_reader
from instructax.data.prepare import prepare_text
from instructax.data.prompt_format import PromptFormat
from instructax.data.storage import PreparedData
from instructax.data.tokenizer import Tokenizer
from instructax.evals.validation import validation_losses
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.transformer import Transformer
from instructax.sharding import MeshConfig
from instructax.stages.memory import training_bytes
from instructax.training.attention import RowLengths, split_lengths
from instructax.training.checks import check_lengths, check_rows, count_steps
from instructax.training.optimizer import OptimizerConfig
from instructax.training.run import Run, RunConfig
from instructax.training.supervised import train_supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainData:
    """Files of text; a part of their documents is split off for validation."""

    text: tuple[str, ...]
    limits: DataLimits
    # Where prepared rows are kept.
    folder: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run of pretraining."""

    head: ClassVar[Head] = "tokens"

    stage: Literal["pretrain"]
    seed: Seed
    # Workdir of the run to start from; "" = fresh parameters.
    parent: str
    # Path of a tokenizer, or "bytes".
    tokenizer: str
    model: ModelConfig
    compute: ComputeConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    data: PretrainData
    # Packed rows per batch.
    batch_size: int
    # Microbatches of a batch, computed one after the other.
    accumulate: int
    # Dropout rate of the residual branches.
    dropout: float
    # Passes over the text; 0 = use `steps`.
    epochs: float
    # Optimizer steps; 0 = use `epochs`.
    steps: int
    run: RunConfig

    def __post_init__(self):
        counts = {"batch_size": 1, "accumulate": 1, "dropout": 0, "epochs": 0, "steps": 0}
        check_range(self, counts, {"dropout": 1})
        if not self.data.text:
            raise ConfigError(
                f"data.text = {format_value(self.data.text)} must name one .jsonl.gz file "
                "or more (docs/data.md)"
            )

    def parents(self) -> dict[str, ExpectedParent]:
        """The run to start from."""
        return {"parent": ExpectedParent(self.parent, self.model, "tokens")}

    def prepare_data(
        self, tokenizer: Tokenizer, prompt_format: PromptFormat
    ) -> dict[str, PreparedData]:
        """Packed rows of text."""
        # Text has no prompts, so `prompt_format` is not used.
        data = self.data
        files = [Path(path) for path in data.text]
        return {"text": prepare_text(files, tokenizer, data.limits, Path(data.folder))}


def validate(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for values that do not fit each other or the mesh."""
    check_rows("batch_size", config.batch_size, config.accumulate, mesh)
    check_lengths(config.data.limits, config.model)


def row_lengths(config: Config) -> RowLengths:
    """Training runs whole rows, evaluation also pieces of them."""
    # False: no rows have a shared prefix.
    return split_lengths(config.compute, config.data.limits.sequence_tokens), False


def memory(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes per device of the model and its optimizer."""
    return training_bytes("model", config, config.model, "tokens", config.optimizer, mesh)


def train(run: Run) -> None:
    """Trains the model on text."""
    config: Config = run.config
    model = Transformer(config.model, config.compute, "tokens", run.mesh)
    rows = run.data["text"].sources
    read_batch = lm_reader(
        run.data,
        "train",
        text_fraction=1.0,
        sequence_tokens=config.data.limits.sequence_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    # A row holds several documents, so an epoch is counted in rows.
    total_steps = count_steps(
        steps=config.steps,
        epochs=config.epochs,
        rows=len(rows["train"]),
        rows_per_step=config.batch_size,
    )
    validation = {"text": rows["validation"]}
    train_supervised(
        run,
        model,
        total_steps=total_steps,
        read_batch=read_batch,
        evaluate=validation_losses(model, run.mesh, config, validation),
    )
