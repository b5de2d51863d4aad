"""A stopped run resumes with bitwise equal results; a run that cannot resume says why."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.support import stages
from tests.support.run_logs import last_beat, read_samples

from instructax import cli
from instructax.checkpoints import checkpoint
from instructax.checkpoints.manifest import manifest_hash
from instructax.checkpoints.steps import best_step, committed_steps, files_hash
from instructax.config import ConfigError
from instructax.evals import validation
from instructax.experiment import run_stage
from instructax.runtime import goodput
from instructax.runtime.metric_log import read_metrics, read_summary
from instructax.runtime.preemption import check_stop_requested
from instructax.training import loop as training

pytest_plugins = ("tests.support.pipeline_fixture",)
pytestmark = pytest.mark.usefixtures("one_device")

# These runs save only at the end and when stopped.
SCHEDULE = {"run.log_every": 1, "run.evaluate_every": 2, "run.save_every": 4}
RUNS = {
    "sft": {"steps": 4, "epochs": 0.0, "dropout": 0.2},
    "reward": {"steps": 4, "epochs": 0.0},
    "ppo-ptx": {"steps": 4},
}


def config_of(chain, name, **overrides):
    return stages.config_of(chain, name, {**RUNS[name], **SCHEDULE, **overrides})


def lines_of(workdir):
    """The logged metrics of a run, without times."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_metrics(workdir)
    ]


def summary_without_times(workdir):
    return {
        name: value
        for name, value in read_summary(workdir).items()
        if not name.startswith("time/")
    }


def run(config, workdir, **watched):
    """(the first state of the training loop, the last one)."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = stages.Watch(monkeypatch, **watched)
        assert run_stage(config, workdir)
    return watch.first, watch.last


def run_interrupted(config, workdir):
    """Runs with a Ctrl-C while the second batch is read; returns the last saved step.

    An iteration of PPO is abandoned between its programs.
    """
    saved = 1 if config["stage"] == "ppo" else 2
    with pytest.raises(
        training.Interrupted, match=f"step {saved} is saved, the same command goes on"
    ):
        run(config, workdir, interrupt_at=1)
    assert committed_steps(workdir) == [saved]
    assert not (workdir / "summary.json").exists()
    return saved


@pytest.fixture(scope="module")
def supervised_run(chain, tmp_path_factory):
    """(config, workdir, last state) of an uninterrupted supervised run of four steps."""
    config = config_of(chain, "sft")
    workdir = tmp_path_factory.mktemp("runs") / "sft"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stages.use_devices(monkeypatch, 1)
        _, last = run(config, workdir)
    return config, workdir, last


@pytest.mark.parametrize("name", RUNS)
def test_two_and_two_steps_are_four(chain, tmp_path, name):
    config = config_of(chain, name)
    _, straight = run(config, tmp_path / "straight")
    saved = run_interrupted(config, tmp_path / "stopped")
    first, last = run(config, tmp_path / "stopped")
    assert first.step == saved
    stages.assert_trees_equal(last, straight)  # parameters, optimizer state, average
    lines = lines_of(tmp_path / "stopped")
    assert lines == lines_of(tmp_path / "straight")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # All steps differ.
    assert len({json.dumps(line | {"step": 0}) for line in lines}) == 4
    if name == "ppo-ptx":
        assert read_samples(tmp_path / "stopped") == read_samples(tmp_path / "straight")


@pytest.mark.parametrize(
    ("name", "stops"), [("sft", 1), ("reward", 2), ("ppo-ptx", 1), ("ppo-ptx", 2)]
)
def test_an_evaluation_that_was_given_up_is_made_up_for(chain, tmp_path, name, stops):
    """The logged metrics and the best step are right too. Evaluations are after step 2 and
    at the end."""
    best = {
        "sft": "demonstrations_loss",
        "reward": "validation_loss",
        "ppo-ptx": "text_loss",
    }[name]
    config = config_of(chain, name, **{"run.best_metric": best, "run.save_every": 2})
    _, straight = run(config, tmp_path / "straight")
    read = []

    def stop():
        if read[-1] == 2 * stops - 1:
            os.kill(os.getpid(), signal.SIGINT)
        check_stop_requested()

    with pytest.MonkeyPatch.context() as stopping:
        stages.Watch(stopping).read.append(read.append)
        stopping.setattr(validation, "check_stop_requested", stop)
        with pytest.raises(training.Interrupted, match=f"step {2 * stops} is saved"):
            run_stage(config, tmp_path / "stopped")
    assert [line["step"] for line in lines_of(tmp_path / "stopped")] == list(
        range(1, 2 * stops)
    )
    first, last = run(config, tmp_path / "stopped")
    assert first.step == 2 * stops
    stages.assert_trees_equal(last, straight)
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "straight")
    assert read_samples(tmp_path / "stopped") == read_samples(tmp_path / "straight")
    assert best_step(tmp_path / "stopped") == best_step(tmp_path / "straight")
    assert summary_without_times(tmp_path / "stopped") == summary_without_times(
        tmp_path / "straight"
    )


def test_killed_between_the_last_save_and_the_summary(supervised_run, tmp_path):
    config, finished, straight = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "summary.json").unlink()
    _, last = run(config, workdir)
    stages.assert_trees_equal(last, straight)
    assert (workdir / "metrics.jsonl").read_text() == (
        finished / "metrics.jsonl"
    ).read_text()
    assert read_summary(workdir) == read_summary(finished)


def test_killed_before_anything_was_saved(supervised_run, tmp_path):
    config, finished, straight = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "summary.json").unlink()
    first, last = run(config, workdir)
    assert first.step == 0
    stages.assert_trees_equal(last, straight)
    assert lines_of(workdir) == lines_of(finished)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_save_ends_the_run_and_keeps_earlier_steps(
    supervised_run, tmp_path, monkeypatch, failing
):
    """The second of two saves is the last one, so its failure shows only at the end of the
    run."""
    config, finished, straight = supervised_run
    config = {**config, "run": {**config["run"], "save_every": 2}}
    calls = []
    hash_files = checkpoint.hash_files

    def full(path):
        calls.append(path)
        if len(calls) == failing:
            raise OSError("No space left on device")
        return hash_files(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "hash_files", full)
        assert cli.guarded(lambda: run_stage(config, tmp_path / "run")) == cli.USER_ERROR
    assert not (tmp_path / "run" / "summary.json").exists()
    _, last = run(config, tmp_path / "run")
    stages.assert_trees_equal(last, straight)
    assert lines_of(tmp_path / "run") == lines_of(finished)


def test_the_goodput_log_of_a_killed_run(supervised_run, tmp_path):
    """The goodput log as if the run had been killed after step 4, with its last save at
    step 2."""
    config, finished, _ = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "summary.json").unlink()
    before = goodput.read_totals(workdir / "goodput.jsonl")
    assert before["processes"] == 1 and before["lost"] == 0 and 0 < before["goodput"] < 1
    assert (
        min(
            before[kind]
            for kind in ("init", "restore", "compile", "steps", "evaluation", "save")
        )
        > 0
    )
    run(config, workdir)
    after = goodput.read_totals(workdir / "goodput.jsonl")
    assert after["lost"] == pytest.approx(before["steps"] + before["evaluation"], abs=1e-5)
    assert last_beat(workdir / "heartbeat-0.json")["phase"] == "finish"


def test_a_finished_run_is_not_run_again(supervised_run, tmp_path):
    config, finished, _ = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    kept_otherwise = {**config, "run": {**config["run"], "log_every": 2}}
    assert not run_stage(kept_otherwise, workdir)
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert before == after


def test_another_config_is_refused_with_the_differences(supervised_run):
    config, workdir, _ = supervised_run
    other = {
        **config,
        "seed": 9,
        "optimizer": {**config["optimizer"], "learning_rate": 0.5},
    }
    before = (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match="holds a run with another config") as error:
        run_stage(other, workdir)
    assert (
        "optimizer.learning_rate: 0.001 (stored) != 0.5 (given); seed: 0 (stored) != "
        "9 (given)" in str(error.value)
    )
    assert "\n" not in str(error.value)
    assert (workdir / "config.json").read_text() == before


def test_other_inputs_are_refused_with_the_differences(supervised_run, tmp_path):
    config, finished, _ = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "summary.json").unlink()
    manifest = json.loads((workdir / "manifest.json").read_text())
    parent = manifest["parents"]["parent"]
    manifest["data"]["text"] = parent["manifest_hash"] = parent["files_hash"] = "0" * 64
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="was started from other inputs") as error:
        run_stage(config, workdir)
    for name in ("data.text", "parents.parent.manifest_hash", "parents.parent.files_hash"):
        assert f"{name}: '{'0' * 64}' (stored) != " in str(error.value)
    assert "data.demonstrations" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_lost_config_is_restored_from_the_manifest(supervised_run, tmp_path):
    config, finished, _ = supervised_run
    workdir = shutil.copytree(finished, tmp_path / "run")
    for name in ("summary.json", "config.json"):
        (workdir / name).unlink()
    with pytest.raises(
        ConfigError,
        match=r"started from other inputs \(config.seed: 0 \(stored\) != 7 \(given\)\)",
    ):
        run_stage({**config, "seed": 7}, workdir)


def test_steps_between_saves_are_complete_log_lines(chain, tmp_path):
    config = config_of(chain, "sft", **{"run.log_every": 2, "run.save_every": 3})
    with pytest.raises(
        ConfigError, match="save_every = 3 must be a multiple of log_every = 2"
    ):
        run_stage(config, tmp_path / "run")


# With a large epsilon, Adam does not turn gradients that are only rounding errors into full
# steps.
SMOOTH = {
    "sft": {},
    "reward": {},
    "ppo-ptx": {"ptx_rows": 4, "value_optimizer.epsilon": 1e-3},
}


@pytest.mark.parametrize(
    "name",
    [
        "sft",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "ppo-ptx")),
    ],
)
def test_a_run_goes_on_with_other_numbers_of_devices(chain, tmp_path, monkeypatch, name):
    config = config_of(
        chain, name, batch_size=16, **{"optimizer.epsilon": 1e-3, **SMOOTH[name]}
    )
    _, straight = run(config, tmp_path / "straight")
    parts = [
        (8, {"data": -1, "fsdp": 2, "tensor": 2}, 1),
        (2, {"data": 1, "fsdp": 2, "tensor": 1}, 2),
    ]
    for devices, mesh, read_last in parts:
        stages.use_devices(monkeypatch, devices)
        with pytest.raises(training.Interrupted):
            run({**config, "mesh": mesh}, tmp_path / "moved", interrupt_at=read_last)
    # An iteration of PPO is abandoned between its programs.
    saved = 2 if name == "ppo-ptx" else 3
    assert committed_steps(tmp_path / "moved")[-1] == saved
    stages.use_devices(monkeypatch, 1)
    first, last = run(config, tmp_path / "moved")
    assert first.step == saved
    stages.assert_trees_close(last, straight, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(
        lines_of(tmp_path / "moved"), lines_of(tmp_path / "straight"), strict=True
    ):
        # Gaps are rounding errors themselves, and the number of empty rows depends on the
        # microbatches, whose size depends on the mesh.
        gaps = {figure: 0.0 for figure in theirs if figure.endswith(("_gap", "padding"))}
        assert ours | gaps == pytest.approx(theirs | gaps, rel=1e-3, abs=1e-5)


def test_a_parent_of_the_wrong_kind_is_refused_in_one_line(chain, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(chain / "pretrain", unfinished)
    (unfinished / "summary.json").unlink()
    other_tokenizer = tmp_path / "other"
    shutil.copytree(chain / "pretrain", other_tokenizer)
    manifest = json.loads((chain / "pretrain" / "manifest.json").read_text())
    manifest["tokenizer"] = {"hash": "0" * 64, "path": "elsewhere.json"}
    (other_tokenizer / "manifest.json").write_text(json.dumps(manifest))
    cases = {
        "is not a finished run": {"parent": str(unfinished)},
        "token ids would mean other text": {"parent": str(other_tokenizer)},
        "num_layers: 2 (stored) != 3 (given)": {"model.num_layers": 3},
    }
    for message, overrides in cases.items():
        with pytest.raises(ValueError) as error:
            run_stage(config_of(chain, "sft", **overrides), tmp_path / "run")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_manifests_lead_back_to_the_first_run(chain):
    manifest = json.loads((chain / "ppo-ptx" / "manifest.json").read_text())
    assert manifest["stage"] == "ppo"
    assert {name: parent["stage"] for name, parent in manifest["parents"].items()} == {
        "policy_parent": "sft",
        "reward_parent": "reward_model",
    }
    for parent in manifest["parents"].values():
        theirs = json.loads(stages.Path(parent["workdir"], "manifest.json").read_text())
        assert parent["manifest_hash"] == manifest_hash(theirs)
        own = committed_steps(Path(parent["workdir"]))
        hashes = {step: files_hash(Path(parent["workdir"]), step) for step in own}
        assert parent["files_hash"] == hashes[parent["step"]] and len(
            set(hashes.values())
        ) == len(own)
        assert parent["step"] == committed_steps(stages.Path(parent["workdir"]))[-1]
    assert set(manifest["data"]) == {"prompts", "text"}
    assert manifest["config"] == json.loads((chain / "ppo-ptx" / "config.json").read_text())
