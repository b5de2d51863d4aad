"""Inspecting checkpoints: what `ls` prints, damage that `verify` finds, and arrays for
other programs."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.saved import (
    flip_bit,
    make_ppo_state,
    make_train_state,
    open_checkpoints,
    save_steps,
)

from instructax.checkpoints import inspection
from instructax.checkpoints.checksums import record_path
from instructax.config import ConfigError
from instructax.runtime.goodput import GoodputLog


def largest(step):
    return max(
        (path for path in step.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def truncate(step):
    path = largest(step)
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} has {path.stat().st_size} bytes instead of {path.stat().st_size + 1}"


def remove(step):
    path = largest(step)
    path.unlink()
    return f"{path} is missing"


def add(step):
    (step / "params" / "notes.txt").write_text("mine")
    return f"{step}/params/notes.txt is not among the files that were saved"


def flip(step):
    return f"{flip_bit(step)} differs from its sha256"


def garble(step):
    record_path(step).write_text("{")
    return f"{record_path(step)} cannot be read"


def forget(step):
    record_path(step).unlink()
    return f"{step} has no hashes"


@pytest.mark.parametrize("plant", [truncate, remove, add, flip, garble, forget])
def test_each_kind_of_damage_is_named(tmp_path, plant):
    save_steps(tmp_path, [1, 2])
    good, bad = inspection.verify_checkpoints(tmp_path, None)
    assert len(good) == 2 and "files are as they were saved" in good[0] and bad == []
    wanted = plant(tmp_path / "checkpoints/1")
    good, bad = inspection.verify_checkpoints(tmp_path, None)
    assert len(good) == 1 and "checkpoints/2: " in good[0]
    assert len(bad) == 1 and bad[0].startswith(wanted)
    assert inspection.verify_checkpoints(tmp_path, 2)[1] == []


def test_all_damage_of_a_step_is_named(tmp_path):
    save_steps(tmp_path, [1])
    step = tmp_path / "checkpoints/1"
    files = [path for path in step.rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(b"")
    empty = sum(
        size == 0 for size in json.loads(record_path(step).read_text())["bytes"].values()
    )
    assert len(inspection.verify_checkpoints(tmp_path, None)[1]) == len(files) - empty


def test_a_step_of_a_newer_version_is_refused(tmp_path):
    save_steps(tmp_path, [1, 2])
    path = record_path(tmp_path / "checkpoints/2")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    message = r"checkpoints/2 has format 2, and this version reads 1: update instructax"
    with pytest.raises(ValueError, match=message):
        inspection.verify_checkpoints(tmp_path, None)
    with pytest.raises(ValueError, match=message):
        open_checkpoints(tmp_path).restore(make_train_state())
    assert "has format 2" in "\n".join(inspection.list_checkpoints(tmp_path))


def test_the_listing(tmp_path):
    checkpoints = open_checkpoints(tmp_path, best_metric="text_loss", best_mode="min")
    for step, loss in enumerate((2.0, 1.5, 1.75), start=8):
        checkpoints.save(
            step, make_train_state(step), {"text_loss": loss}, evaluated=step < 10
        )
    checkpoints.close()
    root = tmp_path / "checkpoints"
    record_path(root / "8").unlink()
    (root / "99").mkdir()
    (root / "7.damaged").mkdir()
    GoodputLog(tmp_path / "goodput.jsonl", writes=True).close()
    header, damaged, eight, nine, ten, stray, goodput = inspection.list_checkpoints(
        tmp_path
    )
    assert header.split() == ["step", "MiB", "files", "saved", "(UTC)", "state"]
    assert damaged.split()[0] == "7.damaged" and stray.split()[0] == "99"
    assert damaged.endswith("no step: nothing reads it") and stray.endswith(
        "no step: nothing reads it"
    )
    assert eight.endswith("not hashed")
    assert nine.endswith("hashed, whole, text_loss 1.5, best")
    assert ten.endswith("hashed, evaluation given up, newest")
    assert goodput.startswith("goodput 0% in 1 process: ")
    files = [path for path in (root / "9").rglob("*") if path.is_file()]
    assert int(nine.split()[2]) == len(files)
    assert float(nine.split()[1]) == pytest.approx(
        sum(path.stat().st_size for path in files) / 2**20, abs=0.005
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(("leaves", "wanted"), [("exported", "ema"), ("trained", "policy")])
def test_parameters_for_other_programs(tmp_path, suffix, leaves, wanted):
    state = make_ppo_state(3.0)
    checkpoints = open_checkpoints(tmp_path, exported="ema")
    checkpoints.save(3, state, {})
    checkpoints.close()
    to = tmp_path / f"arrays{suffix}"
    assert (
        inspection.write_arrays(tmp_path, None, to, leaves)
        == f"{to}: 2 arrays, 136 numbers of step 3"
    )
    arrays = dict(np.load(to, allow_pickle=False)) if suffix == ".npz" else load_file(to)
    params = state.ema if wanted == "ema" else state.policy.params
    assert sorted(arrays) == ["bias", "layers/kernel"]
    for name, array in (
        ("bias", params["bias"]),
        ("layers/kernel", params["layers"]["kernel"]),
    ):
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(arrays[name], array)
    assert not list(tmp_path.glob("*.tmp*"))


def test_the_whole_state(tmp_path):
    save_steps(tmp_path, [1, 2])
    to = tmp_path / "all.npz"
    inspection.write_arrays(tmp_path, 1, to, "all")
    arrays = np.load(to)
    state = make_train_state(1)
    assert len(arrays.files) == len(jax.tree.leaves(state))
    assert arrays["state/step"] == 1 and arrays["params/bias"].tolist() == [1.0] * 8
    # SFT has no averaged parameters.
    inspection.write_arrays(tmp_path, 2, tmp_path / "trained.npz", "trained")
    assert np.load(tmp_path / "trained.npz")["bias"].tolist() == [2.0] * 8


def test_failed_exports_are_one_line_errors(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "there.npz").touch()
    for workdir, step, to, message in (
        (tmp_path, None, tmp_path / "a.bin", r"must end in .npz or .safetensors"),
        (tmp_path, None, tmp_path / "there.npz", "is there already"),
        (tmp_path, None, tmp_path / "none" / "a.npz", "there is no folder"),
        (tmp_path, 7, tmp_path / "a.npz", "has no step 7, only 1"),
        (tmp_path / "empty", None, tmp_path / "a.npz", "has no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            inspection.write_arrays(workdir, step, to, "exported")
    flip_bit(tmp_path / "checkpoints/1")
    with pytest.raises(
        ValueError, match=r"checkpoint is damaged: .* differs from its sha256"
    ):
        inspection.write_arrays(tmp_path, None, tmp_path / "a.npz", "exported")
    assert not (tmp_path / "a.npz").exists()


def test_the_command(tmp_path):
    save_steps(tmp_path, [1])

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "scripts/checkpoint.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    assert command("verify", tmp_path)[0] == 0
    wanted = flip(tmp_path / "checkpoints/1")
    code, output, _ = command("verify", tmp_path)
    assert code == 2 and output == f"{wanted}\n"
    code, _, error = command("to-numpy", tmp_path)
    assert (
        code == 2 and error.startswith("error: give ls WORKDIR") and error.count("\n") == 1
    )


def test_states_keep_their_saved_dtypes(tmp_path):
    state = make_train_state(1.0)
    halves = dataclasses.replace(
        state, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    )
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, halves, {})
    checkpoints.close()
    to = tmp_path / "half.safetensors"
    inspection.write_arrays(tmp_path, None, to, "exported")
    assert load_file(to)["bias"].dtype == jnp.bfloat16
