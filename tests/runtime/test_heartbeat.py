"""The heartbeat file always holds the latest event, even after a kill."""

import os
import signal
import subprocess
import sys
import time

from tests.support.run_logs import last_beat

from instructax.runtime.heartbeat import LENGTH, Heartbeat


def test_the_file_is_one_line_that_is_overwritten(tmp_path):
    path = tmp_path / "new" / "heartbeat-0.json"
    heartbeat = Heartbeat(path)
    assert last_beat(path) == {} == last_beat(tmp_path / "absent")
    for name in ("the end of a rather long phase", "save"):
        heartbeat.beat(name)
        beat = last_beat(path)
        assert (beat["phase"], beat["pid"]) == (name, os.getpid()) and abs(
            beat["unix"] - time.time()
        ) < 60
        assert path.stat().st_size == LENGTH and path.read_text().count("\n") == 1
    heartbeat.close()
    assert last_beat(path)["phase"] == "save"


def test_the_file_survives_a_kill(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from instructax.runtime.heartbeat import Heartbeat
Heartbeat(Path(sys.argv[1])).beat("rollout")
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "beat")])
    assert process.wait() == -signal.SIGKILL
    assert last_beat(tmp_path / "beat")["pid"] == process.pid
