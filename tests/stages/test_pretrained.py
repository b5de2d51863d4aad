"""Imports are runs that stages can start from, exports round-trip, and mistakes are
one-line errors."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.support import stages, tiny_models

from instructax.checkpoints.manifest import read_manifest
from instructax.checkpoints.parents import open_parent
from instructax.config import ConfigError
from instructax.data.tokenizer import load_tokenizer
from instructax.models.config import ModelConfig
from instructax.models.pretrained import save
from instructax.models.pretrained.hf_configs import write_config
from instructax.models.transformer import Transformer
from instructax.serving.policy import open_policy
from instructax.stages import build_config, pretrained
from instructax.types import Params

pytest_plugins = ("tests.support.pipeline_fixture",)

ROOT = Path(__file__).resolve().parents[2]


def folder_of(
    chain: Path, path: Path, vocab_size: int = 515
) -> tuple[Path, ModelConfig, Params]:
    """A Llama folder with the chain's tokenizer of 512 ids and more embedding rows."""
    config = tiny_models.llama_config(
        vocab_size=vocab_size, max_length=96, tied_embeddings=True, head_dim=4
    )
    params = tiny_models.random_params(Transformer(config, tiny_models.compute(), "tokens"))
    family, raw = write_config(config)
    path.mkdir()
    save.save_tensors(path, params, family, config, "float32")
    save.write_hf_json(path / "config.json", raw)
    shutil.copyfile(chain / "world" / "tokenizer.json", path / "tokenizer.json")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path, config, params


@pytest.fixture
def imported(chain, tmp_path, monkeypatch):
    """(architecture, parameters) of an imported model that the configs know as the size
    `llama`."""
    source, config, params = folder_of(chain, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    line = pretrained.import_model(
        str(source), Path("runs/llama/pretrain"), fsdp=1, tensor=1
    )
    assert line.startswith("runs/llama/pretrain: llama, ") and line.endswith(
        ", 515 token ids"
    )
    return config, params


def test_an_import_is_a_run_that_samples(imported):
    config, params = imported
    run = open_parent("runs/llama/pretrain", "--workdir")
    assert run.manifest["stage"] == "pretrained" and set(run.manifest["data"]) == {
        "config.json",
        "model.safetensors",
    }
    model, found, tokenizer = open_policy("runs/llama/pretrain", tiny_models.compute())
    assert (
        model.config == config
        and tokenizer.size == 515
        and tokenizer.unused_ids() == [512, 513, 514]
    )
    assert tokenizer.decode([512]) == "<|unused 512|>"
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert pretrained.import_model(
        str(Path("source").absolute()), Path("runs/llama/pretrain"), fsdp=1, tensor=1
    ) == ("runs/llama/pretrain is finished; nothing to do")
    with pytest.raises(ConfigError, match="holds a run with another config"):
        pretrained.import_model("other", Path("runs/llama/pretrain"), fsdp=1, tensor=1)


def test_an_import_is_a_size_of_every_stage(imported):
    for name in ("sft", "reward_model", "ppo", "evaluate"):
        values = importlib.import_module(f"configs.{name}").get_config("llama").to_dict()
        built = build_config(values)
        assert built.model == imported[0]
        assert built.tokenizer == "runs/llama/pretrain/tokenizer.json"
        assert (
            built.data.limits.sequence_tokens == 96
            and built.data.limits.prompt_tokens == 48
        )
    with pytest.raises(
        ConfigError, match=r"^size 'mamba' must be one of .* written to runs/NAME/pretrain"
    ):
        importlib.import_module("configs.sft").get_config("mamba")


def test_stages_start_from_an_import(imported, chain, tmp_path):
    config, params = imported
    changes = {
        "model": dataclasses.asdict(config),
        "parent": str(tmp_path / "runs/llama/pretrain"),
        "tokenizer": "runs/llama/pretrain/tokenizer.json",
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        configs = {
            name: stages.config_of(chain, name, {}) | changes for name in ("sft", "reward")
        }
    for name, values in configs.items():
        values["data"]["folder"] = str(tmp_path / "rows")
        state = stages.initial_state(values, tmp_path / name)
        trunk = {leaf: x for leaf, x in state.params.items() if leaf != "scalar_head"}
        jax.tree.map(np.testing.assert_array_equal, trunk, params)
        assert ("scalar_head" in state.params) == (name == "reward")
    other = configs["sft"] | {"model": {**changes["model"], "vocab_size": 512}}
    other["tokenizer"] = str(chain / "world" / "tokenizer.json")
    with pytest.raises(ValueError, match="token ids would mean other text"):
        stages.initial_state(other, tmp_path / "other")


def test_exports_read_back_equal(chain, tmp_path):
    for name, classes in (
        ("ppo", "GPTNeoXForCausalLM"),
        ("reward", "GPTNeoXForSequenceClassification"),
    ):
        out = tmp_path / name
        report = pretrained.export_run(str(chain / name), out, dtype="float32", verify=True)
        assert f"{classes}, float32\nread again: " in report
        raw = json.loads((out / "config.json").read_text())
        assert raw["architectures"] == [classes] and raw["model_type"] == "gpt_neox"
        assert pretrained.SCORE_BIAS not in raw  # folded into a layer norm
        assert (
            load_tokenizer(str(out)).hash
            == read_manifest(chain / name)["tokenizer"]["hash"]
        )
    with pytest.raises(ConfigError, match="is not empty: take another folder"):
        pretrained.export_run(
            str(chain / "ppo"), tmp_path / "ppo", dtype="float32", verify=False
        )
    # transformers has no padding token if the vocabulary has no unused id.
    assert raw["pad_token_id"] is None
    assert "score one text at a time" in (tmp_path / "reward" / "README.md").read_text()
    report = pretrained.export_run(
        str(chain / "ppo"), tmp_path / "short", dtype="bfloat16", verify=True
    )
    assert 1e-4 < float(report.rpartition(" ")[2]) < 1


def test_an_export_keeps_the_chat_template(imported):
    pretrained.export_run("runs/llama/pretrain", Path("out"), dtype="float32", verify=False)
    assert Path("out/chat_template.jinja").read_text() == "{{ messages }}"


def test_the_score_bias_folds_into_a_layer_norm():
    """With weights (1, −1) and bias 0.6, the norm's bias changes by (0.3, −0.3)."""
    config = tiny_models.gpt_config(embed_dim=2)
    params = {
        "scalar_head": {"kernel": jnp.array([1.0, -1.0]), "bias": jnp.float32(0.6)},
        "final_norm": {"bias": jnp.array([0.25, 0.5]), "scale": jnp.ones(2)},
    }
    found = pretrained.fold_score_bias(params, config)
    np.testing.assert_allclose(found["final_norm"]["bias"], [0.55, 0.2], rtol=1e-6)
    assert float(found["scalar_head"]["bias"]) == 0
    assert (
        pretrained.fold_score_bias(params, tiny_models.llama_config(embed_dim=2)) is params
    )


def test_verify_refuses_different_logits(chain, tmp_path):
    out = tmp_path / "out"
    pretrained.export_run(str(chain / "sft"), out, dtype="float32", verify=False)
    model, params, _ = open_policy(chain / "sft", tiny_models.compute())
    other = {**params, "embedding": params["embedding"] * 1.001}
    with pytest.raises(
        ConfigError, match="gives other logits than the run: they differ by up to "
    ):
        pretrained.verify_export(out, model, other, "float32")


def test_a_tokenizer_with_too_many_ids_is_refused(chain, tmp_path):
    source, *_ = folder_of(chain, tmp_path / "source", vocab_size=500)
    with pytest.raises(
        ConfigError, match=r"has 512 ids, config\.json says vocab_size = 500"
    ):
        pretrained.import_model(str(source), tmp_path / "run", fsdp=1, tensor=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["import_hf.py", "--source=./nowhere", "--workdir=run"],
            "error: no folder or file './nowhere'",
        ),
        (
            ["export_hf.py", "--checkpoint=nowhere", "--to=out"],
            "error: --checkpoint = 'nowhere' is not a finished run",
        ),
        (["import_hf.py"], "error: give --source=FOLDER"),
        (
            ["export_hf.py", "--checkpoint=nowhere"],
            "error: give --checkpoint=WORKDIR and --to=FOLDER",
        ),
    ],
)
def test_user_errors_are_one_line(command, message, tmp_path):
    script = str(ROOT / "scripts" / command[0])
    done = subprocess.run(
        [sys.executable, script, *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
