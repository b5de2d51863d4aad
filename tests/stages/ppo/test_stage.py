"""The PPO stage: its start, data, logs and exports, and the faults that stop it."""

import dataclasses
import itertools
from functools import cache

import jax
import numpy as np
import pytest
from tests.support import stages, tiny_models
from tests.support.run_logs import read_samples
from tests.support.saved import load_newest_params

from instructax import sharding
from instructax.checkpoints.parents import tokenizer_of
from instructax.data.batches import lm_batch
from instructax.experiment import run_stage
from instructax.runtime.metric_log import read_metrics, read_summary
from instructax.stages import build_config
from instructax.stages.ppo import algorithm, gradients
from instructax.stages.ppo import stage as ppo_train
from instructax.stages.ppo.compiled import CompiledIteration, abstract_ppo_state
from instructax.stages.ppo.invariants import InvariantError
from instructax.training.settings import settings_from
from instructax.training.state import abstract_state, layouts, no_adapters
from instructax.types import Rollouts

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

# One iteration, by hand.


PROGRAM = stages.ppo_program(stages.mesh_of())
# Lengths of runs; the schedules of these programs are constant.
LENGTHS = itertools.count(100)
PROMPTS = tiny_models.ragged_prompts([1, 5, 3, 6, 2, 4, 6, 1], columns=6)
TEXT = stages.packed_rows(4, 14)


@cache
def networks():
    return tiny_models.random_params(PROGRAM.policy), tiny_models.random_params(
        PROGRAM.value_model, 1
    )


def iterate(
    *, ref_params=None, value_params=None, settings=None, program=PROGRAM, first_step=0
):
    """One iteration of a policy that starts as its reference, and of a value model that
    starts as the reward model.

    Returns (state before, state after, metrics, rollouts, scores).
    """
    policy, reward = networks()
    state = stages.ppo_state(program)
    state = dataclasses.replace(
        state, policy=dataclasses.replace(state.policy, step=state.policy.step + first_step)
    )
    if value_params is not None:
        state = dataclasses.replace(
            state, value=dataclasses.replace(state.value, params=value_params)
        )
    before = jax.device_get(state)
    abstract = abstract_ppo_state(program)
    # Replaced parameters too get the layout that the program is compiled for.
    state = jax.device_put(state, layouts(abstract))
    run = CompiledIteration(
        program,
        abstract,
        settings or stages.ppo_settings(),
        policy if ref_params is None else ref_params,
        reward,
        1e-4,
    )
    batch = sharding.shard_rows((PROMPTS, TEXT), program.mesh)
    return before, *run(state, batch, stages.no_phase)


def test_what_holds_at_the_first_inner_step():
    before, after, metrics, rollouts, scores = iterate()
    assert metrics["first_ratio_gap"] < 1e-5
    assert metrics["first_clipped_fraction"] == 0
    assert metrics["ref_gap"] < 1e-5
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(metrics["kl_k3"]) == pytest.approx(0, abs=1e-5)
    assert metrics["sampler_gap"] < 1e-5
    # Without a KL penalty, the reward of a response is its score.
    ended = np.asarray(rollouts.ended)
    assert float(metrics["rewards"]) == pytest.approx(
        float(np.mean(scores - 0.5 * ~ended)), rel=1e-5
    )
    assert before.step == 0
    assert after.step == 1
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(after))
    for part in (moved.policy.params, moved.value.params, moved.ema):
        assert part["embedding"]


def test_scores_come_from_the_reward_model_not_the_value_model():
    value = tiny_models.random_params(PROGRAM.value_model, 8)
    _, _, metrics, rollouts, scores = iterate(value_params=value)
    wanted = stages.plain_scores(
        PROGRAM.value_model, networks()[1], stages.responses_of(rollouts)
    )
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)
    assert float(metrics["scores"]) == pytest.approx(wanted.mean(), rel=1e-4)


def never_compiled(program=PROGRAM):
    """An equal program of other length, for tests that patch a function.

    Programs are compiled once per process, so PROGRAM may not read the patched function.
    """
    return stages.with_options(program, steps=next(LENGTHS))


def patch_call(monkeypatch, module, name, **changes):
    """Makes PPO's `module` call `name` with other keyword arguments."""
    function = getattr(module, name)

    def changed(*args, **kwargs):
        return function(*args, **{**kwargs, **changes})

    monkeypatch.setattr(module, name, changed)


def test_a_sampler_at_another_temperature_stops_the_run(monkeypatch):
    patch_call(monkeypatch, algorithm, "generate", temperature=1.3)
    with pytest.raises(
        InvariantError,
        match=(
            r"sampled and recomputed .* differ by .* look for a difference in "
            r"temperature"
        ),
    ):
        iterate(program=never_compiled())


