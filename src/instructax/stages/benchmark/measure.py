"""Measures the speed of a stage: its compiled update on random parameters and tokens.

Reports medians over repetitions, next to the limits of the machine: the rate of a large
matrix product and the bandwidth of a copy.
"""

import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import truediv
from typing import Any

import jax
import jax.numpy as jnp

from instructax.config import require
from instructax.models.config import decoding_config
from instructax.stages import load_stage
from instructax.stages.benchmark.workloads import (
    Work,
    build_work,
    ppo_work,
    sampling_work,
    untimed,
)
from instructax.stages.memory import GIB
from instructax.training.attention import NO_ROWS, select_attention_kernel

# JAX records this event for every program that it compiles or reads from its cache.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Repetitions:
    """The timed repetitions of a workload, one entry per repetition."""

    # Wall-clock seconds of whole repetitions; phases are parts of them.
    seconds: list[float]
    phases: dict[str, list[float]]  # name → seconds
    metrics: list[Mapping[str, float]]


def measure(
    config: Any,
    *,
    steps: int,
    ending: float,
    sampling_alone: bool,
    side_by_side: int,
    profile: str,
) -> dict[str, Any]:
    """Times `steps` repetitions of a stage's update, after a first one that compiles.

    Args:
      config: config of a stage that trains.
      steps: number of timed repetitions.
      ending: PPO: probability that a response ends at a token; 0 fills all responses.
      sampling_alone: PPO: measure the rollout only.
      side_by_side: PPO: number of runs in one program; 1 is one run whose three programs
        are one, 0 measures the three programs of a normal run.
      profile: folder for a trace of one more repetition; "" for none.

    Returns:
      The record, ready for JSON. Raises ConfigError for options that do not fit the config.
    """
    config, attention, make, mesh = _select_work(
        config, ending, sampling_alone, side_by_side
    )
    work, first = _first_repetition(make, config, mesh, ending)
    # Expected to stay at 0: a recompilation would be part of the measured time.
    recompilations = Compilations()
    with recompilations:
        repetitions = _repeat(work, steps)
    # Before the limits of the machine are measured, which takes memory too.
    memory = peak_memory()
    if profile:
        with jax.profiler.trace(profile):
            work.run(untimed)

    return {
        "stage": config.stage,
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "dtype": config.compute.dtype,
        "decoding": config.compute.decoding_dtype,
        "attention": attention,
        # Order of keys: what was measured, how fast, and what it took to get there.
        **_speed(config, work, repetitions, mesh.size, sampling_alone),
        **first,
        "compilations_after_the_first": recompilations.count,
        "peak_memory_gib": memory / GIB,
    }


def _select_work(
    config: Any, ending: float, sampling_alone: bool, side_by_side: int
) -> tuple[Any, str, Callable[..., Work], jax.sharding.Mesh]:
    """Selects the attention kernel and the workload; arguments are those of `measure`.

    Returns:
      (the config with its kernel, the kernel with the reason, a function from (config,
      mesh, ending) to the workload, the mesh)
    """
    make, mesh = build_work(config)
    _check_options(config, ending, sampling_alone, side_by_side)
    # The sampler always runs with a cache, where there is only one attention function.
    lengths = NO_ROWS if sampling_alone else load_stage(config.stage).row_lengths(config)
    config, attention = select_attention_kernel(
        config, lengths, side_by_side=side_by_side > 0
    )
    if sampling_alone:
        make = sampling_work
    elif side_by_side:
        make = partial(ppo_work, runs=side_by_side)
    return config, attention, make, mesh


def _check_options(
    config: Any, ending: float, sampling_alone: bool, side_by_side: int
) -> None:
    """Raises ConfigError for options of PPO with another stage, and for a network in which
    the benchmark cannot control how responses end."""
    require(
        config.stage == "ppo" or not (sampling_alone or ending or side_by_side),
        f"config.stage = {config.stage!r} samples nothing: leave out --sampling_alone, "
        "--ending and --side_by_side",
    )
    # `workloads` sets the probability through the bias of the final norm and the embedding
    # of the end token.
    require(
        not ending
        or (config.model.norm, config.model.tied_embeddings) == ("layernorm", True),
        "--ending needs config.model.norm = 'layernorm' and config.model.tied_embeddings "
        "= True",
    )


def _first_repetition(
    make: Callable[..., Work], config: Any, mesh: jax.sharding.Mesh, ending: float
) -> tuple[Work, dict[str, Any]]:
    """Creates the workload, runs it once, and measures how long that takes.

    It includes the creation of parameters and data, and the compilation of all programs.

    Returns:
      (the workload, its part of the record)
    """
    compilations = Compilations()
    with compilations:
        started = time.perf_counter()
        work = make(config, mesh, ending)
        work.run(untimed)
        seconds = time.perf_counter() - started
    return work, {"seconds_to_first": seconds, "compilations": compilations.count}


def _repeat(work: Work, steps: int) -> Repetitions:
    """Runs and times the workload `steps` times."""
    repetitions = Repetitions(seconds=[], phases={}, metrics=[])
    for _ in range(steps):
        # Every workload waits for its results, so dispatch alone is never timed.
        start = time.perf_counter()
        metrics = work.run(partial(_timed, repetitions.phases))
        repetitions.metrics.append(metrics)
        repetitions.seconds.append(time.perf_counter() - start)
    return repetitions


@contextlib.contextmanager
def _timed(phases: dict[str, list[float]], name: str) -> Iterator[None]:
    """Appends the seconds of its block to the phase `name`."""
    start = time.perf_counter()
    yield
    phases.setdefault(name, []).append(time.perf_counter() - start)


