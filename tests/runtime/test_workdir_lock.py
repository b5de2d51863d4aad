"""Two runs in one workdir: the second is refused while the first is alive, however the
first ends."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from instructax.config import ConfigError
from instructax.runtime.workdir_lock import lock_workdir

HOLDER = """
import sys, time
from pathlib import Path
from instructax.runtime.workdir_lock import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_told_who_holds_the_folder(holder, tmp_path):
    with (
        pytest.raises(
            ConfigError, match=rf"is in use by process {holder.pid} on \S+ since 20\d\d-"
        ) as error,
        lock_workdir(tmp_path),
    ):
        pass
    assert "wait for that run, stop it, or take another --workdir" in str(error.value)
    held = json.loads((tmp_path / "lock.json").read_text())
    assert held.keys() == {"pid", "host", "boot", "since"} and held["pid"] == holder.pid


def test_the_lock_of_a_killed_run_is_free(holder, tmp_path):
    holder.kill()
    holder.wait()
    with lock_workdir(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_the_lock_is_released(tmp_path):
    for _ in range(2):
        with lock_workdir(tmp_path / "new" / "folder"):
            pass
    with pytest.raises(ZeroDivisionError), lock_workdir(tmp_path):
        _ = 1 / 0
    with lock_workdir(tmp_path):
        pass


def test_a_lock_file_that_is_still_being_written_counts(tmp_path):
    with (tmp_path / "lock.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(ConfigError, match="is in use by another process"),
            lock_workdir(tmp_path),
        ):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_workdir(tmp_path):
        pass
    assert (
        "cannot be locked ([Errno 95] Operation not supported): start no second run"
        in caplog.text
    )


def test_an_impossible_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            ConfigError, match=r"--workdir .*/file/run cannot be used: .*Not a directory"
        ),
        lock_workdir(tmp_path / "file" / "run"),
    ):
        pass
