"""Manifests: what they store, what is refused, and how two configs differ."""

import hashlib
import json
import math

import jax
import numpy as np
import pytest

from instructax.checkpoints.manifest import (
    check_parent,
    config_difference,
    manifest_hash,
    read_manifest,
    upgrade_metrics,
    write_manifest,
)
from instructax.training.run import Run


def write(workdir, **changes):
    values = {
        "stage": "reward_model",
        "config": {
            "seed": 1,
            "optimizer": {"betas": (0.9, 0.95), "learning_rate": np.float64(1e-5)},
        },
        "model": {"embed_dim": 64},
        "head": "scalar",
        "tokenizer_hash": "a" * 64,
        "tokenizer_path": "runs/bytes",
        "data_hashes": {"comparisons": "c" * 64},
        "parents": {
            "parent": {"workdir": "runs/sft", "step": 7, "manifest_hash": "d" * 64}
        },
    }
    return write_manifest(workdir, **{**values, **changes})


def test_manifests_round_trip(tmp_path):
    written = write(tmp_path / "new" / "run")
    manifest = read_manifest(tmp_path / "new" / "run")
    assert manifest == written
    assert manifest["stage"] == "reward_model" and manifest["tokenizer"] == {
        "hash": "a" * 64,
        "path": "runs/bytes",
    }
    assert manifest["config"]["optimizer"] == {"betas": [0.9, 0.95], "learning_rate": 1e-5}
    assert manifest["model"] == {"embed_dim": 64} and manifest["data"] == {
        "comparisons": "c" * 64
    }
    assert manifest["parents"] == {
        "parent": {"workdir": "runs/sft", "step": 7, "manifest_hash": "d" * 64}
    }
    assert (
        manifest["versions"]["jax"] == jax.__version__
        and "orbax-checkpoint" in manifest["versions"]
    )


def test_a_resumed_run_writes_the_same_bytes(tmp_path):
    write(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert (
        write(tmp_path)["stage"] == "reward_model"
        and not (tmp_path / "manifest.json").exists()
    )


def test_only_the_first_process_writes_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Run(config=None, original_config={}, workdir=tmp_path).write_manifest()
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_the_content(tmp_path):
    assert (
        manifest_hash({"b": (1, 2), "a": "é"})
        == hashlib.sha256(b'{"a": "\\u00e9", "b": [1, 2]}').hexdigest()
    )
    first = write(tmp_path)
    assert manifest_hash(read_manifest(tmp_path)) == manifest_hash(
        dict(reversed(first.items()))
    )
    assert manifest_hash(
        write(tmp_path, data_hashes={"comparisons": "e" * 64})
    ) != manifest_hash(first)


def test_errors_of_reading(tmp_path):
    with pytest.raises(ValueError, match="is not the workdir of a run"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"stage": "rew')
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        read_manifest(tmp_path)
    for content in (
        "[]",
        json.dumps(
            {"stage": "reward_model", "config": {}, "model": {}, "data": {}, "parents": {}}
        ),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"manifest\.json lacks .*tokenizer, .*versions"
        ):
            read_manifest(tmp_path)


def test_a_parent_with_another_tokenizer_is_refused(tmp_path):
    parent = write(tmp_path)
    named = "config.parent = 'runs/sft'"
    check_parent(
        parent, named=named, tokenizer_hash="a" * 64, tokenizer_path="moved/elsewhere"
    )
    with pytest.raises(ValueError) as error:
        check_parent(
            parent, named=named, tokenizer_hash="b" * 64, tokenizer_path="runs/gpt2"
        )
    message = str(error.value)
    assert message.startswith(f"{named} has the tokenizer {'a' * 64} of ")
    assert all(part in message for part in ("b" * 64, "runs/bytes", "runs/gpt2"))
    assert "\n" not in message


def test_config_difference():
    old = {
        "optimizer": {"learning_rate": 1e-5, "betas": (0.9, 0.95)},
        "seed": 1,
        "name": "a",
        "gone": {"x": 1},
        "same": {},
    }
    assert config_difference(old, json.loads(json.dumps(old))) == []
    new = {
        "optimizer": {"learning_rate": 2e-5, "betas": (0.9, 0.99)},
        "seed": True,
        "name": None,
        "same": {},
        "new": "",
    }
    assert config_difference(old, new) == [
        "gone.x: 1 (stored) != absent (given)",
        "name: 'a' (stored) != None (given)",
        "new: absent (stored) != '' (given)",
        "optimizer.betas: [0.9, 0.95] (stored) != [0.9, 0.99] (given)",
        "optimizer.learning_rate: 1e-05 (stored) != 2e-05 (given)",
        "seed: 1 (stored) != True (given)",
    ]
    assert config_difference({"a": {}}, {"a": {"b": 1}}) == [
        "a: {} (stored) != absent (given)",
        "a.b: absent (stored) != 1 (given)",
    ]
    assert config_difference({"a": math.nan}, {"a": None}) == []


def test_metrics_of_old_logs_have_the_new_names():
    old = {"step": 3, "held_out_accuracy": 0.7, "held_out_pairs": 9.0, "loss": 1.0}
    new = {"step": 3, "validation_accuracy": 0.7, "validation_pairs": 9.0, "loss": 1.0}
    assert upgrade_metrics(old) == new
    assert upgrade_metrics(new) == new
