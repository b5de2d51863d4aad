"""Damaged, half-written and foreign checkpoints: which step is used, and what stays on
disk."""

import json
import logging
import shutil

import pytest
from tests.support.saved import (
    assert_equal,
    flip_bit,
    load_newest_params,
    make_train_state,
    on_devices,
    open_checkpoints,
    save_steps,
)

from instructax.checkpoints import checkpoint
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.steps import best_step, committed_steps


def test_stray_folders_are_no_steps(tmp_path):
    assert (
        committed_steps(tmp_path) == []
        and open_checkpoints(tmp_path).restore(make_train_state()) is None
    )
    save_steps(tmp_path, [3])
    root = tmp_path / "checkpoints"
    (root / "99").mkdir()
    (root / "98" / "junk").mkdir(parents=True)
    (root / "97").write_text("a file")
    (root / "latest").mkdir()
    for name in ("0099", "٩٩", "+5", "1_0"):  # Python's int() accepts these
        shutil.copytree(root / "3", root / name)
    shutil.copytree(root / "3", root / "7.orbax-checkpoint-tmp")
    assert committed_steps(tmp_path) == [3]
    checkpoints = open_checkpoints(tmp_path)
    state, step = checkpoints.restore(on_devices(make_train_state(), 1))
    assert step == 3 and not (root / "7.orbax-checkpoint-tmp").exists()
    checkpoints.save(99, state, {})
    checkpoints.close()
    assert committed_steps(tmp_path) == [3, 99]


def test_a_flipped_bit_sends_restore_to_the_step_before(tmp_path, caplog):
    save_steps(tmp_path, [1, 2, 3])
    path = flip_bit(tmp_path / "checkpoints/3")
    next((tmp_path / "checkpoints/2/state").rglob("_METADATA")).unlink()
    abstract = on_devices(make_train_state(), 1)
    with pytest.raises(ValueError, match=f"damaged: {path} differs from its sha256"):
        load_newest_params(tmp_path, abstract.params)
    checkpoints = open_checkpoints(tmp_path, keep=1)
    state, step = checkpoints.restore(abstract)
    assert step == 1
    assert_equal(state, make_train_state(1))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        len(warnings) == 2
        and warnings[0].startswith("checkpoint 3 IS DAMAGED")
        and str(path) in warnings[0]
    )
    # The damaged step 3 must not count as the newest.
    checkpoints.save(2, make_train_state(2), {})
    checkpoints.close()
    assert checkpoints.steps() == [2] and (tmp_path / "checkpoints/3.damaged").is_dir()


def test_all_steps_damaged_is_an_error_not_a_new_run(tmp_path):
    save_steps(tmp_path, [1, 2])
    flip_bit(tmp_path / "checkpoints/1")
    flip_bit(tmp_path / "checkpoints/2")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        open_checkpoints(tmp_path).restore(on_devices(make_train_state(), 1))
    assert committed_steps(tmp_path) == [1, 2]


def empty_data(step_folder):
    """Truncates a step's parameters; only the names of the leaves remain."""
    for path in (step_folder / "params").rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.write_bytes(b"")


def test_a_step_without_hashes_is_loaded_and_hashed(tmp_path, caplog):
    """The process was killed between commit and hashing."""
    save_steps(tmp_path, [1, 2], best_metric="text_loss", best_mode="min")
    root = tmp_path / "checkpoints"
    stored = json.loads((root / "2.sha256.json").read_text())
    abstract = on_devices(make_train_state(), 1)
    for record in (None, {**stored, "files": None, "metric": 2.5}):
        (root / "2.sha256.json").unlink()
        if record is not None:
            (root / "2.sha256.json").write_text(json.dumps(record))
        caplog.clear()
        assert open_checkpoints(tmp_path).restore(abstract)[1] == 2
        assert "2 has no hashes" in caplog.text
        found = json.loads((root / "2.sha256.json").read_text())
        assert (found["files"], found["bytes"]) == (stored["files"], stored["bytes"])
        assert found["metric"] == (None if record is None else 2.5)
    empty_data(root / "2")
    assert open_checkpoints(tmp_path).restore(abstract)[1] == 1


def plant_half_written(root):
    shutil.copytree(root / "2", root / "7")
    empty_data(root / "7")


