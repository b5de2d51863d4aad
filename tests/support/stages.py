"""Shared by the stage tests: batches, programs, plain references, and ways to watch a run.

A plain reference runs every document alone from column 0: no left padding, packing, chunks
or mask. It sums in float64.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.support import tiny_models

from instructax import experiment, sharding
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.manifest import write_manifest
from instructax.data.tokenizer import load_tokenizer
from instructax.experiment import RunSpec
from instructax.models.config import ModelConfig
from instructax.models.transformer import Transformer, head_kernel
from instructax.runtime.files import write_json
from instructax.sharding import MeshConfig
from instructax.stages import build_config, load_stage
from instructax.stages.ppo import algorithm
from instructax.training import loop
from instructax.training.attention import select_attention_kernel
from instructax.training.optimizer import make_optimizer
from instructax.training.settings import OptimizerSettings
from instructax.training.state import new_state, no_adapters, start_from
from instructax.training.supervised import SupervisedSettings
from instructax.types import Comparisons, LmBatch, PpoState, Rollouts

CHAIN = "experiments/alignment.py"
MAKE_MESH = sharding.make_mesh


def use_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Restricts every stage to the first `count` devices."""
    monkeypatch.setattr(
        sharding, "make_mesh", partial(MAKE_MESH, devices=jax.devices()[:count])
    )


def config_of(root: Path, name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config of the chain's run `name` with `overrides`. Data and parents are those of
    the chain."""
    runs = {
        run.name: run for run in experiment.load_file(CHAIN).get_runs("tiny", str(root))
    }
    run = runs[name]
    return experiment.load_config(RunSpec(name, run.config, {**run.overrides, **overrides}))


def config_with_kernel(values: dict[str, Any]) -> Any:
    """The Config that a stage trains with, with its attention kernel selected."""
    config = build_config(values)
    lengths = load_stage(config.stage).row_lengths(config)
    return select_attention_kernel(config, lengths)[0]


class Watch:
    """Records the first and last state of a run's training loop, and can interrupt it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        interrupt_at: int | None = None,
        enter: bool = True,
    ):
        self.first: Any = None
        self.last: Any = None
        self.read: list[Any] = []  # functions called with the step before its batch is read
        fit = loop.fit

        def watched(state: Any, callbacks: Any, outputs: Any, **rest: Any) -> Any:
            self.first = jax.device_get(state)
            if not enter:
                raise Stopped

            def read(step: int) -> Any:
                for function in self.read:
                    function(step)
                if step == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                return callbacks.read_batch(step)

            watched_callbacks = dataclasses.replace(callbacks, read_batch=read)
            state, metrics = fit(state, watched_callbacks, outputs, **rest)
            self.last = jax.device_get(state)
            return state, metrics

        monkeypatch.setattr(loop, "fit", watched)


class Stopped(Exception):
    """Raised on purpose to stop a run before its first step."""


def initial_state(config: dict[str, Any], workdir: Path) -> Any:
    """The state that a run starts from; trains nothing."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        watch = Watch(monkeypatch, enter=False)
        experiment.run_stage(config, workdir)
    return watch.first


def write_finished_run(
    workdir: Path, model: ModelConfig, params: Any, tokenizer_path: str
) -> Path:
    """Writes a finished supervised run with these parameters, without training it."""
    checkpoints = Checkpoints(
        workdir, save_every=1, keep=1, best_metric="", best_mode="max", exported="params"
    )
    checkpoints.save(1, new_state(params, optax.identity()), {})
    checkpoints.close()
    write_manifest(
        workdir,
        stage="sft",
        config={},
        model=vars(model),
        head="tokens",
        tokenizer_hash=load_tokenizer(tokenizer_path).hash,
        tokenizer_path=tokenizer_path,
        data_hashes={},
        parents={},
    )
    write_json(workdir / "summary.json", {})
    return workdir


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over as many devices as its axes need."""
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return MAKE_MESH(config, jax.devices()[: data * fsdp * tensor])


