"""Invalid config values: each is refused before any computation, in one line with its name
and the allowed values."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import stages

from instructax.config import ConfigError
from instructax.experiment import RunSpec, dry_run, load_config, run_stage

pytest_plugins = ("tests.support.pipeline_fixture",)
ROOT = Path(__file__).resolve().parents[2]


def error_of(name: str, overrides: dict[str, Any]) -> str:
    """The error line for a tiny config with `overrides`."""
    with pytest.raises(ConfigError) as error:
        dry_run(
            load_config(RunSpec(name, str(ROOT / "configs" / f"{name}.py:tiny"), overrides))
        )
    line = str(error.value)
    assert "\n" not in line and len(line) < 600
    return line


HUGE = 10**400
PPO = [
    # Not a number, or not representable in 32 bits.
    ({"kl_coef": math.nan}, "config.kl_coef = nan must be a finite number"),
    ({"clip": math.inf}, "config.clip = inf must be a finite number"),
    (
        {"kl_coef": 1e300},
        "config.kl_coef = 1e+300 must be 0 or have a magnitude from 1.2e-38 to 3.4e38",
    ),
    (
        {"optimizer.epsilon": 1e-50},
        "config.optimizer.epsilon = 1e-50 must be 0 or have a magnitude from 1.2e-38",
    ),
    ({"steps": 10**30}, f"config.steps = {10**30} must be from -2147483647 to 2147483647"),
    (
        {"batch_size": 2**31},
        "config.batch_size = 2147483648 must be from -2147483647 to 2147483647",
    ),
    ({"steps": HUGE}, "config.steps = 2**1329 or so must be from"),
    ({"kl_coef": HUGE}, "int too large to convert to float"),
    # Out of range.
    ({"kl_coef": -1.0}, "config: kl_coef = -1.0 must be at least 0"),
    ({"steps": -1}, "config: steps = -1 must be at least 1"),
    ({"batch_size": 0}, "config: batch_size = 0 must be at least 1"),
    ({"temperature": 0.0}, "config: temperature = 0.0 must be above 0"),
    ({"clip": 0.0}, "config: clip = 0.0 must be above 0"),
    ({"discount": 1.5}, "config: discount = 1.5 must be from 0 to 1"),
    ({"ema_decay": -0.1}, "config: ema_decay = -0.1 must be from 0 to 1"),
    (
        {"optimizer.learning_rate": -1.0},
        "config.optimizer: learning_rate = -1.0 must be at least 0",
    ),
    (
        {"optimizer.beta1": 1.0},
        "config.optimizer: beta1 = 1.0 must be at least 0 and below 1",
    ),
    (
        {"optimizer.warmup_steps": -1},
        "config.optimizer: warmup_steps = -1 must be at least 0",
    ),
    ({"model.num_layers": 0}, "config.model: num_layers = 0 must be at least 1"),
    (
        {"model.num_layers": 10**9},
        "config.model: num_layers = 1000000000 must be at least 1 and below 10000",
    ),
    ({"model.embed_dim": -4}, "config.model: embed_dim = -4 must be at least 1"),
    ({"compute.slots": 0}, "config.compute: slots = 0 must be at least 1"),
    (
        {"compute.compaction_steps": -1},
        "config.compute: compaction_steps = -1 must be at least 0",
    ),
    (
        {"run.watchdog_seconds": -1.0},
        "config.run: watchdog_seconds = -1.0 must be at least 0",
    ),
    ({"seed": -1}, "config.seed = -1 must be from 0 to 2147483647"),
    ({"seed": 2**31}, "config.seed = 2147483648 must be from 0 to 2147483647"),
    # Inconsistent with each other.
    (
        {"model.num_kv_heads": 3},
        "model.num_heads = 2 must be a multiple of model.num_kv_heads = 3",
    ),
    (
        {"minibatches": 3},
        "config.batch_size = 8 rows must be a positive multiple of 3 = 3 parts × 1 devices",
    ),
    (
        {"mesh.fsdp": 3},
        "config.batch_size = 8 rows must be a positive multiple of 6 = 2 parts × 3 devices",
    ),
    ({"mesh.data": 0}, "config.mesh = 0 × 1 × 1: axes must be positive (data may be -1)"),
    ({"ptx_rows": 0}, "config.ptx_rows = 0 rows must be a positive multiple"),
    ({"data.text": ()}, "ptx_coef = 1.0 needs files in data.text"),
    ({"policy_parent": ""}, "policy_parent and reward_parent must name finished runs"),
    (
        {"model.max_length": 63},
        "config.data.limits.sequence_tokens = 64 is above config.model.max_length = 63",
    ),
    (
        {"data.limits.prompt_tokens": 10**6},
        "config.data.limits.prompt_tokens + response_tokens = 1000024 is above "
        "config.model.max_length = 96",
    ),
    (
        {"data.limits.splits": (("all", 1.0),)},
        "config.data.limits.splits has the names ['all']: train and validation",
    ),
    (
        {"data.limits.splits": (("train", 0.5), ("validation", 0.6))},
        "the fractions must be above 0 and sum to 1",
    ),
    (
        {"run.save_every": 3, "run.log_every": 2},
        "save_every = 3 must be a multiple of log_every = 2",
    ),
    # Wrong type or unknown name.
    ({"whiten_rewards": "yes"}, "cannot be casted to type <class 'bool'>"),
    (
        {"old_logprobs": "nobody"},
        "config.old_logprobs = 'nobody' must be one of 'recomputed', 'sampled'",
    ),
    (
        {"kl_ceof": 0.1},
        'Key "kl_ceof" does not exist and cannot be added since the config is locked.',
    ),
    ({"kl_ceof": 0.1}, 'Did you mean "kl_coef" instead of "kl_ceof"?'),
    (
        {"stage": "alchemy"},
        "config.stage = 'alchemy' must be one of world, collect, pretrain, sft, "
        "reward_model, ppo",
    ),
]
SFT = [
    ({"data.text_fraction": 2.0}, "config.data: text_fraction = 2.0 must be from 0 to 1"),
    ({"data.text_fraction": -1.0}, "config.data: text_fraction = -1.0 must be from 0 to 1"),
    ({"dropout": 1.0}, "config: dropout = 1.0 must be at least 0 and below 1"),
    (
        {"accumulate": 3},
        "config.batch_size = 8 rows must be a positive multiple of 3 = 3 parts",
    ),
    ({"epochs": -1.0}, "config: epochs = -1.0 must be at least 0"),
]
CASES = [("ppo", *case) for case in PPO] + [("sft", *case) for case in SFT]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    CASES,
    ids=[f"{n}-{'-'.join(o)}-{i}" for i, (n, o, _) in enumerate(CASES)],
)
def test_a_value_that_cannot_be_is_one_line(name, overrides, message):
    assert message in error_of(name, overrides)


@pytest.mark.usefixtures("one_device")
def test_epochs_without_end_are_refused(chain, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"config\.epochs = 1e\+30 are .*e\+\d\d steps of \d+ rows: lower it",
    ):
        run_stage(stages.config_of(chain, "sft", {"epochs": 1e30}), tmp_path / "run")


@pytest.mark.usefixtures("one_device")
def test_paths_may_be_relative_and_hold_anything(chain, tmp_path, monkeypatch):
    """Blanks, other alphabets and `..` work, and the run is found again under another
    spelling of its path."""
    config = stages.config_of(chain, "sft", {"steps": 1, "epochs": 0.0})
    folder = tmp_path / "my räw data 数据" / "%s {x} 'q' #1"
    folder.mkdir(parents=True)
    demonstrations = [
        shutil.copy(path, folder / f"d {i}.jsonl.gz")
        for i, path in enumerate(config["data"]["demonstrations"])
    ]
    monkeypatch.chdir(tmp_path)
    files = tuple(
        os.path.relpath(tmp_path / "x" / ".." / path.relative_to(tmp_path))
        for path in demonstrations
    )
    config = {
        **config,
        "data": {
            **config["data"],
            "demonstrations": files,
            "folder": "rows of 数据/../rows",
        },
    }
    workdir = Path("runs of mine") / ".." / "rüns" / "one"
    assert run_stage(config, workdir)
    assert not run_stage(config, tmp_path / "rüns" / "one")
    (tmp_path / "rüns" / "one" / "summary.json").unlink()
    assert run_stage(config, Path("rüns/./one"))


@pytest.mark.usefixtures("one_device")
def test_a_workdir_of_another_stage_is_named_as_one(chain, tmp_path):
    """The message names the two stages, not the dozens of values in which they differ."""
    workdir = tmp_path / "run"
    run_stage(stages.config_of(chain, "sft", {"steps": 1, "epochs": 0.0}), workdir)
    with pytest.raises(ConfigError) as error:
        run_stage(stages.config_of(chain, "reward", {}), workdir)
    assert str(error.value) == (
        f"{workdir} holds a run with another config (stage: 'sft' (stored) != "
        f"'reward_model' (given)); "
        "give the stored values again or choose another --workdir"
    )


COMMANDS = [
    (["--config.kl_coef=1e400"], "config.kl_coef = inf must be a finite number"),
    (["--config.kl_coef=0x1"], "could not convert string to float"),
    (
        ["--config.seed=99999999999999999999"],
        "config.seed = 99999999999999999999 must be from 0 to 2147483647",
    ),
    (["--config.data.text=('a',"], "config.data.text"),
    (["--config.run.keep="], "run.keep"),
    (["--config.model=3"], "model"),
    (["--config."], "Could not parse"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"), COMMANDS, ids=[" ".join(a) for a, _ in COMMANDS]
)
def test_a_value_as_it_is_typed_is_one_line(arguments, message):
    done = subprocess.run(
        [
            sys.executable,
            "scripts/train.py",
            "--config",
            "configs/ppo.py:tiny",
            *arguments,
            "--dry_run",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2, done.stderr
    assert (
        message in done.stderr
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )
