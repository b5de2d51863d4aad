"""How fast the stages are: random parameters and tokens, compiled updates, medians, and the
limits of the machine."""

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import truediv
from typing import Any

import jax
import jax.numpy as jnp

from instructax.config import require
from instructax.models import decoding_config
from instructax.stages import load_stage
from instructax.stages.benchmark.workloads import ppo_work, sampling_work, untimed, work_of
from instructax.stages.memory import GIB
from instructax.training.attention import NO_ROWS, select_attention_kernel


def measure(
    config: Any,
    *,
    steps: int,
    ending: float,
    sampling_alone: bool,
    side_by_side: int,
    profile: str,
) -> dict[str, Any]:
    """The record of `steps` repetitions after a first one, which compiles; `config` is the
    config of a stage that trains. `ending`: the probability that a policy ends its response
    at a token (0: never); `sampling_alone`: of PPO the rollout only; `side_by_side`: of
    PPO, so many runs in one program, 1 for one run whose three programs are one, 0 for the
    programs of a run; `profile`: a folder for the trace of one more repetition, or ""."""
    make, mesh = work_of(config)
    require(
        config.stage == "ppo" or not (sampling_alone or ending or side_by_side),
        f"config.stage = {config.stage!r} samples nothing: leave out --sampling_alone, --ending and --side_by_side",
    )
    require(
        not ending
        or (config.model.norm, config.model.tied_embeddings) == ("layernorm", True),
        "--ending needs config.model.norm = 'layernorm' and config.model.tied_embeddings = True",
    )
    lengths = NO_ROWS if sampling_alone else load_stage(config.stage).row_lengths(config)
    config, attention = select_attention_kernel(
        config, lengths, side_by_side=side_by_side > 0
    )
    compute = decoding_config(config.compute) if sampling_alone else config.compute
    if sampling_alone or side_by_side:
        make = sampling_work if sampling_alone else partial(ppo_work, runs=side_by_side)
    compiled = Compilations()
    with compiled:
        started = time.perf_counter()
        work = make(config, mesh, ending)
        work.run(untimed)
        first = time.perf_counter() - started
    seconds: list[float] = []
    phases: dict[str, list[float]] = {}
    figures: list[Mapping[str, float]] = []
    again = Compilations()
    with again:
        for _ in range(steps):
            start = time.perf_counter()
            figures.append(work.run(partial(_timed, phases)))
            seconds.append(time.perf_counter() - start)
    memory = (
        peak_memory()
    )  # before the machine's limits are measured, which takes memory too
    if profile:
        with jax.profiler.trace(profile):
            work.run(untimed)
    tokens, operations = (
        [of(figure) for figure in figures] for of in (work.tokens, work.operations)
    )
    tokens_rate, rate = (
        statistics.median(map(truediv, counts, seconds)) for counts in (tokens, operations)
    )
    peak = matmul_rate(compute.matmul_dtype)
    # Of PPO the sampler may compute in another dtype than the rest: then there is no one
    # rate to compare with.
    one_dtype = (
        config.stage != "ppo"
        or decoding_config(compute).matmul_dtype == compute.matmul_dtype
    )
    return {
        "stage": config.stage,
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "dtype": config.compute.dtype,
        "decoding": config.compute.decoding_dtype,
        "attention": attention,
        "seconds": statistics.median(seconds),
        "seconds_best": min(seconds),
        "seconds_of": {name: statistics.median(times) for name, times in phases.items()},
        "tokens": statistics.median(tokens),
        "tokens_per_second_per_device": tokens_rate / mesh.size,
        "operations": statistics.median(operations),
        "operations_per_second": rate,
        "share_of_matmul": rate / (peak * mesh.size) if one_dtype else None,
        "matmul_operations_per_second": peak,
        "copied_bytes_per_second": copy_rate(),
        "padding": {
            name: statistics.median(figure[name] for figure in figures)
            for name in figures[0]
            if name.endswith("padding")
        },
        "seconds_to_first": first,
        "compilations": compiled.count,
        "compilations_after_the_first": again.count,
        "peak_memory_gib": memory / GIB,
    }


@contextlib.contextmanager
def _timed(phases: dict[str, list[float]], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    phases.setdefault(name, []).append(time.perf_counter() - start)


class Compilations:
    """While entered, counts the programs that are compiled or read from the compilation
    cache."""

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


def matmul_rate(matmul_dtype: str) -> float:
    """Operations per second of the product of two large matrices of the dtype
    `matmul_dtype`, on one device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), matmul_dtype)
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
    return (
        max(known) if known else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )


def table(record: Mapping[str, Any]) -> list[str]:
    """The record as lines to read."""
    dtypes = f"{record['dtype']} (sampling {record['decoding']})"
    phases = ", ".join(
        f"{name} {seconds:.3g} s" for name, seconds in record["seconds_of"].items()
    )
    padding = ", ".join(
        f"{share:.1%} ({name})" for name, share in record["padding"].items()
    )
    share = record["share_of_matmul"]
    of_peak = (
        "a large product in the dtype of training: "
        if share is None
        else f"{share:.0%} of a large product's "
    )
    rows = (
        (
            "device",
            f"{record['devices']} × {record['device']}, {dtypes}, attention: {record['attention']}",
        ),
        (
            "one repetition",
            f"{record['seconds']:.4g} s (best {record['seconds_best']:.4g}): {phases}",
        ),
        (
            "tokens",
            f"{record['tokens']:,.0f}, {record['tokens_per_second_per_device']:,.0f} per second and device",
        ),
        (
            "operations",
            f"{record['operations'] / 1e9:,.1f} G, {record['operations_per_second'] / 1e9:,.1f} G/s, "
            f"{of_peak}{record['matmul_operations_per_second'] / 1e9:,.0f}",
        ),
        ("copies", f"{record['copied_bytes_per_second'] / 1e9:,.1f} GB/s"),
        ("padding", f"of the cells {padding}"),
        (
            "to the first",
            f"{record['seconds_to_first']:.1f} s, {record['compilations']} programs compiled or read again",
        ),
        ("after it", f"{record['compilations_after_the_first']} programs"),
        ("peak memory", f"{record['peak_memory_gib']:.2f} GiB"),
    )
    return [f"{name:<16}{text}" for name, text in rows]
