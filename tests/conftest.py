"""Eight fake devices, strict ranks, and warnings as errors for every test; programs that
are soon compiled.

The tests wait for the compiler, hardly for the programs: XLA does with few optimizations
here, and what one process has compiled the others read.
`JAX_DISABLE_MOST_OPTIMIZATIONS=false` before the command leaves them in.
"""

import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if version("jaxlib").startswith("0.10."):  # later ones may not know it, and end then
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if CACHE not in os.environ:  # else this is a worker, or someone wants the programs kept
        os.environ[CACHE] = tempfile.mkdtemp(prefix="instructax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[CACHE], ignore_errors=True))

    import jax  # which reads most of these when it is imported

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_threefry_partitionable", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the chain of runs come last, but one of them first: while one process makes
    the chain, another has other things to do than to wait for it."""
    items.sort(key=lambda item: "chain" in getattr(item, "fixturenames", ()))
    if items:  # else nothing was collected, which pytest itself reports
        items.insert(0, items.pop())