def packed_rows(rows: int, columns: int, seed: int = 0) -> LmBatch:
    """Rows of two documents and padding.

    Lengths and numbers of trained tokens differ by row. The last row is empty.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(tiny_models.VOCAB_SIZE, size=(rows, columns)).astype(np.int32)
    segments = np.zeros_like(tokens)
    positions = np.zeros_like(tokens)
    loss_mask = np.zeros(tokens.shape, bool)
    for row in range(rows - 1):
        first = min(row + 2, columns // 2)
        second = columns // 2 - 1
        for number, (start, size) in enumerate(((0, first), (first, second)), start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            loss_mask[row, start + 1 : start + size] = True
    return LmBatch(
        tokens=tokens, segments=segments, positions=positions, loss_mask=loss_mask
    )


def comparisons(answers: Sequence[int], columns: int, seed: int = 0) -> Comparisons:
    """One prompt for each entry of `answers`, which is its number of valid answers.

    Ranks tie occasionally. Prompt 0 has only ties, and therefore no pair.
    """
    rng = np.random.default_rng(seed)
    shape = (len(answers), max(answers), columns)
    valid = np.arange(shape[1])[None] < np.asarray(answers)[:, None]
    ranks = rng.integers(3, size=shape[:2]).astype(np.int32)
    ranks[1:, :2] = [1, 0]
    ranks[0] = 1
    lengths = rng.integers(1, columns + 1, size=shape[:2])
    prompts = tiny_models.ragged_prompts(
        rng.integers(1, 6, len(answers)), columns=6, seed=seed
    )
    return Comparisons(
        prompts=jax.tree.map(np.asarray, prompts),
        responses=rng.integers(tiny_models.VOCAB_SIZE, size=shape).astype(np.int32),
        mask=(np.arange(columns) < lengths[..., None]) & valid[..., None],
        ranks=ranks,
        valid=valid,
        labeler=np.zeros(shape[0], np.int32),
    )


def supervised_settings(
    *, learning_rate: float = 1.0, dropout: float = 0.0, seed: int = 0
) -> SupervisedSettings:
    """Settings as arrays."""
    return SupervisedSettings(
        seed=jnp.int32(seed),
        optimizer=OptimizerSettings(learning_rate=jnp.float32(learning_rate)),
        dropout=jnp.float32(dropout),
    )


def ppo_program(mesh: jax.sharding.Mesh, **changes: Any) -> algorithm.PpoProgram:
    """PPO with small networks of both families.

    Adam's epsilon is large enough that rounding errors do not become whole steps.
    """
    optimizer = changes.pop(
        "optimizer", tiny_models.optimizer_config(epsilon=1e-3, clip_norm=1.0)
    )
    compute = tiny_models.compute()
    # `value_optimizer` among `changes` is the program's optax transformation.
    options: dict[str, Any] = {
        "steps": 10,
        "minibatches": 2,
        "inner_epochs": 1,
        "old_logprobs": "recomputed",
        "no_eos_rule": "subtract",
        "whiten_rewards": False,
        "whiten_advantages": True,
    }
    options = {name: changes.pop(name, value) for name, value in options.items()}
    values: dict[str, Any] = {
        "options": algorithm.PpoOptions(
            optimizer=optimizer, value_optimizer=optimizer, **options
        ),
        "policy": Transformer(tiny_models.gpt_config(), compute, "tokens"),
        "value_model": Transformer(tiny_models.llama_config(), compute, "scalar"),
        "policy_optimizer": make_optimizer(optimizer),
        "value_optimizer": make_optimizer(optimizer),
        "mesh": mesh,
        "eos_id": 21,  # a token that random policies sample occasionally
        "response_tokens": 7,
        "row_tokens": 16,
        "clip_values": True,
    }
    return algorithm.PpoProgram(**{**values, **changes})


def with_options(program: algorithm.PpoProgram, **changes: Any) -> algorithm.PpoProgram:
    """The program with some of its options changed."""
    options = dataclasses.replace(program.options, **changes)
    return dataclasses.replace(program, options=options)


def ppo_settings(seed: int = 3, **changes: float) -> algorithm.PpoSettings:
    """Settings as arrays."""
    values = {
        "kl_coef": 0.1,
        "discount": 1.0,
        "lambda_": 0.95,
        "no_eos_penalty": 0.5,
        "temperature": 1.0,
        "clip": 0.2,
        "value_clip": 0.2,
        "ptx_coef": 1.5,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "ema_decay": 0.9,
    }
    arrays = {name: jnp.float32(value) for name, value in {**values, **changes}.items()}
    return algorithm.PpoSettings(
        seed=jnp.int32(seed),
        optimizer=OptimizerSettings(learning_rate=arrays.pop("learning_rate")),
        value_optimizer=OptimizerSettings(learning_rate=arrays.pop("value_learning_rate")),
        **arrays,
    )


def ppo_state(program: algorithm.PpoProgram, seed: int = 0) -> PpoState:
    """A state with random networks."""
    policy = start_from(
        tiny_models.random_params(program.policy, seed),
        program.policy_optimizer,
        program.mesh,
        no_adapters,
    )
    value = start_from(
        tiny_models.random_params(program.value_model, seed + 1),
        program.value_optimizer,
        program.mesh,
        no_adapters,
    )
    return PpoState(policy=policy, value=value, ema=jax.tree.map(jnp.copy, policy.params))


def no_phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Stands in for a log that times phases."""
    return contextlib.nullcontext()


def copy_of(tree: Any) -> Any:
    """A copy with its own buffers, which survive the donation of `tree`."""
    return jax.tree.map(jnp.copy, tree)


