"""A run compiles nothing after its first step, settings share one program, and no program
holds [B, T, V]."""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.experiment import run_stage
from instructax.models.transformer import Transformer
from instructax.stages.ppo import algorithm
from instructax.training import supervised
from instructax.training.optimizer import make_optimizer
from instructax.training.state import abstract_state, no_adapters

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

# Evaluate and save at every step.
ALWAYS = {"run.log_every": 1, "run.evaluate_every": 1, "run.save_every": 1, "steps": 5}
UPDATES = {
    "sft": "jit(supervised_update)",
    "reward": "jit(update_reward_model)",
    "ppo-ptx": "jit(update)",
}
RUNS = {"sft": {"epochs": 0.0, "dropout": 0.1}, "reward": {"epochs": 0.0}, "ppo-ptx": {}}


class Compilations(logging.Handler):
    """The names of the functions that jax compiles, by training step."""

    def __init__(self):
        super().__init__()
        self.step = 0
        self.names: dict[int, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"Compiling (\S+)", record.getMessage()):
            self.names.setdefault(self.step, []).append(found[1])


@pytest.fixture
def compilations():
    handler = Compilations()
    logger = logging.getLogger("jax")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    with jax.log_compiles():
        yield handler
    logger.removeHandler(handler)
    logger.propagate = propagates


@pytest.mark.parametrize("name", RUNS)
def test_nothing_compiles_after_the_first_step(
    chain, tmp_path, monkeypatch, compilations, name
):
    def note(step):
        compilations.step = step

    watch = stages.Watch(monkeypatch)
    watch.read.append(note)
    run_stage(stages.config_of(chain, name, {**ALWAYS, **RUNS[name]}), tmp_path / "run")
    assert UPDATES[name] in compilations.names[0]
    assert list(compilations.names) == [0]  # this includes the end of the run


MODEL = Transformer(tiny_models.gpt_config(vocab_size=61), tiny_models.compute(), "tokens")
MESH = stages.mesh_of()
SCORER = Transformer(MODEL.config, MODEL.compute, "scalar")
PROGRAM = stages.ppo_program(MESH, policy=MODEL, value_model=SCORER)
PROMPTS = tiny_models.ragged_prompts([3] * 8, columns=6)
TEXT = jax.tree.map(jnp.asarray, stages.packed_rows(8, 14))


def count_traces(function, traces):
    """Wraps `function` so that each trace is recorded in `traces`."""

    def traced(*args):
        traces.append(function)
        return function(*args)

    return jax.jit(traced)


def test_settings_of_a_sweep_share_one_program():
    traces = []
    rollout, score, update = (
        count_traces(partial(f, PROGRAM), traces)
        for f in (algorithm.rollout, algorithm.score, algorithm.update)
    )
    start = stages.ppo_state(PROGRAM)
    other = (
        tiny_models.random_params(PROGRAM.policy, 7),
        tiny_models.random_params(PROGRAM.value_model, 8),
    )
    ends = []
    changes = (
        {},
        {"kl_coef": 0.5},
        {"clip": 5.0},
        {"learning_rate": 0.05},
        {"temperature": 0.7},
        {"ptx_coef": 9.0},
    )
    for change in changes:
        settings = stages.ppo_settings(**change)
        rollouts = rollout(start.policy.params, PROMPTS, start.step, settings)
        experience, _, _ = score(start, *other, rollouts, settings)
        ends.append(
            np.asarray(
                update(start, experience, TEXT, settings)[0].policy.params["embedding"]
            )
        )
    assert len(traces) == 3
    assert np.isfinite(ends).all()
    assert all(not np.allclose(ends[0], end, rtol=1e-4) for end in ends[1:])


def vocabulary_arrays(text: str, vocabulary: int, elements: int) -> list[str]:
    """The array types in a compiled program that have a vocabulary axis and at least
    `elements` entries along the other axes."""
    found = []
    for shape in set(re.findall(r"\w+\[[\d,]+\]", text)):
        sizes = [int(size) for size in re.findall(r"\d+", shape.split("[")[1])]
        if vocabulary in sizes and np.prod(sizes) // vocabulary >= elements:
            found.append(shape)
    return found


def supervised_program(model):
    config = tiny_models.optimizer_config()
    return supervised.SupervisedProgram(
        model=model,
        optimizer=make_optimizer(config),
        schedule=config,
        mesh=MESH,
        total_steps=10,
        num_microbatches=1,
        has_dropout=False,
    )


def supervised_hlo(model) -> str:
    program = supervised_program(model)
    settings = stages.supervised_settings(learning_rate=1.0, dropout=0.0)
    state = abstract_state(model, program.optimizer, MESH, no_adapters)
    return (
        jax.jit(partial(supervised.supervised_update, program))
        .lower(state, TEXT, settings)
        .compile()
        .as_text()
    )


def test_supervised_update_never_holds_all_logits():
    assert vocabulary_arrays(supervised_hlo(MODEL), 61, 8 * 13) == []
    # The check finds such an array when the chunk is the whole row.
    whole = Transformer(MODEL.config, tiny_models.compute(head_chunk=16), "tokens")
    assert vocabulary_arrays(supervised_hlo(whole), 61, 8 * 13)


def test_ppo_never_holds_all_logits():
    settings = stages.ppo_settings()
    state = stages.ppo_state(PROGRAM)
    sample = jax.jit(partial(algorithm.rollout, PROGRAM))
    args = (state.policy.params, PROMPTS, state.step, settings)
    rollouts = jax.eval_shape(sample, *args)
    # Prefill needs only the logits of the last prompt token.
    assert vocabulary_arrays(sample.lower(*args).compile().as_text(), 61, 8 * 6) == []
    score = jax.jit(partial(algorithm.score, PROGRAM))
    args = (state, state.policy.params, state.value.params, rollouts, settings)
    experience = jax.eval_shape(score, *args)[0]
    assert vocabulary_arrays(score.lower(*args).compile().as_text(), 61, 8 * 7) == []
    update = jax.jit(partial(algorithm.update, PROGRAM))
    # Two minibatches: 4 rows of 7 response tokens, and 4 of 13 text tokens, at a time.
    assert (
        vocabulary_arrays(
            update.lower(state, experience, TEXT, settings).compile().as_text(), 61, 4 * 7
        )
        == []
    )
