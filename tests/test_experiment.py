"""Runs and their order, their configs, and the report of the bundled experiment."""

import dataclasses
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import jax
import pytest
from tests.support import stages

from instructax import experiment
from instructax.config import ConfigError
from instructax.experiment import RunSpec, load_config, load_file, run_experiment, run_stage
from instructax.runtime import metric_log
from instructax.simulation.write import create_prompts
from instructax.stages import load_stage
from instructax.training.optimizer import make_optimizer

pytest_plugins = ("tests.support.pipeline_fixture",)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Changes to the repository root, because config paths are relative to the working
    directory."""
    monkeypatch.chdir(ROOT)


def test_overrides_change_only_their_own_values():
    plain = load_config(RunSpec("a", "configs/ppo.py:tiny", {}))
    changed = load_config(
        RunSpec("a", "configs/ppo.py:tiny", {"kl_coef": 0.5, "optimizer.warmup_steps": 3})
    )
    assert changed["kl_coef"] == 0.5
    assert changed["optimizer"]["warmup_steps"] == 3
    assert changed["value_optimizer"] == plain["value_optimizer"]
    changed["kl_coef"], changed["optimizer"]["warmup_steps"] = (
        plain["kl_coef"],
        plain["optimizer"]["warmup_steps"],
    )
    assert changed == plain


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("configs/ppo.py:tiny", {"kl_koef": 0.5}, "kl_koef"),
        ("configs/ppo.py:tiny", {"optimizer.rate": 0.5}, "rate"),
        ("configs/ppo.py:tiny", {"steps": "many"}, "steps"),
        ("configs/ppo.py:huge", {}, "size 'huge' must be one of 125m, 350m"),
        ("configs/nothing.py:tiny", {}, "no such file: configs/nothing.py"),
    ],
)
def test_a_config_that_cannot_be_loaded_is_one_line(config, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(RunSpec("a", config, overrides))
    assert "\n" not in str(error.value)


def test_files_can_import_files_next_to_them(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "experiment.py").write_text("from beside import VALUE\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment.sys, "path", list(experiment.sys.path))
    assert load_file("experiment.py").VALUE == 7


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(ConfigError, match=r"notes.txt is not a Python file"):
        load_file(tmp_path / "notes.txt")


def test_configs_and_experiments_are_distinguished(tmp_path):
    with pytest.raises(
        ConfigError, match=r"configs/ppo.py is not an experiment: it needs get_runs"
    ):
        run_experiment("configs/ppo.py:tiny", tmp_path, report_only=False)
    with pytest.raises(
        ConfigError, match=r"experiments/alignment.py is not a config: it needs get_config"
    ):
        load_config(RunSpec("a", "experiments/alignment.py:tiny", {}))


def test_invalid_configs_are_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=(
            r"config.stage = 'distill' must be one of world, collect, pretrain, "
            r"sft, reward_model"
        ),
    ):
        run_stage({"stage": "distill"}, tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"config.temperature = 'hot' must be of type float"
    ):
        run_stage(
            {**load_config(RunSpec("a", "configs/ppo.py:tiny", {})), "temperature": "hot"},
            tmp_path / "run",
        )
    assert not (
        tmp_path / "run"
    ).exists()  # no workdir is created for a config that cannot be built


def test_a_dry_run_reads_nothing():
    assert "nothing is trained" in experiment.dry_run(
        load_config(RunSpec("a", "configs/world.py:tiny", {}))
    )
    eight = {"mesh.data": 8, "batch_size": 16}
    report = experiment.dry_run(
        load_config(RunSpec("a", "configs/ppo.py:tiny", {**eight, "ptx_rows": 8}))
    )
    assert "GiB" in report or "MiB" in report or "KiB" in report
    with pytest.raises(
        ConfigError, match="ptx_rows = 2 rows must be a positive multiple of 8"
    ):
        experiment.dry_run(load_config(RunSpec("a", "configs/ppo.py:tiny", eight)))


TOY = '''
"""Two worlds with different seeds."""

from instructax.experiment import RunSpec
from instructax.runtime.metric_log import read_summary


def get_runs(size, root):
    runs = []
    for name, seed in (("first", 1), ("second", 2)):
        runs.append(RunSpec(name, f"configs/world.py:{size}", {"seed": seed}))
    return runs


def report(root):
    first = read_summary(root / "first")["stage"]
    second = read_summary(root / "second")["stage"]
    print("report:", first, second)
'''


def test_an_experiment_runs_in_order_and_resumes_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    spec = tmp_path / "toy.py"
    spec.write_text(TOY)
    root = tmp_path / "runs"
    made = []
    stage_run = experiment.run_stage

    def stopped(config, workdir):
        if workdir.name == "second" and not made.count("second"):
            made.append("second")
            raise RuntimeError("the power is out")
        made.append(workdir.name)
        return stage_run(config, workdir)

    monkeypatch.setattr(experiment, "run_stage", stopped)
    with pytest.raises(RuntimeError, match="power"):
        run_experiment(f"{spec}:tiny", root, report_only=False)
    assert "report:" not in capsys.readouterr().out
    first = {path: path.stat().st_mtime_ns for path in (root / "first").iterdir()}
    run_experiment(f"{spec}:tiny", root, report_only=False)
    assert made == ["first", "second", "first", "second"]
    assert {
        path: path.stat().st_mtime_ns
        for path in (root / "first").iterdir()
        if path.name != "config.json"
    } == {path: time for path, time in first.items() if path.name != "config.json"}
    out = capsys.readouterr().out
    assert "[1/2] first: configs/world.py:tiny" in out
    assert "first is finished; nothing to do" in out
    assert "report: world world" in out
    texts = [(root / name / "text.jsonl.gz").read_bytes() for name in ("first", "second")]
    assert texts[0] != texts[1]
    assert json.loads((root / "second" / "config.json").read_text())["seed"] == 2


def test_report_only_runs_no_stage(tmp_path, monkeypatch):
    spec = tmp_path / "toy.py"
    spec.write_text(TOY)
    monkeypatch.setattr(experiment, "run_stage", None)
    with pytest.raises(
        ConfigError, match="first is not a finished run: run the whole experiment"
    ):
        run_experiment(f"{spec}:tiny", tmp_path / "runs", report_only=True)


def test_the_report_of_the_alignment_experiment(chain, capsys):
    run_experiment(f"{stages.CHAIN}:tiny", chain, report_only=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["size", "policy", "true", "utility"]
    for row, name in zip(
        lines[2:],
        ("GPT ", "GPT prompted", "SFT", "best-of-n", "PPO ", "PPO-ptx"),
        strict=False,
    ):
        size, policy, *figures, kl = re.split("  +", row.strip())
        assert size and policy == name.strip() and kl and len(figures) == 5
        # Entries have intervals, except the tie rate.
        assert all(
            re.fullmatch(r"-?\d\.\d{3}( \[-?\d\.\d{3}, -?\d\.\d{3}\])?", figure)
            for figure in figures
        )
        assert "[" in figures[0] and "[" in figures[4]
    assert lines[4].count("  0.500  ") == 3  # SFT against itself
    assert lines[-1] == f"report: {chain}/report/index.html"
    assert (chain / "report" / "figure-1.png").read_bytes().startswith(b"\x89PNG")
    assert len((chain / "report" / "index.html").read_text()) > 100_000


def test_a_finished_stage_is_skipped(chain, capsys):
    assert not run_stage(stages.config_of(chain, "pretrain", {}), chain / "pretrain")
    assert "pretrain is finished; nothing to do" in capsys.readouterr().out
    assert [line["step"] for line in metric_log.read_metrics(chain / "pretrain")] == list(
        range(1, 9)
    )


def groups_of(cls: type) -> set[type]:
    """The config dataclass and all nested ones."""
    inner = {
        hint
        for hint in typing.get_type_hints(cls).values()
        if dataclasses.is_dataclass(hint)
    }
    return {cls}.union(*map(groups_of, inner))


def record_reads(monkeypatch: pytest.MonkeyPatch, group: Any) -> set[str]:
    """The fields of `group` that the library reads from now on, except in config
    validation."""
    names = {field.name for field in dataclasses.fields(group)}
    read = set()
    plain = group.__getattribute__
    sources = str(Path(experiment.__file__).parent)

    def get(self: Any, name: str) -> Any:
        code = sys._getframe(1).f_code
        if (
            name in names
            and code.co_filename.startswith(sources)
            and code.co_name != "validate"
            and not code.co_name.startswith("check_")
        ):
            read.add(name)
        return plain(self, name)

    monkeypatch.setattr(group, "__getattribute__", get)
    return read


ONE_STEP = {"epochs": 0.0, "steps": 1}
# Otherwise two fields would have no effect.
LEARNED = {"model.positions": "learned", "optimizer.schedule": "cosine"}
SHORT = {
    "world": {},
    "pretrain": ONE_STEP | LEARNED,
    "reward": ONE_STEP | {"lora.rank": 2},
    "ppo-ptx": {"steps": 1},
    "evaluate": {},
}


@pytest.mark.parametrize(
    "stage", [None, {}, ["sft"], "alchemy", "9" * 5000], ids=lambda stage: repr(stage)[:9]
)
def test_an_unknown_stage_is_one_short_line(stage):
    with pytest.raises(
        ConfigError,
        match=r"^config\.stage = .{2,210} must be one of world, collect, pretrain",
    ):
        load_stage(stage)


@pytest.mark.usefixtures("one_device")
def test_runs_read_every_field_of_their_own_config(chain, tmp_path, monkeypatch):
    """Reads are matched by class, not just by name, because settings and programs share
    names."""
    # Existing rows are not prepared again.
    own_rows = {"pretrain": {"data.folder": str(tmp_path / "rows")}}
    short = {name: overrides | own_rows.get(name, {}) for name, overrides in SHORT.items()}
    configs = {
        name: stages.config_of(chain, name, overrides) for name, overrides in short.items()
    }
    groups = set[Any]().union(
        *(groups_of(load_stage(config["stage"]).Config) for config in configs.values())
    )
    # Otherwise another test may have sampled this world, or compiled these programs.
    create_prompts.cache_clear()
    make_optimizer.cache_clear()
    jax.clear_caches()
    read = {group: record_reads(monkeypatch, group) for group in groups}
    for name, config in configs.items():
        assert run_stage(config, tmp_path / name)
    fields = {
        group: {field.name for field in dataclasses.fields(group)} - {"stage"}
        for group in groups
    }
    assert {
        group.__name__: unread
        for group in groups
        if (unread := fields[group] - read[group])
    } == {}
