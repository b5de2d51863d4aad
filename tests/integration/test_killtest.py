"""Runs are really killed and end like undisturbed ones; the kill test detects planted
differences."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import islice

import jax
import pytest
from tests import killtest
from tests.support.saved import flip_bit, make_ppo_state

from instructax.checkpoints.checkpoint import Checkpoints
from instructax.config import ConfigError
from instructax.runtime.files import write_json
from instructax.runtime.heartbeat import Heartbeat

pytest_plugins = ("tests.support.pipeline_fixture",)

TRAIN = (sys.executable, "scripts/train.py")
# The last occurrence of a flag wins.
ONE_DEVICE = " --xla_force_host_platform_device_count=1"


def write_finished_run(workdir, *, seed=1.0, averaged=2.0, loss=0.5, sample="an answer"):
    """A finished PPO run, written without training."""
    state = make_ppo_state(seed)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x * averaged, state.ema))
    checkpoints = Checkpoints(
        workdir, save_every=1, keep=1, best_metric="", best_mode="max", exported="ema"
    )
    checkpoints.save(1, state, {})
    checkpoints.close()
    (workdir / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": loss, "time/step_s": seed}) + "\n"
    )
    (workdir / "samples.jsonl").write_text(
        json.dumps({"step": 1, "response": sample}) + "\n"
    )
    write_json(workdir / "summary.json", {"loss": 0.5, "time/step_s": seed})
    return workdir


def test_differences_are_named(tmp_path):
    straight = write_finished_run(tmp_path / "straight")
    assert killtest.differences(write_finished_run(tmp_path / "same"), straight) == []
    other = write_finished_run(
        tmp_path / "other", averaged=2.0 + 2**-20, loss=0.25, sample="another"
    )
    assert killtest.differences(other, straight) == ["average", "metrics", "samples"]
    moved = write_finished_run(tmp_path / "moved", seed=3.0)
    assert {"parameters", "optimizer", "counters"} <= set(
        killtest.differences(moved, straight)
    )


def test_a_last_step_without_hashes_differs(tmp_path):
    straight = write_finished_run(tmp_path / "straight")
    same = write_finished_run(tmp_path / "same")
    (same / "checkpoints/1.sha256.json").unlink()
    assert killtest.differences(same, straight) == ["last step"]
    flip_bit(straight / "checkpoints/1")
    with pytest.raises(ValueError, match="checkpoint is damaged"):
        killtest.fingerprint(straight)


def test_places_are_drawn_evenly_and_reproducibly():
    metrics = [
        {"step": step, "time/rollout_s": 0.1, "time/save_s": 0.2} for step in range(1, 9)
    ]
    places = list(islice(killtest.draw("ppo", random.Random("0 ppo"), 10.0, metrics), 22))
    assert places == list(
        islice(killtest.draw("ppo", random.Random("0 ppo"), 10.0, metrics), 22)
    )
    phases = (*killtest.PLACES, "rollout", "score", "ppo_update")
    assert sorted(place.phase for place in places[:11]) == sorted(phases)
    assert sorted(place.phase for place in places[11:]) == sorted(phases)
    longest = {
        "rollout": 0.1,
        "save": 0.2 + killtest.BACKGROUND_SECONDS["save"],
        "clock": 10.0,
        "init": 5.0,
    }
    assert all(
        0 <= place.delay <= longest.get(place.phase, 10.0) and place.step < 8
        for place in places
    )


def test_where_a_kill_fell(tmp_path):
    heartbeat = Heartbeat(tmp_path / "heartbeat-0.json")
    heartbeat.beat("rollout")
    heartbeat.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    pid = os.getpid()
    place = killtest.Place("clock", 0, 1.0)
    found = killtest.found_at(tmp_path, pid, place)
    assert found == {
        "wanted": "clock",
        "phase": "rollout",
        "step": 2,
        "saving": False,
        "saved": 0,
    }
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    assert killtest.found_at(tmp_path, pid + 1, place) == {
        **found,
        "phase": "init",
        "saving": True,
    }


def test_the_table(tmp_path):
    kill = {"wanted": "save", "phase": "save", "step": 4, "saving": True, "saved": 2}
    table = [
        {"stage": "sft", "kills": [kill, kill], "differing": []},
        {"stage": "sft", "kills": [kill], "differing": ["optimizer"]},
    ]
    lines = killtest.rows(table)
    assert lines[0].split() == [
        "stage",
        "run",
        "killed",
        "in",
        "went",
        "on",
        "from",
        "outcome",
    ]
    assert lines[1].split() == [
        "sft",
        "0",
        "save",
        "after",
        "step",
        "4,",
        "saving",
        "2",
        "equal",
    ]
    assert lines[3].endswith("2  DIFFERS: optimizer")
    assert lines[4:] == ["sft: 3 kills in 2 runs, 1 of them equal to the undisturbed one"]


def test_an_unknown_stage_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError,
        match="--stages has ppo-pxt: give some of pretrain,sft,reward,ppo,ppo-ptx",
    ):
        killtest.run(tmp_path, TRAIN, names=["ppo-pxt"], kills=1, seed=0)


def test_a_process_that_ends_before_the_place_is_not_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    assert not killtest.strike(process, tmp_path, killtest.Place("save", 0, 0.0))
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert killtest.strike(sleeper, tmp_path, killtest.Place("clock", 0, 0.1))
    assert sleeper.returncode == -signal.SIGKILL


def test_a_run_that_fails_without_a_kill_ends_its_stage(tmp_path, monkeypatch):
    record = {"stage": "sft", "kills": [], "differing": ["exit code 2"]}
    monkeypatch.setattr(killtest, "straight", lambda *_: {"sft": 1.0})
    monkeypatch.setattr(killtest, "draw", lambda *_: iter(()))
    monkeypatch.setattr(killtest, "read_metrics", lambda _: [])
    monkeypatch.setattr(killtest, "killed_run", lambda *_: record)
    assert killtest.run(tmp_path, TRAIN, names=["sft"], kills=3, seed=0) == 1
    assert json.loads((tmp_path / "killtest.json").read_text())["runs"] == [record]


def killed(tmp_path, names, kills):
    assert killtest.run(tmp_path, TRAIN, names=names, kills=kills, seed=0) == 0
    table = json.loads((tmp_path / "killtest.json").read_text())["runs"]
    for name in names:
        mine = [record for record in table if record["stage"] == name]
        assert sum(len(record["kills"]) for record in mine) >= kills
        assert all(record["differing"] == [] for record in mine)
    shutil.rmtree(tmp_path)


def test_a_killed_run_ends_as_one_that_was_not(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + ONE_DEVICE)
    for folder in ("world", "rows"):
        shutil.copytree(chain / folder, tmp_path / folder)
    killed(tmp_path, ["pretrain"], 1)


@pytest.mark.slow
def test_every_stage_killed_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + ONE_DEVICE)
    killed(tmp_path, [*killtest.STAGES], 2)
