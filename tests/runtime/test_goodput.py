"""The goodput log counts every second once, across kills, torn lines and repeated steps."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from instructax.runtime import goodput
from instructax.runtime.goodput import (
    GoodputLog,
    format_totals,
    lost_seconds,
    read_events,
    read_totals,
)


class Clock:
    """Stands in for `time`; it only advances when the test says so."""

    def __init__(self):
        self.now = 100.0

    def time(self):
        return self.now

    perf_counter = time


@pytest.fixture
def clock():
    fake = Clock()
    first = mock.patch.object(GoodputLog, "_last_closed", 0.0)
    with (
        first,
        mock.patch.object(goodput, "time", fake),
        mock.patch.object(goodput, "_process_start", lambda: 90.0),
    ):
        yield fake


def record_events(goodput_log, clock, *beats):
    """Records heartbeat events, each followed by a number of seconds."""
    for name, seconds in beats:
        goodput_log.beat(name)
        clock.now += seconds


def test_every_second_counts_once(tmp_path, clock):
    goodput_log = GoodputLog(tmp_path / "goodput.jsonl", writes=True)
    clock.now += 2
    record_events(goodput_log, clock, ("restore", 3), ("start", 1))
    goodput_log.begin(0)
    record_events(
        goodput_log,
        clock,
        ("update", 20),
        ("steps", 0.5),
        ("the end of update", 0),
        ("evaluate", 4),
    )
    record_events(goodput_log, clock, ("the end of evaluate", 0.25))
    goodput_log.beat("save")
    goodput_log.write(1)
    clock.now += 7
    goodput_log.beat("the end of save")
    goodput_log.close()
    found = read_totals(tmp_path / "goodput.jsonl")
    wanted = {
        "init": 12,
        "restore": 3,
        "compile": 21,
        "steps": 0.75,
        "evaluation": 4,
        "save": 7,
        "lost": 0,
    }
    assert found == pytest.approx({**wanted, "processes": 1, "goodput": 4.75 / 47.75})
    assert sum(wanted.values()) == pytest.approx(clock.now - 90)
    assert format_totals(found).startswith(
        "goodput 10% in 1 process: steps 0:00:01, evaluation 0:00:04, compile 0:00:21"
    )


def test_repeated_steps_are_lost_time_once(tmp_path, clock):
    path = tmp_path / "goodput.jsonl"
    for begun, ended in ((0, 6), (4, 5), (4, 8)):
        goodput_log = GoodputLog(path, writes=True)
        goodput_log.begin(begun)
        goodput_log.beat("steps")
        for step in range(begun + 1, ended + 1):
            clock.now += 1
            goodput_log.beat("data")
            goodput_log.write(step)
        goodput_log.close()
    lost = [
        (line["step"], line["seconds"])
        for line in read_events(path)
        if line["kind"] == "lost"
    ]
    # Steps 5 and 6 of the first process, step 5 of the second.
    assert lost == [(4, 2), (4, 1)]
    found = read_totals(path)
    assert found["steps"] - found["lost"] == 8
    assert [line["step"] for line in read_events(path) if line["kind"] == "steps"] == [
        *range(1, 7),
        5,
        5,
        6,
        7,
        8,
    ]


def test_a_run_starts_where_the_previous_run_of_its_process_ended(tmp_path, clock):
    for name, seconds in (("first", 30), ("second", 2)):
        goodput_log = GoodputLog(tmp_path / name, writes=True)
        clock.now += seconds
        goodput_log.beat("restore")
        goodput_log.begin(0)
        goodput_log.close()
        clock.now += 1
    # The first run counts from the start of the process, ten seconds earlier; the second
    # from the end of the first.
    assert [
        read_totals(tmp_path / name)["init"] for name in ("first", "second")
    ] == pytest.approx([10 + 30, 1 + 2])


def test_a_torn_line_is_skipped_and_the_next_event_gets_its_own_line(tmp_path):
    path = tmp_path / "goodput.jsonl"
    path.write_text(
        '{"kind": "steps", "seconds": 2, "step": 3, "process": 1}\n{"kind": "steps", "sec'
    )
    goodput_log = GoodputLog(path, writes=True)
    goodput_log.begin(2)
    goodput_log.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"kind": "steps", "sec'
    assert [line["kind"] for line in read_events(path)] == ["steps", "init", "lost"]
    assert all(json.loads(line) for line in (lines[0], *lines[2:]))


def test_lines_that_are_not_the_ledgers_are_passed_over(tmp_path):
    path = tmp_path / "goodput.jsonl"
    whole = {"kind": "lost", "seconds": 0, "step": 3, "process": 1}
    odd = [
        {"kind": None},
        {"kind": "tea"},
        {"step": "x"},
        {"process": []},
        {"seconds": None},
    ]
    lines = [json.dumps({**whole, **change}) for change in odd]
    lines += [
        '{"kind": "steps", "seconds": NaN, "step": 1, "process": 1}',
        "[" * 100_000,
        "7",
        "[]",
        "{}",
    ]
    lines += [
        '{"kind": "steps", "seconds": 1, "step": 1e999, "process": 1}',
        '{"seconds": 1, "step": 1}',
    ]
    path.write_text("\n".join([*lines, json.dumps(whole)]) + "\n")
    assert read_events(path) == [whole]
    assert read_totals(path)["goodput"] == 0.0


def test_saves_and_compilation_are_never_lost():
    lines = [{"kind": kind, "step": 5, "seconds": 1} for kind in goodput.KINDS]
    assert lost_seconds(lines, 4) == 2 and lost_seconds(lines, 5) == 0
    assert read_totals(goodput.Path("nowhere.jsonl")) == {}


def test_other_processes_write_nothing(tmp_path):
    goodput_log = GoodputLog(tmp_path / "goodput.jsonl", writes=False)
    goodput_log.beat("restore")
    goodput_log.begin(0)
    goodput_log.close()
    assert not (tmp_path / "goodput.jsonl").exists()


def test_the_lines_of_a_killed_process_are_on_disk(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from instructax.runtime.goodput import GoodputLog
goodput_log = GoodputLog(Path(sys.argv[1]), writes=True)
goodput_log.begin(0)
goodput_log.beat("steps")
os.kill(os.getpid(), signal.SIGKILL)
"""
    since = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "goodput.jsonl")], env=os.environ
    )
    assert done.returncode == -signal.SIGKILL
    (line,) = read_events(tmp_path / "goodput.jsonl")
    # Linux reports process start times to a hundredth of a second.
    assert line["kind"] == "init" and 0 < line["seconds"] < time.time() - since + 0.02
    assert since - 1 < line["process"] < time.time()
