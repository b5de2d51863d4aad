"""The watchdog ends a stuck process and prints the stacks; it leaves a working process
alone."""

import signal
import subprocess
import sys
import time

import pytest

from instructax.runtime.watchdog import Watchdog

STUCK = """
import sys, time
from pathlib import Path
from instructax.runtime.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

with Watchdog(1.0, Path(sys.argv[1])) as watchdog:
    watchdog.beat("rollout")
    waits_for_ever()
"""


def test_a_stuck_process_is_aborted_and_says_where(tmp_path):
    report = tmp_path / "hang-0.txt"
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(report)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith(
        "watchdog: nothing has moved for 1 s since 'rollout'; stacks: "
    )
    assert (
        "in waits_for_ever" in report.read_text()
        and "since 'rollout'" in report.read_text()
    )


@pytest.mark.parametrize("seconds", [0.6, 0])
def test_a_process_that_makes_progress_is_left_alone(tmp_path, seconds):
    with Watchdog(seconds, tmp_path / "hang.txt") as watchdog:
        for number in range(8):
            time.sleep(0.1)
            watchdog.beat(f"phase {number}")
    time.sleep(0.7)  # and after its end
    assert not (tmp_path / "hang.txt").exists()


STOPPED = """
import sys, time
from pathlib import Path
from instructax.runtime.watchdog import Watchdog

with Watchdog(2.0, Path(sys.argv[1])) as watchdog:
    for number in range(5):
        watchdog.beat(f"phase {number}")
        print("moves", flush=True)
        time.sleep(0.5)
"""


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    report = tmp_path / "hang-0.txt"
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(report)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "moves\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=50) == 0
    assert not report.exists()
