"""Locks a workdir: two runs in the same folder would destroy each other's work."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from instructax.config import require
from instructax.runtime.distributed import all_hosts
from instructax.runtime.files import open_no_follow

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Context manager: reserves `workdir`, which is created if needed, for this run.

    Process 0 holds a kernel lock on `workdir/lock.json`, which names the holder. The kernel
    releases the lock when the process ends, however it ends, so locks are never stale; the
    file stays. On a file system without locks there is only a warning.

    Raises ConfigError, on every process, if another run holds the lock or the folder cannot
    be used.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            refusal = _acquire(workdir, stack)
        require(
            # The other processes have no lock of their own, but must stop as well.
            all_hosts(not refusal),
            refusal or f"--workdir {workdir} cannot be used, as process 0 reports",
        )
        yield


def _acquire(workdir: Path, stack: contextlib.ExitStack) -> str:
    """Takes the lock until `stack` is closed; returns "", or why it cannot be taken."""
    path = workdir / "lock.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # "a+": the holder's entry must survive if the lock is not available.
        file = stack.enter_context(open_no_follow(path, "a+"))
    except OSError as error:
        return f"--workdir {workdir} cannot be used: {error}"
    try:
        # Non-blocking: a second run must fail, not wait.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"{workdir} is in use by {_describe_holder(path)}: wait for that run, stop it, "
            "or take another --workdir"
        )
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): start no second run in this folder", path, error
        )
        return ""

    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": BOOT_ID.read_text().strip() if BOOT_ID.exists() else "",
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    # The entry of an earlier holder.
    file.truncate(0)
    json.dump(holder, file)
    file.flush()
    return ""


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # the holder is writing it right now
        return "another process"
