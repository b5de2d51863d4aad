"""A process fails, hangs, is killed, or runs out of memory or disk: all processes end soon
with the right exit codes, and the same command resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.runtime.test_distributed import free_address
from tests.support import stages

from instructax.checkpoints.steps import committed_steps
from instructax.runtime.metric_log import read_metrics

pytest_plugins = ("tests.support.pipeline_fixture",)

# Process `victim` suffers `fault` before it reads batch `step`.
DRIVER = """
import json, os, resource, signal, sys, time
from pathlib import Path

import numpy as np

from instructax import cli, experiment
from instructax.config import require
from instructax.runtime import distributed
from instructax.stages import sft

address, count, index, victim, fault, step, config, workdir = sys.argv[1:]
reader = sft.lm_reader


def fail():
    print("fault", flush=True)
    if fault == "refuse":
        require(False, "a value that this process alone finds wrong")
    if fault == "raise":
        1 / 0
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        taken = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, resource.RLIM_INFINITY))
        np.ones(2**28)
    if fault == "disk":  # it goes on to its next save
        return resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    if fault == "stop":
        return os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def watched_reader(*args, **keywords):
    read = reader(*args, **keywords)

    def watched(number):
        if (index, str(number)) == (victim, step):
            fail()
        return read(number)

    return watched


def run():
    distributed.join_processes(address, int(count), int(index))
    sft.lm_reader = watched_reader
    experiment.run_stage(json.loads(config), Path(workdir))


sys.exit(distributed.exit_on_failure(lambda: cli.guarded(run)))
"""
STOPPED = 10.0  # seconds for which a process is stopped
LIMIT = 20.0  # seconds from the fault to the end of the last process


def run_all(
    config, workdir, *, count=2, victim=-1, fault="", step=0
) -> tuple[list[int], float]:
    """(exit codes, seconds from the fault to the end of the last process)."""
    # The last occurrence of a flag wins.
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags}
    address = free_address()
    rest = [str(victim), fault, str(step), json.dumps(config), str(workdir)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(count), str(index), *rest],
            env=environment,
            stdout=subprocess.PIPE if index == victim else None,
            stderr=subprocess.PIPE
            if fault == "disk"
            else None,  # the limit on file sizes does not apply to a pipe
            text=True,
        )
        for index in range(count)
    ]
    try:
        if victim >= 0:
            output = running[victim].stdout
            assert output is not None and "fault\n" in iter(output.readline, "")
        since = time.monotonic()
        if fault == "stop":
            time.sleep(STOPPED)
            running[victim].send_signal(signal.SIGCONT)
        if fault == "disk":
            sys.stderr.write(running[victim].communicate(timeout=120)[1])
        codes = [process.wait(timeout=120) for process in running]
        return codes, time.monotonic() - since
    finally:
        for process in running:
            process.kill()
            if process.stdout is not None:
                process.stdout.close()


# The collective sum fails, or JAX ends the process because its coordination service is
# gone.
FAILED = {1, -signal.SIGABRT}


SLOW = pytest.mark.slow
FAULTS = [
    ("kill", 2, 1, {-signal.SIGKILL}),
    pytest.param("refuse", 2, 1, {2}, marks=SLOW),
    pytest.param("raise", 2, 0, {1}, marks=SLOW),
    pytest.param("hang", 2, 1, {-signal.SIGABRT}, marks=SLOW),
    pytest.param("kill", 4, 2, {-signal.SIGKILL}, marks=SLOW),
    pytest.param("raise", 4, 0, {1}, marks=SLOW),
    pytest.param("raise", 4, 3, {1}, marks=SLOW),
    pytest.param("hang", 4, 1, {-signal.SIGABRT}, marks=SLOW),
]
SCHEDULE = {"run.log_every": 1, "run.save_every": 1, "run.evaluate_every": 0}


@pytest.mark.parametrize(("fault", "count", "victim", "own"), FAULTS)
def test_all_end_soon_and_the_same_command_goes_on(
    chain, tmp_path, fault, count, victim, own
):
    config = stages.config_of(chain, "sft", {"steps": 4, "epochs": 0.0, **SCHEDULE})
    workdir = tmp_path / "run"
    whole = [0] * count
    # Compiled beforehand, so that compilation does not look like a hang.
    if fault == "hang":
        assert run_all(config, tmp_path / "before", count=count)[0] == whole
        config = {**config, "run": {**config["run"], "watchdog_seconds": 12.0}}
    codes, seconds = run_all(
        config, workdir, count=count, victim=victim, fault=fault, step=2
    )
    assert codes[victim] in own and set(codes[:victim] + codes[victim + 1 :]) <= FAILED, (
        codes
    )
    assert seconds < LIMIT
    assert committed_steps(workdir)
    if fault == "hang":
        assert "in fail" in (workdir / f"hang-{victim}.txt").read_text()
    assert run_all(config, workdir, count=count)[0] == whole
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["memory", "disk"])
def test_without_memory_or_disk_it_ends_in_one_line_and_goes_on_later(
    chain, tmp_path, fault, capfd
):
    config = stages.config_of(chain, "sft", {"steps": 4, "epochs": 0.0, **SCHEDULE})
    workdir = tmp_path / "run"
    assert run_all(config, workdir, count=1, victim=0, fault=fault, step=2)[0] == [2]
    errors = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")
    ]
    assert len(errors) == 1 and ("out of memory" in errors[0] or fault == "disk")
    assert committed_steps(workdir) and not (workdir / "summary.json").exists()
    assert run_all(config, workdir, count=1)[0] == [0]
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]


def lines_without_times(workdir):
    """The logged metrics of a run, without times."""
    lines = []
    for line in read_metrics(workdir):
        lines.append({k: v for k, v in line.items() if not k.startswith("time/")})
    return lines


@pytest.mark.slow
def test_a_run_that_was_stopped_for_ten_seconds_goes_on(chain, tmp_path):
    """The stop is longer than the watchdog's limit. The run before it has compiled
    everything."""
    config = stages.config_of(chain, "sft", {"steps": 4, "epochs": 0.0, **SCHEDULE})
    assert run_all(config, tmp_path / "before", count=1)[0] == [0]
    config = {**config, "run": {**config["run"], "watchdog_seconds": 8.0}}
    codes, seconds = run_all(
        config, tmp_path / "run", count=1, victim=0, fault="stop", step=2
    )
    assert codes == [0] and seconds > STOPPED
    assert not list((tmp_path / "run").glob("hang-*"))
    assert lines_without_times(tmp_path / "before") == lines_without_times(tmp_path / "run")
