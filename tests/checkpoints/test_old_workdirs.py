"""Workdirs of earlier versions: as parents, for sampling, when the same command is
repeated, and in the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import report_logs, stages, tiny_models

from instructax.checkpoints.manifest import (
    ADDED_FIELDS,
    PRETRAIN_DROPPED,
    RENAMED_FIELDS,
    RENAMED_VALUES,
    read_manifest,
    stored_manifest_hash,
    upgrade_config,
    upgrade_manifest,
)
from instructax.checkpoints.parents import ExpectedParent, open_parents
from instructax.config import ConfigError
from instructax.data.tokenizer import load_tokenizer, save_tokenizer
from instructax.experiment import RunSpec, load_config
from instructax.models.transformer import Transformer
from instructax.report.results import load_experiment
from instructax.serving import policy as served
from instructax.training.workdir import claim_workdir

TOKENIZER = load_tokenizer("bytes")
MODEL = tiny_models.gpt_config(vocab_size=TOKENIZER.size, max_length=64)
OLD_STAGES = {
    "pretrain": "supervised",
    "sft": "supervised",
    "reward_model": "reward",
    "public_tasks": "tasks",
}


def downgrade(group: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The config group `name` with the field names of the first version."""
    fields = {new: old for old, new in RENAMED_FIELDS.get(name, {}).items()}
    values = RENAMED_VALUES.get(name, {})
    old_group: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, dict):
            value = downgrade(value, key)
        elif name == "" and key == "stage":
            value = OLD_STAGES.get(value, value)
        elif isinstance(value, str):
            old_values = {new: old for old, new in values.get(key, {}).items()}
            value = old_values.get(value, value)
        old_group[fields.get(key, key)] = value
    return old_group


def make_old(path: Path, **changes: Any) -> None:
    """Rewrites the manifest in the folder `path` in the first version's format."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["head"]
    manifest["stage"] = OLD_STAGES[manifest["stage"]]
    manifest["config"] = downgrade(manifest["config"])
    manifest["model"] = downgrade(manifest["model"], "model")
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A finished SFT run whose manifest has the old names."""
    model = Transformer(MODEL, tiny_models.compute(), "tokens")
    params = tiny_models.random_params(model)
    workdir = stages.write_finished_run(tmp_path / "sft", MODEL, params, "bytes")
    save_tokenizer(TOKENIZER, str(workdir / "tokenizer.json"))
    data = {"demonstrations": ["d.jsonl.gz"], "text": []}
    make_old(workdir, config={"stage": "supervised", "data": data})
    return workdir


def test_an_old_manifest_is_read_with_the_new_names(old_run):
    stored = json.loads((old_run / "manifest.json").read_text())
    assert "layers" in stored["model"] and "num_layers" not in stored["model"]
    manifest = read_manifest(old_run)
    assert (manifest["stage"], manifest["head"]) == ("sft", "tokens")
    assert manifest["model"]["num_layers"] == MODEL.num_layers
    assert upgrade_manifest(manifest) == manifest


def test_an_old_run_can_be_a_parent(old_run):
    expected = {"parent": ExpectedParent(str(old_run), MODEL, "tokens")}
    parent = open_parents(expected, TOKENIZER, "bytes")["parent"]
    # The hash is that of the file, so manifests of children of earlier versions still
    # match.
    lineage = parent.lineage()
    assert lineage["stage"] == "sft"
    assert lineage["manifest_hash"] == stored_manifest_hash(old_run)
    with pytest.raises(ConfigError, match="it must have a scalar head"):
        wrong = {"parent": ExpectedParent(str(old_run), MODEL, "scalar")}
        open_parents(wrong, TOKENIZER, "bytes")


def test_an_old_run_answers_prompts(old_run):
    compute = tiny_models.compute()
    model, params, tokenizer = served.open_policy(old_run, compute)
    wanted = tiny_models.random_params(Transformer(MODEL, compute, "tokens"))
    assert model.config == MODEL and tokenizer.hash == TOKENIZER.hash
    np.testing.assert_array_equal(params["embedding"], wanted["embedding"])


@pytest.mark.parametrize(
    "name", ["world", "collect", "pretrain", "sft", "reward_model", "ppo", "evaluate"]
)
def test_the_same_command_finds_its_old_config(name, tmp_path, capsys):
    root = Path(__file__).resolve().parents[2]
    config = load_config(RunSpec("a", str(root / "configs" / f"{name}.py:tiny"), {}))
    old = downgrade(json.loads(json.dumps(config)))
    for field in ADDED_FIELDS.get(name, {}):
        del old[field]
    if name == "pretrain":
        old["lora"] = {"rank": 0, "alpha": 32.0}
        old["data"] |= {"demonstrations": [], "text_fraction": 1.0, "chat": False}
    assert upgrade_config(old) == json.loads(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "summary.json").write_text("{}")
    claim_workdir(tmp_path, config)
    with pytest.raises(ConfigError, match=r"seed: 0 \(stored\) != 1 \(given\)"):
        claim_workdir(tmp_path, {**config, "seed": 1})


def test_supervised_runs_become_pretrain_or_sft_runs():
    text = {"stage": "supervised", "data": {"demonstrations": [], "text": ["t"]}}
    demonstrations = {"stage": "supervised", "data": {"demonstrations": ["d"]}}
    # A LoRA run on text keeps its factors; only `sft` has them.
    with_lora = {**text, "lora": {"rank": 4, "alpha": 8.0}}
    assert upgrade_config(text)["stage"] == "pretrain"
    assert not set(PRETRAIN_DROPPED["data"]) & set(upgrade_config(text)["data"])
    assert upgrade_config(demonstrations)["stage"] == "sft"
    assert upgrade_config(with_lora) == {**with_lora, "stage": "sft"}


def test_the_report_reads_an_old_experiment(tmp_path):
    new = load_experiment(report_logs.write_one_size(tmp_path / "new"))
    old_root = report_logs.write_one_size(tmp_path / "old")
    for path in old_root.rglob("config.json"):
        path.write_text(json.dumps(downgrade(json.loads(path.read_text()))))
    old = load_experiment(old_root)
    assert [size.num_parameters for size in old.sizes] == [
        size.num_parameters for size in new.sizes
    ]