def test_without_rescoring_a_sampler_at_another_temperature_fails_the_ratio_check(
    monkeypatch,
):
    program = stages.with_options(PROGRAM, old_logprobs="sampled")
    _, _, metrics, _, _ = iterate(program=program)
    assert metrics["first_ratio_gap"] < 1e-5
    program = never_compiled(program)
    patch_call(monkeypatch, algorithm, "generate", temperature=1.3)
    with pytest.raises(InvariantError, match=r"policy and reference differ by"):
        iterate(program=program)
    with pytest.raises(
        InvariantError,
        match=r"the ratio differs from 1 by .* old_logprobs = 'sampled', the sampler",
    ):
        iterate(program=program, first_step=1)


def test_a_sampler_with_wrong_positions_stops_the_run(monkeypatch):
    generate = algorithm.generate

    def padded_on_the_right(model, params, prompts, *args, **kwargs):
        rollouts = generate(
            model, params, jax.tree.map(lambda x: x[:, ::-1], prompts), *args, **kwargs
        )
        return dataclasses.replace(rollouts, prompts=prompts)

    monkeypatch.setattr(algorithm, "generate", padded_on_the_right)
    with pytest.raises(InvariantError, match="sampled and recomputed"):
        iterate(program=never_compiled())


def test_an_update_at_another_temperature_stops_the_run(monkeypatch):
    patch_call(monkeypatch, gradients, "packed_loss_and_gradients", temperature=1.5)
    with pytest.raises(
        InvariantError, match="at the first optimizer step the ratio differs from 1"
    ):
        iterate(program=never_compiled())


def test_another_reference_stops_the_run_only_before_the_first_update():
    other = tiny_models.random_params(PROGRAM.policy, 9)
    with pytest.raises(
        InvariantError, match=r"policy and reference differ by .* look at policy_parent"
    ):
        iterate(ref_params=other)
    _, _, metrics, _, _ = iterate(ref_params=other, first_step=1)
    assert metrics["ref_gap"] > 0.1


def test_samples_are_rollouts_as_text():
    class Letters:
        def decode(self, ids):
            return "".join(chr(97 + i) for i in ids)

    rollouts = Rollouts(
        prompts=tiny_models.ragged_prompts([1, 2, 3], columns=3),
        responses=np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        mask=np.array([[True, True, False], [True, False, False], [True, True, True]]),
        logprobs=np.zeros((3, 3)),
        ended=np.zeros(3, bool),
    )
    samples = ppo_train.sample_records(rollouts, np.array([0.5, -1.0, 2.0]), Letters())
    prompts = [np.asarray(rollouts.prompts.tokens)[row, 2 - row :] for row in range(3)]
    assert samples == [
        {
            "prompt": Letters().decode(prompts[0]),
            "response": "ab",
            "score": 0.5,
            "tokens": 2,
        },
        {
            "prompt": Letters().decode(prompts[1]),
            "response": "d",
            "score": -1.0,
            "tokens": 1,
        },
        {
            "prompt": Letters().decode(prompts[2]),
            "response": "ghi",
            "score": 2.0,
            "tokens": 3,
        },
    ]


# Runs of the chain.


def ppo_parts(chain, name="ppo-ptx", **overrides):
    """(config, program, prepared data) of a PPO run of the chain."""
    config = stages.config_with_kernel(stages.config_of(chain, name, overrides))
    tokenizer = tokenizer_of(config.tokenizer, config.model)
    program = ppo_train.make_program(config, stages.mesh_of(), tokenizer.eos_id)
    return config, program, config.prepare_data(tokenizer)


def test_every_value_of_the_config_reaches_its_place(chain):
    names = (
        "kl_coef",
        "discount",
        "lambda_",
        "no_eos_penalty",
        "temperature",
        "clip",
        "value_clip",
        "ptx_coef",
    )
    peaks = {"optimizer.learning_rate": 0.75, "value_optimizer.learning_rate": 0.5}
    # All values differ.
    values = {name: (1 + i) / 32 for i, name in enumerate((*names, "ema_decay"))}
    counts = {"steps": 6, "inner_epochs": 2, "minibatches": 4}
    choices = {
        "whiten_rewards": True,
        "whiten_advantages": False,
        "old_logprobs": "sampled",
        "no_eos_rule": "replace",
    }
    config, program, _ = ppo_parts(chain, seed=5, **peaks, **values, **counts, **choices)
    settings = vars(settings_from(algorithm.PpoSettings, config))
    assert float(settings.pop("optimizer").learning_rate) == 0.75
    assert float(settings.pop("value_optimizer").learning_rate) == 0.5
    found = {name: float(value) for name, value in settings.items()}
    assert found == values | {"seed": 5}
    options = {name: getattr(program.options, name) for name in counts | choices}
    assert options == counts | choices
    assert (program.policy.config, program.value_model.config) == (
        config.model,
        config.reward_model,
    )
    assert program.response_tokens == config.data.limits.response_tokens
    assert program.clip_values and not ppo_parts(chain, value_clip=0.0)[1].clip_values


