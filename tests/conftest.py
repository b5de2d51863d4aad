"""Settings of all tests: eight fake devices, strict rank promotion, fast compilation.

Tests spend nearly all their time in the compiler. XLA therefore optimizes little, and
processes share compiled programs. To test with all optimizations, set
JAX_DISABLE_MOST_OPTIMIZATIONS=false.
"""

import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    # XLA aborts on unknown flags, and later versions may have removed this one.
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

    # If set, this is a pytest-xdist worker, or the user wants to keep the programs.
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="instructax-compiled-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[CACHE], ignore_errors=True))

    # JAX reads most of the variables above when it is imported.
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_threefry_partitionable", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests that need the fixture `chain` to the end, except for one at the
    start.

    While one worker computes the chain, the others run the tests that do not need it.
    """
    items.sort(key=lambda item: "chain" in getattr(item, "fixturenames", ()))
    if items:
        items.insert(0, items.pop())
