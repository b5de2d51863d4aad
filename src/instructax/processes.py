"""Several processes, one program: how they find each other, and what they must agree on."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructax.configuration import require


def join(coordinator: str, count: int | None, index: int | None) -> None:
    """Makes this process one of `count`; to be called before anything else asks JAX for a device.

    `coordinator` is HOST:PORT of process 0, or "auto": then a TPU pod, SLURM or Open MPI tells all three. Waits for the
    others. Raises ConfigError for values that do not fit each other.
    """
    if coordinator == "auto":
        require(count is None and index is None, "--coordinator=auto finds --processes and --process itself: leave out")
        jax.distributed.initialize()
        return
    host, _, port = coordinator.rpartition(":")
    require(bool(host) and port.isdecimal(), f"--coordinator={coordinator} must be HOST:PORT or auto")
    require(
        count is not None and index is not None and 0 <= index < count,
        f"--coordinator={coordinator} needs --processes=N and --process=0 … N − 1, and got {count} and {index}",
    )
    jax.distributed.initialize(coordinator, count, index)


def everywhere(condition: bool) -> bool:
    """Whether `condition` holds on all processes, which must all ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds on any process; all must ask."""
    return not everywhere(not condition)
