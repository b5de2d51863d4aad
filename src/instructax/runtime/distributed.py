"""Several processes, one program: how they find each other, and what they must agree on."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructax.config import require

HEARTBEAT = 15  # seconds without a sign of a process after which the others end


def join_processes(coordinator: str, count: int | None, index: int | None) -> None:
    """Makes this process one of `count`; to be called before anything else asks JAX for a
    device.

    `coordinator` is HOST:PORT of process 0, or "auto": then a TPU pod, SLURM or Open MPI
    tells all three. Waits for the others. Raises ConfigError for values that do not fit
    each other.
    """
    if coordinator == "auto":
        require(
            count is None and index is None,
            "--coordinator=auto finds --processes and --process itself: leave out",
        )
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        _forget_preemption()
        return
    host, _, port = coordinator.rpartition(":")
    require(
        bool(host) and port.isdecimal(),
        f"--coordinator={coordinator} must be HOST:PORT or auto",
    )
    require(
        count is not None and index is not None and 0 <= index < count,
        f"--coordinator={coordinator} needs --processes=N and --process=0 … N − 1, and got {count} and {index}",
    )
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT
    )
    _forget_preemption()


def _forget_preemption() -> None:
    """JAX takes SIGTERM for its own notice of preemption, and then it ends nothing:
    `interruption` answers it here."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_on_failure(call: Callable[[], int]) -> int:
    """The exit code that `call` returns; of several processes, one that does not end with 0
    ends here and at once.

    JAX would let it wait for the others for five minutes, and they, in a sum over all, for
    it.
    """
    try:
        code = call()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def all_hosts(condition: bool) -> bool:
    """Whether `condition` holds on all processes, which must all ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.all(multihost_utils.process_allgather(np.asarray(condition))))


def any_host(condition: bool) -> bool:
    """Whether `condition` holds on any process; all must ask."""
    return not all_hosts(not condition)
