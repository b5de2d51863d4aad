"""Multi-process runs: how processes join, agree on decisions, and end together."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructax.config import require

# Seconds without a heartbeat of one process after which the others end.
HEARTBEAT_TIMEOUT = 15


def join_processes(coordinator: str, count: int | None, index: int | None) -> None:
    """Makes this process one of `count` that share the run; waits for the others.

    Must be called before anything else asks JAX for a device.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" to ask the TPU pod, SLURM or Open MPI,
        which also know the other two arguments.
      count: the number of processes.
      index: which of them this is, from 0.

    Raises:
      ConfigError: the values do not fit together.
    """
    if coordinator == "auto":
        require(
            count is None and index is None,
            "--coordinator=auto finds --processes and --process itself: leave them out",
        )
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
        _restore_sigterm()
        return
    # IPv6 addresses contain colons too: the port follows the last one.
    host, _, port = coordinator.rpartition(":")
    require(
        bool(host) and port.isdecimal(),
        f"--coordinator={coordinator} must be HOST:PORT or auto",
    )
    require(
        count is not None and index is not None and 0 <= index < count,
        f"--coordinator={coordinator} needs --processes=N and --process=0 … N − 1, "
        f"and got {count} and {index}",
    )
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
    )
    _restore_sigterm()


def _restore_sigterm() -> None:
    """Undoes JAX's handler, which only notes a preemption; `preemption` handles SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_on_failure(call: Callable[[], int]) -> int:
    """Runs `call` and returns its exit code.

    In a run of several processes, a process that fails ends here and at once. JAX's own
    shutdown would wait for the others for five minutes, while they wait for it in a
    collective.
    """
    try:
        code = call()
    except Exception:
        # A single process has nobody to wait for: the exception may take its usual way.
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    # `os._exit` skips Python's cleanup, and with it JAX's shutdown barrier.
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def all_hosts(condition: bool) -> bool:
    """Whether `condition` holds on all processes. Collective: all of them must call it."""
    # No collective for a single process: it would need a device.
    if jax.process_count() == 1:
        return condition
    gathered = multihost_utils.process_allgather(np.asarray(condition))
    return bool(np.all(gathered))


def any_host(condition: bool) -> bool:
    """Whether `condition` holds on some process. Collective: all of them must call it."""
    return not all_hosts(not condition)