def documents_of(batch: LmBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, loss_mask) of each document in packed rows."""
    tokens = np.asarray(batch.tokens)
    segments = np.asarray(batch.segments)
    loss_mask = np.asarray(batch.loss_mask)
    documents = []
    for row in range(len(tokens)):
        # Segment 0 is padding.
        for number in range(1, segments[row].max() + 1):
            own = segments[row] == number
            documents.append((tokens[row, own], loss_mask[row, own]))
    return documents


def responses_of(rollouts: Rollouts) -> list[np.ndarray]:
    """Prompt and response of each row as one document."""
    prompts = np.asarray(rollouts.prompts.tokens)
    prompt_mask = np.asarray(rollouts.prompts.mask)
    responses = np.asarray(rollouts.responses)
    response_mask = np.asarray(rollouts.mask)
    documents = []
    for row in range(len(prompts)):
        prompt = prompts[row][prompt_mask[row]]
        response = responses[row][response_mask[row]]
        documents.append(np.concatenate([prompt, response]))
    return documents


def comparison_documents(batch: Comparisons, prompt: int) -> list[np.ndarray]:
    """Prompt and response as one document, for each valid response to a prompt."""
    start = batch.prompts.tokens[prompt][batch.prompts.mask[prompt]]
    documents = []
    for response, mask, valid in zip(
        batch.responses[prompt], batch.mask[prompt], batch.valid[prompt], strict=True
    ):
        if valid:
            documents.append(np.concatenate([start, response[mask]]))
    return documents


def plain_ranking(
    model: Transformer, params: Any, batch: Comparisons
) -> tuple[float, int, int]:
    """(mean loss over prompts with a pair, correctly ordered pairs, pairs), scoring each
    response alone."""
    losses = []
    correct = 0
    count = 0
    for prompt in range(len(batch.ranks)):
        scores = plain_scores(model, params, comparison_documents(batch, prompt))
        ranks = np.asarray(batch.ranks[prompt])[np.asarray(batch.valid[prompt])]
        margins = []
        for better, worse in itertools.permutations(range(len(scores)), 2):
            if ranks[better] < ranks[worse]:
                margins.append(scores[better] - scores[worse])
        if margins:
            prompt_losses = [math.log1p(math.exp(-margin)) for margin in margins]
            losses.append(sum(prompt_losses) / len(margins))
        correct += sum(margin > 0 for margin in margins)
        count += len(margins)
    return sum(losses) / len(losses), correct, count


BLOCK = 16  # batch size; fixed, so that any number of documents compiles once


@partial(jax.jit, static_argnums=0)
def _outputs(model: Transformer, params: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    outputs: Any = model.apply(
        {"params": params}, tokens, jnp.ones_like(tokens), positions
    )[0]
    if model.head == "scalar":
        return outputs
    logits = outputs @ head_kernel(model.config, params).T
    cap = model.config.final_logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


def plain_outputs(
    model: Transformer, params: Any, documents: Sequence[np.ndarray]
) -> np.ndarray:
    """Logits f64[n, T, V] or scalars f64[n, T], one document per row.

    Columns after a document's end are meaningless.
    """
    tokens = np.zeros(
        (-(-len(documents) // BLOCK) * BLOCK, model.config.max_length), np.int32
    )
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = document
    blocks = []
    for start in range(0, len(tokens), BLOCK):
        blocks.append(_outputs(model, params, tokens[start : start + BLOCK]))
    return np.concatenate(blocks).astype(np.float64)[: len(documents)]


def plain_logprobs(
    model: Transformer,
    params: Any,
    documents: Sequence[np.ndarray],
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Log-probability of each token given the previous ones: f64[length] for each document.

    The first token has no prediction and gets 0.
    """
    logits = plain_outputs(model, params, documents) / temperature
    logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    found = []
    for row, document in enumerate(documents):
        # The logits at position t predict the token at t + 1.
        predicted = [logprobs[row, t, token] for t, token in enumerate(document[1:])]
        found.append(np.array([0.0, *predicted]))
    return found


def plain_scores(
    model: Transformer, params: Any, documents: Sequence[np.ndarray]
) -> np.ndarray:
    """The scalar head's output at the last token of each document: f64[n]."""
    outputs = plain_outputs(model, params, documents)
    return np.array(
        [outputs[row, len(document) - 1] for row, document in enumerate(documents)]
    )


def plain_loss(model: Transformer, params: Any, batch: LmBatch) -> float:
    """Mean of −log p over the trained tokens of packed rows, document by document."""
    documents, masks = zip(*documents_of(batch), strict=True)
    logprobs = np.concatenate(plain_logprobs(model, params, documents))
    return float(-logprobs[np.concatenate(masks)].mean())


def assert_trees_close(got: Any, wanted: Any, *, rtol: float, atol: float) -> None:
    """Compares every leaf; a failure names its path."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(wanted), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


def assert_trees_equal(got: Any, wanted: Any) -> None:
    """Compares every leaf bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), (_, b) in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(wanted), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(
            path
        )
