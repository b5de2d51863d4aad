"""Machine faults: full disks, read-only folders, clocks that jump, links and leftover
files."""

import contextlib
import os
import subprocess
import sys

import pytest
from tests.support.data_limits import LIMITS

from instructax import cli
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.data import prepare
from instructax.data.tokenizer import load_tokenizer
from instructax.runtime import metric_log
from instructax.runtime.files import write_json
from instructax.runtime.metric_log import MetricLog, read_metrics
from instructax.runtime.workdir_lock import lock_workdir

KEEPING = {
    "total_steps": 9,
    "log_every": 1,
    "start_step": 0,
    "tensorboard": False,
    "console": False,
}

# Runs every writer on a full disk, and again with free space: (name, exit code when full,
# exit code later).
DRIVER = """
import json, resource, sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from instructax import cli
from instructax.training.state import new_state
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.steps import committed_steps
from instructax.data import prepare
from instructax.data.limits import DataLimits
from instructax.runtime.nonfinite import NonFiniteGuard
from instructax.checkpoints.manifest import write_manifest
from instructax.runtime.files import write_json
from instructax.runtime.metric_log import MetricLog
from instructax.data.tokenizer import load_tokenizer, save_tokenizer

folder = Path(sys.argv[1])
room, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
keeping = dict(total_steps=9, log_every=1, start_step=0, tensorboard=False, console=False)
noise = np.random.default_rng(0).normal(size=(1 << 14,)).astype(np.float32)
state = new_state({"w": jnp.asarray(noise)}, optax.identity())
limits = DataLimits(
    sequence_tokens=64,
    prompt_tokens=24,
    response_tokens=16,
    completions=4,
    prefix_characters=None,
    prompts_per_user=None,
    filter_pii=False,
    splits=(("train", 1.0),),
    split_seed=0,
)
records = [json.dumps({"id": str(i), "text": f"{i} " * 20}) + "\\n" for i in range(99)]
(folder / "t.jsonl").write_text("".join(records))


def metrics():
    with MetricLog(folder / "log", **keeping) as log:
        for step in range(1, 10):
            log.record(step, {f"figure {i}": 0.1 for i in range(99)})


def samples():
    with MetricLog(folder / "log", **keeping) as log:
        log.write_sample(1, {"response": "x" * 9999})


def checkpoint():
    checkpoints = Checkpoints(
        folder / "run",
        save_every=1,
        keep=1,
        best_metric="",
        best_mode="max",
        exported="params",
    )
    try:
        checkpoints.save(1, state, {})
    finally:
        checkpoints.close()


def skipped():
    skips = NonFiniteGuard(5, folder / "skipped")
    skips.observe(1, {"x": noise}, {"skipped": jnp.float32(1)})
    skips.check()


def manifest():
    write_manifest(
        folder,
        stage="x",
        config={str(i): 0 for i in range(999)},
        model={},
        head=None,
        tokenizer_hash="0",
        tokenizer_path="x",
        data_hashes={},
        parents={},
    )


WRITERS = {
    "metrics": metrics,
    "samples": samples,
    "summary": lambda: write_json(folder / "summary.json", {str(i): 0 for i in range(999)}),
    "manifest": manifest,
    "tokenizer": lambda: save_tokenizer(
        load_tokenizer("bytes"), str(folder / "tokenizer.json")
    ),
    "rows": lambda: prepare.prepare_text(
        [folder / "t.jsonl"], load_tokenizer("bytes"), limits, folder / "rows"
    ),
    "skipped": skipped,
    "checkpoint": checkpoint,
}
write_json(folder / "summary.json", {"old": True})
for name, write in WRITERS.items():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    full = cli.guarded(write)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    if name == "summary":
        assert json.loads((folder / "summary.json").read_text()) == {"old": True}
    if name == "checkpoint":
        assert committed_steps(folder / "run") == []
    print(name, full, cli.guarded(write), flush=True)
assert committed_steps(folder / "run") == [1]
"""
WRITERS = (
    "metrics",
    "samples",
    "summary",
    "manifest",
    "tokenizer",
    "rows",
    "skipped",
    "checkpoint",
)


def test_a_full_disk_is_one_line_for_every_writer_and_later_it_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} 2 0" for name in WRITERS], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # Before the last line, Orbax's thread prints its own.
    assert len(errors) == len(WRITERS)


@contextlib.contextmanager
def as_somebody(folder):
    """While entered, `folder` is not writable. Root may write anywhere, so the test runs as
    nobody."""
    folder.chmod(0o500)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


REFUSED = {
    "a workdir": lambda folder: lock_workdir(folder / "run").__enter__(),
    "checkpoints": lambda folder: Checkpoints(
        folder, save_every=1, keep=1, best_metric="", best_mode="max", exported="params"
    ),
    "a log": lambda folder: MetricLog(folder / "run", **KEEPING),
    "a summary": lambda folder: write_json(folder / "summary.json", {}),
    "rows": lambda folder: prepare.prepare_text(
        [folder.parent / "t.jsonl"], load_tokenizer("bytes"), LIMITS, folder / "rows"
    ),
}


@pytest.mark.parametrize("writer", REFUSED)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, writer):
    (tmp_path / "t.jsonl").write_text('{"id": "a", "text": "x"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    with as_somebody(folder):
        code = cli.guarded(lambda: REFUSED[writer](folder))
    error = capsys.readouterr().err
    assert (
        code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and "Permission denied" in error
    )
    assert not any(folder.iterdir())


def test_a_clock_that_jumps_changes_no_duration(tmp_path, monkeypatch):
    """The wall clock goes back by a day and forward by a year; only `time/unix_s` shows
    it."""
    walls = iter([1e9, 1e9 - 86_400, 1e9 + 3e7])
    monkeypatch.setattr(metric_log.time, "time", lambda: next(walls))
    with MetricLog(tmp_path, **KEEPING) as log:
        for step in (1, 2, 3):
            with log.phase("update"):
                log.record(step, {"loss": 1.0, "tokens": 10})
    lines = read_metrics(tmp_path)
    assert [line["time/unix_s"] for line in lines] == [1e9, 1e9 - 86_400, 1e9 + 3e7]
    assert all(0 <= line["time/step_s"] < 60 for line in lines)
    assert all(line["time/tokens_per_second_per_device"] > 0 for line in lines)


def test_a_step_behind_a_link_is_dropped_and_what_it_leads_to_stays(tmp_path):
    """Steps that were moved to another disk and linked are valid. Deleting one removes only
    the link."""
    import jax.numpy as jnp
    import optax

    from instructax.training.state import new_state

    elsewhere = tmp_path / "elsewhere"
    workdir = tmp_path / "run"
    checkpoints = Checkpoints(
        workdir, save_every=1, keep=1, best_metric="", best_mode="max", exported="params"
    )
    state = new_state({"w": jnp.ones(3)}, optax.identity())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    (workdir / "checkpoints" / "1").rename(elsewhere)
    (workdir / "checkpoints" / "1").symlink_to(elsewhere)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert checkpoints.steps() == [2] and any(elsewhere.iterdir())
