"""Checkpoints: exact round trips, other meshes, retention, failed saves, and loading by the
next stage."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support.saved import (
    assert_equal,
    load_newest_params,
    make_ppo_state,
    make_train_state,
    on_devices,
    open_checkpoints,
    put,
    save_steps,
)

from instructax.checkpoints import checkpoint
from instructax.checkpoints.restore import CheckpointMismatch, load_params
from instructax.checkpoints.steps import best_step, committed_steps
from instructax.types import TrainState


@pytest.mark.parametrize(
    ("make", "exported"), [(make_train_state, "params"), (make_ppo_state, "ema")]
)
def test_round_trip_on_other_device_counts(tmp_path, make, exported):
    state = make(5.0)
    checkpoints = open_checkpoints(tmp_path, exported=exported)
    checkpoints.save(5, put(state, on_devices(state, 8)), {})
    checkpoints.close()
    for count in (8, 2, 1):
        abstract = on_devices(state, count)
        restored, step = open_checkpoints(tmp_path, exported=exported).restore(abstract)
        assert step == 5
        assert_equal(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, abstract
        )
        exported_params = getattr(state, exported)
        assert_equal(
            load_newest_params(tmp_path, getattr(abstract, exported)), exported_params
        )


def test_parameters_are_stored_once(tmp_path):
    save_steps(tmp_path, [1])
    stored = checkpoint.ocp.checkpointables_metadata(
        str(tmp_path / "checkpoints/1")
    ).metadata
    state = make_train_state()
    assert len(jax.tree.leaves(stored["params"])) == 2 and stored["state"]["params"] is None
    assert len(jax.tree.leaves(stored["state"])) == 1 + len(
        jax.tree.leaves(state.opt_state)
    )


def test_donation_right_after_an_asynchronous_save(tmp_path):
    state = make_train_state(1.0, width=512)
    expected = jax.tree.map(np.array, state)
    abstract = on_devices(state, 1)
    state = put(state, abstract)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for round_number in range(3):
        old, state = state, overwrite(state)
        # Newer versions of JAX do not donate memory that is still being read.
        assert old.params["layers"]["kernel"].is_deleted() or (
            round_number == 0 and jax.__version_info__ >= (0, 11)
        )
    jax.block_until_ready(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore(abstract)[0], expected)


def test_saves_follow_the_schedule_and_the_newest_are_kept(tmp_path):
    checkpoints = open_checkpoints(tmp_path, save_every=3, keep=2)
    for step in range(1, 14):
        checkpoints.maybe_save(step, make_train_state(step), {})
    checkpoints.close()
    assert checkpoints.steps() == [9, 12]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "12",
        "12.sha256.json",
        "9",
        "9.sha256.json",
    ]


def test_the_best_step_is_kept_too_across_a_restart(tmp_path):
    scores = {1: 0.1, 2: 0.7, 3: jnp.nan, 4: 0.7, 5: -2.0, 6: jnp.float32(0.5), 7: None}
    for part in ((1, 2, 3, 4), (5, 6, 7)):
        checkpoints = open_checkpoints(tmp_path, keep=1, best_metric="accuracy")
        for step in part:
            metrics = (
                {"loss": -step}
                if scores[step] is None
                else {"accuracy": scores[step], "loss": -step}
            )
            checkpoints.save(step, make_train_state(step), metrics)
        checkpoints.close()
    assert checkpoints.steps() == [4, 7]
    assert best_step(tmp_path) == 4


def test_the_lowest_loss_is_the_best(tmp_path):
    checkpoints = open_checkpoints(
        tmp_path, keep=1, best_metric="text_loss", best_mode="min"
    )
    for step, loss in enumerate((3.0, 2.5, 2.75, 2.5, 2.6), start=1):
        checkpoints.save(step, make_train_state(step), {"text_loss": loss})
    checkpoints.close()
    assert checkpoints.steps() == [4, 5]  # ties go to the newest
    assert best_step(tmp_path) == 4
    assert best_step(tmp_path / "nowhere") is None


def test_best_mode_decides_which_value_is_best(tmp_path):
    for mode, kept in (("min", 2), ("max", 3)):
        workdir = tmp_path / mode
        checkpoints = open_checkpoints(workdir, keep=1, best_metric="kl", best_mode=mode)
        for step, kl in enumerate((2.0, 1.0, 3.0, 1.5), start=1):
            checkpoints.save(step, make_train_state(step), {"kl": kl})
        checkpoints.close()
        assert checkpoints.steps() == [kept, 4]
        assert best_step(workdir) == kept


@pytest.mark.parametrize(("metric", "best"), [("text_loss", 2), ("accuracy", 3)])
def test_records_without_a_mode_keep_their_rule(metric, best, tmp_path):
    checkpoints = open_checkpoints(tmp_path, best_metric=metric)
    for step, value in enumerate((2.0, 1.0, 3.0), start=1):
        checkpoints.save(step, make_train_state(step), {metric: value})
    checkpoints.close()
    for path in (tmp_path / "checkpoints").glob("*.sha256.json"):
        record = json.loads(path.read_text())
        del record["best_mode"]
        path.write_text(json.dumps(record))
    assert best_step(tmp_path) == best


def test_a_missing_best_metric_is_reported_and_the_step_saved(tmp_path, caplog):
    checkpoints = open_checkpoints(tmp_path, best_metric="acuracy")
    checkpoints.save(1, make_train_state(1), {"loss": 1, "accuracy": 2})
    checkpoints.close()
    assert (
        "best_metric 'acuracy' is not among its metrics (accuracy, loss)" in caplog.text
        and committed_steps(tmp_path) == [1]
    )


def test_a_saved_step_is_not_saved_twice(tmp_path):
    save_steps(tmp_path, [4])
    checkpoints = open_checkpoints(tmp_path)
    abstract = on_devices(make_train_state(), 1)
    checkpoints.restore(abstract)
    before = (tmp_path / "checkpoints/4").stat().st_mtime_ns
    checkpoints.save(4, make_train_state(4), {})
    checkpoints.save(5, make_train_state(5), {})
    checkpoints.save(5, make_train_state(77), {})
    checkpoints.close()
    assert (tmp_path / "checkpoints/4").stat().st_mtime_ns == before
    assert int(open_checkpoints(tmp_path).restore(abstract)[0].step) == 5


def test_load_params_casts_and_picks_the_step(tmp_path):
    save_steps(tmp_path, [1, 2])
    abstract = on_devices(make_train_state(), 2).params
    half = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), abstract
    )
    for step in (1, 2):
        params = make_train_state(step).params
        assert_equal(load_params(tmp_path, abstract, step=step), params)
        assert_equal(
            load_params(tmp_path, half, step=step),
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
        )


def without(tree, name):
    return {key: leaf for key, leaf in tree.items() if key != name}


def test_errors_of_load_params_name_the_leaf(tmp_path):
    save_steps(tmp_path, [1])
    abstract = on_devices(make_train_state(), 1).params
    wider = on_devices(make_train_state(width=16), 1).params
    integers = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.int32, sharding=a.sharding), abstract
    )
    where = tmp_path / "checkpoints/1/params"
    for bad, message in (
        (wider, f"leaf bias is float32[8] in {where}, but float32[16] in this run"),
        (
            without(abstract, "layers"),
            f"leaf layers/kernel is float32[2, 8, 8] in {where}, but absent in",
        ),
        (
            {**abstract, "head": abstract["bias"]},
            f"leaf head is absent in {where}, but float32[8] in",
        ),
        (integers, f"leaf bias is float32[8] in {where}, but int32[8] in"),
    ):
        with pytest.raises(CheckpointMismatch) as error:
            load_newest_params(tmp_path, bad)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_of_load_params_name_the_place(tmp_path):
    abstract = on_devices(make_train_state(), 1).params
    with pytest.raises(ValueError, match="no checkpoint of step 2 in"):
        load_params(tmp_path, abstract, step=2)
    save_steps(tmp_path, [1, 3])
    with pytest.raises(
        ValueError, match=r"no checkpoint of step 2 in .*, only of steps \[1, 3\]"
    ):
        load_params(tmp_path, abstract, step=2)


def test_restore_refuses_another_state(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "checkpoints/2.sha256.json").unlink()  # must not fall back to step 1
    with pytest.raises(
        CheckpointMismatch, match=r"leaf bias is float32\[8\] in .*, but float32\[16\]"
    ):
        open_checkpoints(tmp_path).restore(on_devices(make_train_state(width=16), 1))
    abstract = on_devices(make_train_state(), 1)
    half = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding),
        abstract.params,
    )
    with pytest.raises(
        CheckpointMismatch, match=r"leaf bias is float32\[8\] in .*, but bfloat16\[8\]"
    ):
        open_checkpoints(tmp_path).restore(dataclasses.replace(abstract, params=half))
    assert committed_steps(tmp_path) == [1, 2]


class Failing:
    """An Orbax response whose save fails."""

    def result(self, timeout=None):
        raise OSError("No space left on device")


@pytest.mark.parametrize("call", ["maybe_save", "save", "wait", "close", "restore"])
def test_a_failed_asynchronous_save_is_raised(tmp_path, monkeypatch, call):
    checkpoints = open_checkpoints(tmp_path, save_every=5)
    state = make_train_state(1)
    abstract = on_devices(state, 1)
    calls = {
        "maybe_save": lambda: checkpoints.maybe_save(2, state, {}),
        "save": lambda: checkpoints.save(2, state, {}),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "restore": lambda: checkpoints.restore(abstract),
    }
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.ocp, "save_checkpointables_async", lambda *a, **k: Failing()
        )
        checkpoints.save(1, state, {})
    while not checkpoints._pending[1].done():
        time.sleep(0.01)
    with pytest.raises(OSError, match="No space left"):
        calls[call]()
    if call != "close":  # the next attempt starts afresh
        checkpoints.save(1, state, {})
        checkpoints.close()
        assert committed_steps(tmp_path) == [1]


def test_a_folder_that_cannot_be_made_fails_at_once(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "an unmounted disk")
    with pytest.raises(OSError):
        checkpoints.save(1, make_train_state(1), {})


WRITER = """
import itertools, sys
from pathlib import Path
import jax.numpy as jnp
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.types import TrainState
checkpoints = Checkpoints(
    Path(sys.argv[1]),
    save_every=1,
    keep=2,
    best_metric="",
    best_mode="max",
    exported="params",
)
for step in itertools.count(1):
    x = numbers(step)
    params = {"a": x, "b": x}
    state = TrainState(step=jnp.int32(step), params=params, opt_state={"m": x})
    checkpoints.save(step, state, {})
    print(step, flush=True)
