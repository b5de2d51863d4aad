"""How fast the stages are: random parameters and tokens, compiled updates, medians, and the limits of the machine.

Operations are those of the model, 2 for each multiplication and addition: per token of a forward pass 2 · (N + V · D)
with N the parameters of the layers and V · D those of the head (where its scores are needed), and 2 · L · H · d · T for
causal attention over T tokens; three times as many with the backward pass. What is computed twice is counted once.
"""

import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax import ppo, ppo_train, reward, sharding, supervised, training
from instructax.configuration import require
from instructax.estimate import GIB
from instructax.model import ModelConfig, Transformer
from instructax.optimizer import make_optimizer
from instructax.types import Comparisons, LmBatch, Params, PpoState, Prompts


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured: a call, and what it does."""

    run: Callable[[Any], Mapping[str, float]]  # (phase) → figures of one repetition; phases are timed by it
    tokens: Callable[[Mapping[str, float]], float]  # of one repetition, from its figures
    operations: Callable[[Mapping[str, float]], float]


def forward_operations(config: ModelConfig, tokens: float, length: float, scored: float) -> float:
    """Of `tokens` in texts of `length`, of which the head scores the vocabulary at `scored`."""
    block = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
    block += config.width * config.mlp_width * (3 if config.activation == "swiglu" else 2)
    attention = 2 * config.layers * config.heads * config.head_width * length
    return tokens * (2 * config.layers * block + attention) + 2 * scored * config.vocab_size * config.width


def measure(
    config: Any, *, steps: int, ending: float, sampling_alone: bool, side_by_side: int, profile: str
) -> dict[str, Any]:
    """The record of `steps` repetitions after a first one, which compiles; `config` is the config of a stage that
    trains. `ending`: the probability that a policy ends its response at a token (0: never); `sampling_alone`: of PPO
    the rollout only; `side_by_side`: of PPO, so many runs in one program, 1 for one run whose three programs are one, 0
    for the programs of a run; `profile`: a folder for the trace of the last repetition, or ""."""
    makers = {"supervised": _supervised, "reward": _reward, "ppo": _ppo}
    require(config.stage in makers, f"config.stage = {config.stage!r} trains nothing: give one of {', '.join(makers)}")
    require(
        config.stage == "ppo" or not (sampling_alone or ending or side_by_side),
        f"config.stage = {config.stage!r} samples nothing: leave out --sampling_alone, --ending and --side_by_side",
    )
    require(
        not ending or (config.model.norm, config.model.tied_head) == ("layernorm", True),
        "--ending needs config.model.norm = 'layernorm' and config.model.tied_head = True",
    )
    mesh = sharding.make_mesh(config.mesh)
    peak, bandwidth = matmul_rate(config.compute.operands), copy_rate()
    make = _sampling if sampling_alone else partial(_ppo, runs=side_by_side) if side_by_side else makers[config.stage]
    compiled = Compilations()
    with compiled:
        started = time.perf_counter()
        work = make(config, mesh, ending)
        work.run(_untimed)
        first = time.perf_counter() - started
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    figures: list[Mapping[str, float]] = []
    again = Compilations()
    with again:
        for step in range(steps):
            watched = jax.profiler.trace(profile) if profile and step == steps - 1 else contextlib.nullcontext()
            with watched:
                start = time.perf_counter()
                figures.append(work.run(partial(_timed, phases)))
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    tokens = statistics.median(map(work.tokens, figures))
    operations = statistics.median(map(work.operations, figures))
    return {
        "stage": config.stage,
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "dtype": config.compute.dtype,
        "attention": "jax (products and a mask)",
        "seconds": median,
        "seconds_best": min(seconds),
        "seconds_of": {name: statistics.median(times) for name, times in phases.items()},
        "tokens": tokens,
        "tokens_per_second_per_device": tokens / median / mesh.size,
        "operations": operations,
        "operations_per_second": operations / median,
        "share_of_matmul": operations / median / (peak * mesh.size),
        "matmul_operations_per_second": peak,
        "copied_bytes_per_second": bandwidth,
        "padding": statistics.median([figure.get("padding", 0.0) for figure in figures]),
        "seconds_to_first": first,
        "compilations": compiled.count,
        "compilations_after_the_first": again.count,
        "peak_memory_gib": peak_memory() / GIB,
    }


@contextlib.contextmanager
def _untimed(name: str) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _timed(phases: dict[str, list[float]], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    phases.setdefault(name, []).append(time.perf_counter() - start)


class Compilations:
    """While entered, counts the programs that are compiled or read from the compilation cache."""

    def __enter__(self) -> "Compilations":
        self.count, self._open = 0, True
        note: Any = self._note
        jax.monitoring.register_event_duration_secs_listener(note)
        return self

    def _note(self, event: str, *_: Any, **__: Any) -> None:
        self.count += self._open and event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_: object) -> None:
        self._open = False


def _best(function: Callable[[], Any], repetitions: int) -> float:
    """Fewest seconds of one call."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(operands: str) -> float:
    """Operations per second of the product of two large matrices of the dtype `operands`, on one device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), operands)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best(lambda: multiply(x, x), 5)


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 256 MiB, on one device."""
    x = jnp.ones((2**26,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best(lambda: copy(x), 5)


def peak_memory() -> float:
    """Bytes: of the fullest device where it is known, else of the whole process."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    return max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _tokens(config: ModelConfig, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).integers(config.vocab_size, size=shape).astype(np.int32)


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    """A numpy array; typed as Any since `types` names the jax arrays that it becomes on a device."""
    return np.full(shape, value)


def _supervised(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    model, optimizer = Transformer(config.model, config.compute, "tokens"), make_optimizer(config.optimizer)
    program = supervised.SupervisedProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=1000,
        accumulate=config.accumulate,
        drops=config.dropout > 0,
    )
    settings = supervised.SupervisedSettings(
        seed=jnp.int32(config.seed),
        learning_rate=jnp.float32(config.optimizer.learning_rate),
        dropout=jnp.float32(config.dropout),
    )
    step = training.compile_update(
        partial(supervised.update, program), training.abstract_state(model, optimizer, mesh), mesh
    )
    state = [training.init_state(model, optimizer, jax.random.key(0), mesh)]
    length = config.data.limits.sequence_tokens
    batch = sharding.put_rows(_text(config, config.batch_size), mesh)

    def run(phase: Any) -> Mapping[str, float]:
        with phase("update"):
            state[0], metrics = jax.block_until_ready(step(state[0], batch, settings))
        return {"tokens": float(metrics["tokens"])}

    def operations(figures: Mapping[str, float]) -> float:
        return 3 * forward_operations(config.model, figures["tokens"], length, figures["tokens"])

    return Work(run, lambda figures: figures["tokens"], operations)


def _reward(config: Any, mesh: jax.sharding.Mesh, _: float) -> Work:
    model, optimizer = Transformer(config.model, config.compute, "scalar"), make_optimizer(config.optimizer)
    program = reward.RewardProgram(
        model=model,
        optimizer=optimizer,
        schedule=config.optimizer,
        mesh=mesh,
        total_steps=1000,
    )
    settings = reward.RewardModelSettings(learning_rate=jnp.float32(config.optimizer.learning_rate))
    step = training.compile_update(
        partial(reward.update, program), training.abstract_state(model, optimizer, mesh), mesh
    )
    state = [training.init_state(model, optimizer, jax.random.key(0), mesh)]
    limits, rows = config.data.limits, config.batch_size
    shape = (rows, limits.completions, limits.response_tokens)
    ranks: Any = np.broadcast_to(np.arange(limits.completions, dtype=np.int32), shape[:2])
    batch = Comparisons(
        prompts=_prompts(config),
        responses=_tokens(config.model, shape),
        mask=_filled(shape, True),
        ranks=ranks,
        valid=_filled(shape[:2], True),
        labeler=_filled((rows,), np.int32(0)),
    )
    batch = sharding.put_rows(batch, mesh)

    def run(phase: Any) -> Mapping[str, float]:
        with phase("update"):
            state[0], metrics = jax.block_until_ready(step(state[0], batch, settings))
        return {name: float(metrics[name]) for name in ("tokens", "padding")}

    def operations(figures: Mapping[str, float]) -> float:
        # A response sees the prompt and half of itself on average, the prompt half of itself.
        prompt, response = limits.prompt_tokens, limits.response_tokens
        asked = forward_operations(config.model, rows * prompt, prompt, 0)
        return 3 * (asked + forward_operations(config.model, rows * shape[1] * response, 2 * prompt + response, 0))

    return Work(run, lambda figures: figures["tokens"], operations)


def _ppo(config: Any, mesh: jax.sharding.Mesh, ending: float, runs: int = 0) -> Work:
    """The three programs of an iteration; with `runs`, that many runs of other seeds side by side in one program."""
    program, settings = ppo_train.program_of(config, mesh, _eos_id(config, ending)), ppo_train.settings_of(config)
    policy = _policy(program, ending)
    scorer = training.init_state(program.scorer, program.value_optimizer, jax.random.key(1), mesh).params
    state = PpoState(
        policy=training.start_from(policy, program.policy_optimizer, mesh),
        value=training.start_from(scorer, program.value_optimizer, mesh),
        ema=jax.tree.map(jnp.copy, policy),
    )
    rows = config.ptx_rows * config.minibatches * config.inner_epochs if config.ptx_coef > 0 else 0
    batch = sharding.put_rows((_prompts(config), _text(config, rows) if rows else None), mesh)
    iterate: Any
    if runs:
        settings = jax.tree.map(lambda x: jnp.stack([x] * runs), settings)
        settings = dataclasses.replace(settings, seed=jnp.arange(runs, dtype=jnp.int32))
        states = [jax.tree.map(lambda x: jnp.stack([x] * runs), state)]
        many = jax.vmap(partial(ppo.iteration, program), in_axes=(0, None, None, None, None, 0))
        iterate = jax.jit(many, donate_argnums=0)
    else:
        states = [state]
        iterate = ppo_train.Iteration(
            program, ppo_train.abstract_state(program), settings, policy, scorer, config.tolerance
        )

    def run(phase: Any) -> Mapping[str, float]:
        if runs:
            with phase("iteration"):
                states[0], metrics, _, _ = jax.block_until_ready(iterate(states[0], policy, scorer, *batch, settings))
        else:
            states[0], metrics, _, _ = iterate(states[0], batch, phase)
        return {name: float(jnp.mean(metrics[name])) for name in ("tokens", "response_length", "padding")}

    def operations(figures: Mapping[str, float]) -> float:
        length = figures["tokens"] / config.batch_size
        answers = config.batch_size * figures["response_length"]
        policy = forward_operations(config.model, figures["tokens"], length, answers)
        scalar = forward_operations(config.reward_model, figures["tokens"], length, 0)
        width = config.data.limits.sequence_tokens
        text = forward_operations(config.model, rows * width, width, rows * width)
        # The sampler, the reference, the value and the reward; both networks' updates; and the text's.
        once = 2 * policy + 2 * scalar + 3 * config.inner_epochs * (policy + scalar) + 3 * text
        return max(runs, 1) * once

    return Work(run, lambda figures: max(runs, 1) * figures["tokens"], operations)


def _sampling(config: Any, mesh: jax.sharding.Mesh, ending: float) -> Work:
    program, settings = ppo_train.program_of(config, mesh, _eos_id(config, ending)), ppo_train.settings_of(config)
    policy, prompts = _policy(program, ending), sharding.put_rows(_prompts(config), mesh)
    rollout = jax.jit(partial(ppo.rollout, program))
    step = [0]

    def run(phase: Any) -> Mapping[str, float]:
        step[0] += 1
        with phase("rollout"):
            rollouts = jax.block_until_ready(rollout(policy, prompts, jnp.int32(step[0]), settings))
        return {"tokens": float(rollouts.mask.sum())}

    def operations(figures: Mapping[str, float]) -> float:
        asked = config.batch_size * config.data.limits.prompt_tokens
        length = (asked + figures["tokens"]) / config.batch_size
        return forward_operations(config.model, asked + figures["tokens"], length, figures["tokens"])

    return Work(run, lambda figures: figures["tokens"], operations)


def _text(config: Any, rows: int) -> LmBatch:
    """Rows of one text each, without padding."""
    shape = (rows, config.data.limits.sequence_tokens)
    positions: Any = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return LmBatch(
        tokens=_tokens(config.model, shape),
        segments=_filled(shape, np.int32(1)),
        positions=positions,
        loss_mask=positions > 0,
    )


def _prompts(config: Any) -> Prompts:
    shape = (config.batch_size, config.data.limits.prompt_tokens)
    return Prompts(tokens=_tokens(config.model, shape), mask=_filled(shape, True))


def _eos_id(config: Any, ending: float) -> int:
    """The last token's, or one that no token has: then nothing ends before the limit."""
    return config.model.vocab_size - (ending > 0)


def _policy(program: ppo.PpoProgram, ending: float) -> Params:
    """Random parameters. To end a response with about the probability `ending` at each token, the final norm's bias and
    the end token's embedding share a direction that no other token has."""
    params = training.init_state(program.policy, program.policy_optimizer, jax.random.key(0), program.mesh).params
    if ending == 0:
        return params
    vocabulary, width = params["embedding"].shape
    direction = jnp.full((width,), width**-0.5)
    logit = jnp.log(ending / (1 - ending) * vocabulary)
    norm = {**params["final_norm"], "bias": direction}
    return {**params, "final_norm": norm, "embedding": params["embedding"].at[program.eos_id].set(logit * direction)}


def table(record: Mapping[str, Any]) -> list[str]:
    """The record as lines to read."""
    phases = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in record["seconds_of"].items())
    rows = (
        ("device", f"{record['devices']} × {record['device']}, {record['dtype']}, attention: {record['attention']}"),
        ("one repetition", f"{record['seconds']:.4g} s (best {record['seconds_best']:.4g}): {phases}"),
        ("tokens", f"{record['tokens']:,.0f}, {record['tokens_per_second_per_device']:,.0f} per second and device"),
        (
            "operations",
            f"{record['operations'] / 1e9:,.1f} G, {record['operations_per_second'] / 1e9:,.1f} G/s, "
            f"{record['share_of_matmul']:.0%} of a large product's {record['matmul_operations_per_second'] / 1e9:,.0f}",
        ),
        ("copies", f"{record['copied_bytes_per_second'] / 1e9:,.1f} GB/s"),
        ("padding", f"{record['padding']:.1%} of the cells"),
        ("to the first", f"{record['seconds_to_first']:.1f} s, {record['compilations']} programs compiled"),
        ("after it", f"{record['compilations_after_the_first']} programs compiled"),
        ("peak memory", f"{record['peak_memory_gib']:.2f} GiB"),
    )
    return [f"{name:<16}{text}" for name, text in rows]
