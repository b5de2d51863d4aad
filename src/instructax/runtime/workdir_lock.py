"""One run, one workdir: two commands that write to the same folder would destroy each
other's work."""

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

BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """While entered, `workdir` belongs to this run: process 0 holds `workdir/lock.json`,
    which says who.

    The lock is the kernel's: it ends with the process, however that ends, so none is ever
    stale; the file stays. A file system without locks is used with a warning. Raises
    ConfigError, on every process, if another run holds it or if there can be no such
    folder.
    """
    with contextlib.ExitStack() as held:
        refusal = _hold(workdir, held) if jax.process_index() == 0 else ""
        require(
            all_hosts(not refusal),
            refusal or f"--workdir {workdir} cannot be used, as process 0 reports",
        )
        yield


def _hold(workdir: Path, held: contextlib.ExitStack) -> str:
    """Takes the lock until `held` ends; "" or the reason why that cannot be."""
    path = workdir / "lock.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(open_no_follow(path, "a+"))
    except OSError as error:
        return f"--workdir {workdir} cannot be used: {error}"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{workdir} is in use by {_described(path)}: wait for that run, stop it, or take another --workdir"
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): start no second run in this folder", path, error
        )
        return ""
    file.truncate(0)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    json.dump(
        {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot, "since": since},
        file,
    )
    file.flush()
    return ""


def _described(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "another process"