def test_it_starts_from_the_policy_and_the_reward_model(chain, tmp_path):
    state = stages.initial_state(stages.config_of(chain, "ppo-ptx", {}), tmp_path / "run")
    abstract = abstract_ppo_state(ppo_parts(chain)[1])
    policy = jax.device_get(load_newest_params(chain / "sft", abstract.policy.params))
    reward = jax.device_get(load_newest_params(chain / "reward", abstract.value.params))
    stages.assert_trees_equal(state.policy.params, policy)
    stages.assert_trees_equal(state.ema, policy)
    stages.assert_trees_equal(state.value.params, reward)  # including head and bias
    assert reward["scalar_head"]["bias"] != 0
    assert all(
        not np.any(leaf)
        for leaf in jax.tree.leaves((state.policy.opt_state, state.value.opt_state))
    )
    assert state.step == 0


@pytest.mark.parametrize("name", ["ppo", "ppo-ptx"])
def test_what_a_run_logs(chain, name):
    lines = read_metrics(chain / name)
    samples = read_samples(chain / name)
    config = ppo_parts(chain, name)[0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(lines[-1]["kl"]) > 1e-3
    assert all(line["sampler_gap"] < 1e-4 for line in lines)
    assert ("ptx_loss" in lines[0]) == (name == "ppo-ptx")
    assert [sample["step"] for sample in samples] == [
        step for step in (1, 2, 3, 4) for _ in range(config.samples)
    ]
    for line in lines:  # at this size, every rollout is logged as a sample
        own = [sample for sample in samples if sample["step"] == line["step"]]
        assert line["scores"] == pytest.approx(
            np.mean([sample["score"] for sample in own]), rel=1e-5
        )
        assert line["response_length"] == np.mean([sample["tokens"] for sample in own])
        assert line["learning_rate"] == pytest.approx(
            config.optimizer.learning_rate * (0.1 + 0.09 * (line["step"] - 1))
        )


def test_the_average_is_what_is_exported_and_evaluated(chain):
    config, program, data = ppo_parts(chain)
    ema = load_newest_params(chain / "ppo-ptx", abstract_ppo_state(program).policy.params)
    source = data["text"].sources["validation"]
    rows = lm_batch(source, np.arange(len(source)), config.data.limits.sequence_tokens)
    wanted = stages.plain_loss(program.policy, ema, rows)
    assert read_summary(chain / "ppo-ptx")["text_loss"] == pytest.approx(wanted, rel=1e-5)
    start = jax.device_get(
        load_newest_params(chain / "sft", abstract_ppo_state(program).policy.params)
    )
    assert not np.array_equal(ema["embedding"], start["embedding"])
    checkpoints = abstract_state(
        program.policy, program.policy_optimizer, program.mesh, no_adapters
    )
    assert jax.tree.structure(ema) == jax.tree.structure(checkpoints.params)


def test_batch_rows_of_an_iteration(chain):
    config, program, data = ppo_parts(chain)
    read = ppo_train.batch_reader(config, data, program.mesh)
    prompts, text = read(3)
    assert prompts.tokens.shape == (8, 24)
    assert text.tokens.shape == (4, 64)  # 2 rows for each of 2 optimizer steps
    again = read(3)
    stages.assert_trees_equal((prompts, text), again)
    assert not np.array_equal(read(4)[0].tokens, prompts.tokens)
    plain = dataclasses.replace(config, ptx_coef=0.0)
    assert ppo_train.batch_reader(plain, data, program.mesh)(3)[1] is None
    twice = dataclasses.replace(config, inner_epochs=2)
    assert ppo_train.batch_reader(twice, data, program.mesh)(3)[1].tokens.shape == (8, 64)


def test_ppo_needs_no_text(chain, tmp_path):
    config = stages.config_of(
        chain, "ppo", {"data.text": (), "steps": 1, "value_clip": 0.0}
    )
    assert run_stage(config, tmp_path / "run")
    summary = read_summary(tmp_path / "run")
    assert "text_loss" not in summary
    assert summary["value_clipped_fraction"] == 0
    # The first rollouts do not depend on the text.
    assert summary["scores"] == pytest.approx(
        read_metrics(chain / "ppo")[0]["scores"], rel=1e-6
    )


def test_runs_of_a_sweep_have_equal_programs(chain):
    """Seed, coefficients and learning rates are arguments; the rest is compiled in."""
    swept = {
        "seed": 9,
        "kl_coef": 0.5,
        "clip": 0.1,
        "ptx_coef": 0.0,
        "optimizer.learning_rate": 0.5,
        "value_optimizer.learning_rate": 0.5,
    }
    mesh = stages.mesh_of()

    def program_of(changes):
        config = build_config(stages.config_of(chain, "ppo", changes))
        return ppo_train.make_program(config, mesh, 21)

    one = program_of({})
    assert program_of(swept) == one
    assert hash(program_of(swept)) == hash(one)
    for change in ({"steps": 77}, {"whiten_rewards": True}, {"optimizer.beta2": 0.9}):
        assert program_of(change) != one


def test_a_fault_stops_the_run_and_leaves_it_unfinished(chain, tmp_path, monkeypatch):
    patch_call(monkeypatch, algorithm, "generate", temperature=1.3)
    # A length of its own, as in `never_compiled`.
    config = stages.config_of(chain, "ppo", {"steps": next(LENGTHS)})
    with pytest.raises(InvariantError, match="sampled and recomputed"):
        run_stage(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert read_metrics(tmp_path / "run") == []


@pytest.mark.parametrize(
    "dtype", ["bf16_matmul", pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_a_run_in_sixteen_bits(chain, tmp_path, dtype):
    """Sampler, scorer and update round alike, so the invariants hold. The metrics are close
    to those of float32."""
    half = {
        "compute.dtype": dtype,
        "compute.decoding_dtype": dtype,
        "steps": 1,
        "tolerance": 0.03,
    }
    exact = {"steps": 1}
    for name, overrides in (("half", half), ("exact", exact)):
        run_stage(stages.config_of(chain, "ppo-ptx", overrides), tmp_path / name)
    (line,), (wanted,) = read_metrics(tmp_path / "half"), read_metrics(tmp_path / "exact")
    assert line["sampler_gap"] < 0.03 and line["first_ratio_gap"] < 0.03
    assert line["entropy"] != wanted["entropy"]
    assert line["entropy"] == pytest.approx(wanted["entropy"], rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"batch_size": 6, "minibatches": 4},
            "batch_size = 6 rows must be a positive multiple of 4",
        ),
        ({"ptx_rows": 3}, "ptx_rows = 3 rows must be a positive multiple of 2"),
        (
            {"data.limits.sequence_tokens": 47},
            "sequence_tokens = 47, the width of packed rows, must hold .* 24 . 24",
        ),
        ({"data.text": ()}, "config: ptx_coef = 1.0 needs files in data.text"),
        (
            {"policy_parent": ""},
            "config: policy_parent and reward_parent must name finished runs",
        ),
        (
            {"reward_parent": ""},
            "config: policy_parent and reward_parent must name finished runs",
        ),
        (
            {"reward_parent": "nowhere"},
            "config.reward_parent = 'nowhere' is not a finished run",
        ),
        ({"temperature": 0.0}, "config: temperature = 0.0 must be above 0"),
        (
            {"model.max_length": 99},
            "config.policy_parent = .* has another model: .*max_length: 96 .* != 99 ",
        ),
        ({"steps": 0}, "config: steps = 0 must be"),
        ({"inner_epochs": 0}, "config: inner_epochs = 0 must be"),
        ({"minibatches": 0}, "config: minibatches = 0 must be"),
        ({"ema_decay": 1.5}, "config: ema_decay = 1.5 must be from 0 to 1"),
        ({"clip": 0.0}, "config: clip = 0.0 must be above 0"),
        ({"samples": -3}, "config: samples = -3 must be at least 0"),
        (
            {"reward_parent": "SFT"},
            "config.reward_parent = .* is a run of the stage 'sft' with a tokens "
            "head; it must have a scalar head",
        ),
        (
            {"data.limits.splits": (("train", 1.0),)},
            "splits has the names .'train'.: train and validation must be",
        ),
        ({"ptx_coef": -1.0}, "config: ptx_coef = -1.0 must be"),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(
    chain, tmp_path, overrides, message
):
    if overrides.get("reward_parent") == "SFT":
        overrides = {"reward_parent": str(chain / "sft")}
    with pytest.raises(ValueError, match=message) as error:
        run_stage(stages.config_of(chain, "ppo-ptx", overrides), tmp_path / "run")
    assert "\n" not in str(error.value)