def foreign(root):
    for item in ("params", "state"):
        (root / "7" / item).mkdir(parents=True)
        (root / "7" / item / "model.bin").write_bytes(b"of another program")


def garbled_record(root):
    shutil.copytree(root / "2", root / "7")
    (root / "7.sha256.json").write_text('{"files": {')


def record_with(content):
    def plant(root):
        shutil.copytree(root / "2", root / "7")
        (root / "7.sha256.json").write_text(content)

    return plant


def truncated(root):
    shutil.copytree(root / "2", root / "7")
    shutil.copy(root / "2.sha256.json", root / "7.sha256.json")
    path = max(
        (p for p in (root / "7").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    path.write_bytes(path.read_bytes()[:-100])


WRONG = [
    '{"files": ["a"]}',
    '{"files": {"a": "b"}, "bytes": null}',
    '{"format": 1e999}',
    "[" * 100_000,
    "7",
    '["a"]',
]
WRONG += ['{"metric": "x"}', '{"best_metric": 3}', '{"unevaluated": 4}']
PLANTED = [plant_half_written, foreign, garbled_record, truncated, *map(record_with, WRONG)]


@pytest.mark.parametrize("plant", PLANTED)
def test_what_only_looks_like_a_step_is_named_and_the_newest_good_one_used(
    tmp_path, caplog, plant
):
    save_steps(tmp_path, [1, 2])
    root = tmp_path / "checkpoints"
    plant(root)
    abstract = on_devices(make_train_state(), 1)
    with pytest.raises(ValueError, match=f"checkpoint is damaged: {root / '7'}"):
        load_newest_params(tmp_path, abstract.params)
    state, step = open_checkpoints(tmp_path).restore(abstract)
    assert step == 2
    assert_equal(state, make_train_state(2))
    assert (
        f"checkpoint 7 IS DAMAGED and set aside, going on from 2: {root / '7'}"
        in caplog.text
    )
    assert committed_steps(tmp_path) == [1, 2]


def test_only_a_foreign_step_is_an_error_not_a_new_run(tmp_path):
    save_steps(tmp_path, [2])
    foreign(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints/2")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        open_checkpoints(tmp_path).restore(on_devices(make_train_state(), 1))


def test_the_last_hashed_step_stays_whatever_else_lies_there(tmp_path):
    """Neither steps of another run nor a step that was never hashed may evict it."""
    save_steps(tmp_path, [1, 2])
    root = tmp_path / "checkpoints"
    checkpoints = open_checkpoints(tmp_path, keep=1)
    shutil.copytree(root / "2", root / "50")
    checkpoints.save(3, make_train_state(3), {})
    checkpoints.close()
    assert committed_steps(tmp_path) == [3, 50]


def test_a_save_that_fails_while_hashing_deletes_nothing(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    checkpoints = open_checkpoints(tmp_path, keep=1)

    def full(path):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_files", full)
        checkpoints.save(2, make_train_state(2), {})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, make_train_state(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [3]


def test_a_steps_record_survives_a_kill_between_commit_and_hashing(tmp_path, monkeypatch):
    """Otherwise the interrupted evaluation would be forgotten, or a best step lost."""
    checkpoints = open_checkpoints(tmp_path, best_metric="loss", best_mode="min")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_hash_and_clean_up", lambda *_: None)
        checkpoints.save(1, make_train_state(1), {"loss": 2.0})
        checkpoints.save(2, make_train_state(2), {"loss": 3.0}, evaluated=False)
        checkpoints.close()
    assert best_step(tmp_path) == 1
    resumed = open_checkpoints(tmp_path, best_metric="loss", best_mode="min")
    assert resumed.restore(on_devices(make_train_state(), 1))[1] == 2
    assert resumed.unevaluated == {"loss": 3.0}
    resumed.mark_evaluated({"loss": 1.0})
    assert best_step(tmp_path) == 2


def test_old_hashes_are_removed_before_their_step_is_overwritten(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", killed)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoints(tmp_path).save(1, make_train_state(9), {})
    assert json.loads((tmp_path / "checkpoints/1.sha256.json").read_text())["files"] is None


def test_the_record_of_a_killed_save_is_removed(tmp_path):
    save_steps(tmp_path, [1])
    root = tmp_path / "checkpoints"
    shutil.copy(root / "1.sha256.json", root / "2.sha256.json")
    open_checkpoints(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["1", "1.sha256.json"]
