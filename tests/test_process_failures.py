"""One process of two fails, hangs or is killed: both end soon, with codes that say so, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import stages
from instructax.checkpoint import committed_steps
from instructax.experiment import metrics_of
from test_processes import free_address

pytest_plugins = ("chain",)

# Process `victim` meets with `fault` before it reads batch `step`.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path

from instructax import command, experiment, processes, supervised
from instructax.configuration import require

address, count, index, victim, fault, step, config, workdir = sys.argv[1:]
reader = supervised.lm_reader


def fail():
    print("fault", flush=True)
    if fault == "refuse":
        require(False, "a value that this process alone finds wrong")
    if fault == "raise":
        1 / 0
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def watched_reader(*args, **keywords):
    read = reader(*args, **keywords)

    def watched(number):
        if (index, str(number)) == (victim, step):
            fail()
        return read(number)

    return watched


def run():
    processes.join(address, int(count), int(index))
    supervised.lm_reader = watched_reader
    experiment.run_stage(json.loads(config), Path(workdir))


sys.exit(processes.ended(lambda: command.guarded(run)))
"""
LIMIT = 20.0  # seconds from the fault to the end of the last process


def run_all(config, workdir, folder, *, count=2, victim=-1, fault="", step=0) -> tuple[list[int], float]:
    """(exit codes, seconds from the fault to the end of the last process)."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    address, rest = free_address(), [str(victim), fault, str(step), json.dumps(config), str(workdir)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(count), str(index), *rest],
            env=environment,
            stdout=subprocess.PIPE if index == victim else None,
            text=True,
        )
        for index in range(count)
    ]
    try:
        if victim >= 0:
            output = running[victim].stdout
            assert output is not None and "fault\n" in iter(output.readline, "")
        since = time.monotonic()
        codes = [process.wait(timeout=120) for process in running]
        return codes, time.monotonic() - since
    finally:
        for process in running:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()


FAILED = {1, -signal.SIGABRT}  # an error of the sum over all processes, or JAX's own end where its service has gone


SLOW = pytest.mark.slow
FAULTS = [
    ("kill", 1, lambda codes: codes[1] == -signal.SIGKILL and codes[0] in FAILED),
    pytest.param("refuse", 1, lambda codes: codes[1] == 2 and codes[0] in FAILED, marks=SLOW),
    pytest.param("raise", 0, lambda codes: codes[0] == 1 and codes[1] in FAILED, marks=SLOW),
    pytest.param("hang", 1, lambda codes: codes[1] == -signal.SIGABRT and codes[0] in FAILED, marks=SLOW),
]


@pytest.mark.xdist_group("chain")
@pytest.mark.parametrize(("fault", "victim", "expected"), FAULTS)
def test_both_end_soon_and_the_same_command_goes_on(chain, tmp_path, fault, victim, expected):
    keeping = {"run.log_every": 1, "run.save_every": 1, "run.evaluate_every": 0}
    config = stages.config_of(chain, "sft", {"steps": 4, "epochs": 0.0, **keeping})
    workdir, folder = tmp_path / "run", tmp_path / "compiled"
    if fault == "hang":  # compiled before, or compiling would look like hanging
        assert run_all(config, tmp_path / "before", folder)[0] == [0, 0]
        config = {**config, "run": {**config["run"], "watchdog_seconds": 12.0}}
    codes, seconds = run_all(config, workdir, folder, victim=victim, fault=fault, step=2)
    assert expected(codes), codes
    assert seconds < LIMIT
    assert committed_steps(workdir)
    if fault == "hang":
        assert "in fail" in (workdir / "hang-1.txt").read_text()
    assert run_all(config, workdir, folder)[0] == [0, 0]
    assert [line["step"] for line in metrics_of(workdir)] == [1, 2, 3, 4]