def _speed(
    config: Any,
    work: Work,
    repetitions: Repetitions,
    devices: int,
    sampling_alone: bool,
) -> dict[str, Any]:
    """The part of the record about speed: medians, and the limits of the machine."""
    seconds = repetitions.seconds
    tokens = [work.tokens(metrics) for metrics in repetitions.metrics]
    operations = [work.operations(metrics) for metrics in repetitions.metrics]
    # Medians of rates: repetitions differ in their number of tokens.
    tokens_rate = statistics.median(map(truediv, tokens, seconds))
    rate = statistics.median(map(truediv, operations, seconds))

    # The dtype whose peak the measured rate is compared with.
    compute = decoding_config(config.compute) if sampling_alone else config.compute
    peak = matmul_rate(compute.matmul_dtype)
    # In PPO the sampler may compute in another dtype than the rest. Then there is no single
    # rate to compare with.
    one_dtype = (
        config.stage != "ppo"
        or decoding_config(compute).matmul_dtype == compute.matmul_dtype
    )
    phases: dict[str, float] = {}
    for name, times in repetitions.phases.items():
        phases[name] = statistics.median(times)
    return {
        # A median ignores single repetitions that the system disturbed.
        "seconds": statistics.median(seconds),
        "seconds_best": min(seconds),
        "seconds_of": phases,
        "tokens": statistics.median(tokens),
        "tokens_per_second_per_device": tokens_rate / devices,
        "operations": statistics.median(operations),
        "operations_per_second": rate,
        # Model FLOPs utilization against a measured peak instead of a data sheet's.
        "share_of_matmul": rate / (peak * devices) if one_dtype else None,
        "matmul_operations_per_second": peak,
        "copied_bytes_per_second": copy_rate(),
        "padding": _median_padding(repetitions.metrics),
    }


def _median_padding(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metric of padding → its median over repetitions."""
    padding: dict[str, float] = {}
    for name in metrics[0]:
        if name.endswith("padding"):
            padding[name] = statistics.median(values[name] for values in metrics)
    return padding


class Compilations:
    """Context manager: counts the programs that are compiled, or read from the compilation
    cache, while it is entered."""

    def __enter__(self) -> "Compilations":
        self.count = 0
        self._open = True
        # Stays registered after the block; closed, it ignores events.
        listener: Any = self._on_event
        jax.monitoring.register_event_duration_secs_listener(listener)
        return self

    def _on_event(self, event: str, *_: Any, **__: Any) -> None:
        self.count += self._open and event == COMPILE_EVENT

    def __exit__(self, *_: object) -> None:
        self._open = False


def _best(function: Callable[[], Any], repetitions: int) -> float:
    """Fewest seconds of one call."""
    jax.block_until_ready(function())  # compiles
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    # The best, since this is a limit of the machine, not a typical value.
    return min(times)


def matmul_rate(matmul_dtype: str) -> float:
    """Operations per second of a product of two large matrices, on one device.

    `matmul_dtype` is the dtype of the matrices; sums are float32.
    """
    # Large enough for the full rate, small enough to take well under a second.
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), matmul_dtype)
    multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    # n³ multiply-adds.
    return 2 * size**3 / _best(lambda: multiply(x, x), 5)


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 256 MiB, on one device."""
    x = jnp.ones((2**26,), jnp.float32)
    # Adding 1 keeps XLA from returning the input itself.
    copy = jax.jit(lambda x: x + 1)
    # Each byte is read and written.
    return 2 * x.nbytes / _best(lambda: copy(x), 5)


def peak_memory() -> float:
    """Peak memory in bytes: of the fullest device if devices report it, else of the
    process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    # CPU devices report no statistics.
    known = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if known:
        return max(known)
    # macOS reports bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(record: Mapping[str, Any]) -> list[str]:
    """The record of `measure` as lines for the console."""
    dtypes = f"{record['dtype']} (sampling {record['decoding']})"
    phases = []
    for name, seconds in record["seconds_of"].items():
        phases.append(f"{name} {seconds:.3g} s")
    padding = []
    for name, fraction in record["padding"].items():
        padding.append(f"{fraction:.1%} ({name})")
    best = f"best {record['seconds_best']:.4g}"
    tokens_rate = record["tokens_per_second_per_device"]
    compilations = record["compilations"]

    # Name and text of each line.
    rows = (
        (
            "device",
            f"{record['devices']} × {record['device']}, {dtypes}, "
            f"attention: {record['attention']}",
        ),
        ("one repetition", f"{record['seconds']:.4g} s ({best}): {', '.join(phases)}"),
        ("tokens", f"{record['tokens']:,.0f}, {tokens_rate:,.0f} per second and device"),
        ("operations", _operations_text(record)),
        ("copies", f"{record['copied_bytes_per_second'] / 1e9:,.1f} GB/s"),
        ("padding", f"of the computed tokens {', '.join(padding)}"),
        (
            "first",
            f"{record['seconds_to_first']:.1f} s to the end of the first repetition, "
            f"{compilations} programs compiled or read from the cache",
        ),
        ("later", f"{record['compilations_after_the_first']} programs compiled"),
        ("peak memory", f"{record['peak_memory_gib']:.2f} GiB"),
    )
    return [f"{name:<16}{text}" for name, text in rows]


def _operations_text(record: Mapping[str, Any]) -> str:
    """Operations of a repetition and per second, next to those of a large matmul."""
    share = record["share_of_matmul"]
    # Without a share there is only the rate to print.
    compared = "a large matmul in the training dtype: "
    if share is not None:
        compared = f"{share:.0%} of a large matmul's "
    count = record["operations"] / 1e9
    rate = record["operations_per_second"] / 1e9
    peak = record["matmul_operations_per_second"] / 1e9
    return f"{count:,.1f} G, {rate:,.1f} G/s, {compared}{peak:,.0f}"