"""


CONSTANT = "numbers = lambda step: jnp.full((512, 256), step, jnp.float32)"


def test_killed_while_saving(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    zeros = jnp.zeros((512, 256))
    abstract = on_devices(
        TrainState(
            step=jnp.int32(0), params={"a": zeros, "b": zeros}, opt_state={"m": zeros}
        ),
        1,
    )
    for delay in (0.0, 0.03):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        command = [sys.executable, "-c", CONSTANT + WRITER, str(tmp_path)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == 4:
                    break
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        checkpoints = open_checkpoints(tmp_path)
        state, newest = checkpoints.restore(abstract)
        assert newest >= 3
        for leaf in jax.tree.leaves(state):
            np.testing.assert_array_equal(leaf, newest)
        checkpoints.save(newest + 1, state, {})
        checkpoints.close()
        assert committed_steps(tmp_path)[-1] == newest + 1


LIMITED = """
import resource
import jax
# No file may grow beyond 64 KiB, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
# Random numbers, which do not compress.
numbers = lambda step: jax.random.normal(jax.random.key(step), (512, 256))
"""


def test_a_full_disk_ends_the_run(tmp_path):
    """In a real process, below Orbax: the save fails in Orbax's threads. It must neither
    hang nor look like a successful save."""
    command = [sys.executable, "-c", LIMITED + WRITER, str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith(
        "OSError: the checkpoint of step 1 cannot be written ("
    )
    assert "File too large" in last and last.endswith(
        "the steps before it are whole: make room and start again"
    )
    assert done.stdout == "1\n"  # the second save raises the error of the first
    assert committed_steps(tmp_path) == []
