"""Opens the policy of a finished run: network, parameters, tokenizer, chat template."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax import sharding
from instructax.checkpoints.parents import open_parent
from instructax.config import construct, require
from instructax.data.chat_template import (
    ChatTemplate,
    Message,
    encode_messages,
    load_template,
)
from instructax.data.tokenizer import Tokenizer, load_tokenizer
from instructax.models.config import ComputeConfig, ModelConfig
from instructax.models.init import abstract_params
from instructax.models.transformer import Transformer
from instructax.serving.engine import Engine

# Positions per row whose logits exist at one time; bounds the memory of the output head.
HEAD_CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy that is ready to sample: engine, tokenizer and optional chat template."""

    engine: Engine
    tokenizer: Tokenizer
    # None = the plain dialog format of the data.
    template: ChatTemplate | None

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """Returns the prompt i32[n] that asks for the assistant's next message."""
        return encode_messages(messages, self.tokenizer, self.template)


def open_policy(
    path: str | Path, compute: ComputeConfig
) -> tuple[Transformer, Any, Tokenizer]:
    """Loads a finished run onto the first device.

    The run's manifest names the model config and the tokenizer.

    Args:
      path: WORKDIR, WORKDIR@STEP or WORKDIR@best.
      compute: how the network is computed: dtypes, attention kernel, batch shapes.

    Returns:
      The network, its parameters and the tokenizer.

    Raises:
      ConfigError: the run is not finished, has no token head, or its tokenizer changed.
    """
    run = open_parent(path, "--workdir")
    manifest = run.manifest
    require(
        manifest["head"] == "tokens",
        f"{path} holds a run of the stage {manifest['stage']!r} with a {manifest['head']} "
        "head; only runs with a tokens head answer prompts",
    )
    config = construct(ModelConfig, manifest["model"], "model")
    model = Transformer(config, compute, "tokens")

    # The run's own copy; a changed one would turn the same ids into other text.
    tokenizer_path = run.workdir / "tokenizer.json"
    tokenizer = load_tokenizer(str(tokenizer_path))
    require(
        tokenizer.hash == manifest["tokenizer"]["hash"],
        f"{tokenizer_path} has changed since the run was trained: restore it",
    )

    # Parameters are read directly onto one device, whatever mesh the run was trained on.
    params = run.load(abstract_params(model, sharding.one_device_mesh()))
    return model, params, tokenizer


def open_served(path: str | Path, *, dtype: Any, batch_size: int) -> Policy:
    """Opens a finished run for sampling, up to `batch_size` requests at a time."""
    # One microbatch of all rows and one decode slot per row: nothing to compact or split.
    compute = ComputeConfig(
        dtype=dtype,
        decoding_dtype=dtype,
        attention="jax",
        remat="none",
        head_chunk=HEAD_CHUNK,
        microbatch_rows=batch_size,
        tail_splits=0,
        slots=batch_size,
        compaction_steps=0,
    )
    model, params, tokenizer = open_policy(path, compute)
    template = load_template(open_parent(path, "--workdir").workdir, tokenizer)
    engine = Engine(model, params, eos_id=tokenizer.eos_id, batch_size=batch_size)
    return Policy(engine=engine, tokenizer=tokenizer, template=template)
