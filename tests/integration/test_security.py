"""Security: nothing read is executed, writes stay in the workdir, secrets stay hidden."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tests.support import stages, tiny_models

from instructax import cli
from instructax.checkpoints.checkpoint import Checkpoints
from instructax.checkpoints.manifest import write_manifest
from instructax.config import ConfigError, require
from instructax.experiment import config_lines, run_stage
from instructax.models.pretrained import hf_folder
from instructax.runtime.files import write_json
from instructax.runtime.metric_log import MetricLog
from instructax.runtime.workdir_lock import lock_workdir
from instructax.training.workdir import claim_workdir

pytest_plugins = ("tests.support.pipeline_fixture",)
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for name in ("src", "scripts", "configs", "experiments")
    for path in (ROOT / name).rglob("*.py")
)

# Calls that turn bytes into a program, or an archive into files.
LIBRARIES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "torch",
    "yaml",
}
ARCHIVES = {"tarfile", "zipfile", "zipimport"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "unpack_archive",
    "extractall",
    "run_path",
}


def runs_what_it_reads(source: str) -> list[str]:
    """The places in `source` that could run data as a program, load pickles or unpack an
    archive."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [name for name in names if name.split(".")[0] in LIBRARIES | ARCHIVES]
        if isinstance(node, ast.Call):
            own = (
                node.func.id
                if isinstance(node.func, ast.Name)
                else getattr(node.func, "attr", "")
            )
            keywords = {
                keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords
            }
            of_re = (
                isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "re"
            )
            method = isinstance(node.func, ast.Attribute) and own in ("eval", "compile")
            found += [own] if own in CALLS and not of_re and not method else []
            found += [own] if keywords.get("allow_pickle", "False") != "False" else []
            found += (
                [own]
                if keywords.get("shell", "False") != "False"
                or "trust_remote_code" in keywords
                else []
            )
    return found


def test_nothing_that_is_read_is_run():
    assert {
        path.name: found
        for path in FILES
        if (found := runs_what_it_reads(path.read_text()))
    } == {}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from marshal import loads",
        "import torch.serialization",
        "eval('1')",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "import tarfile",
        "shutil.unpack_archive(x)",
        "subprocess.run(x, shell=True)",
        "os.system('x')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_a_planted_danger_is_found(planted):
    assert runs_what_it_reads(planted)


def test_only_configs_and_experiments_are_executed():
    users = [path.name for path in FILES if "exec_module" in path.read_text()]
    assert users == ["experiment.py"]


# Model folders.


def test_names_of_tensors_are_no_paths(tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    names = ["../../x", "/tmp/x", "a/../../b", "..", ""]
    save_file(
        {name: tiny_models.np.zeros(2, "float32") for name in names},
        inside / hf_folder.SINGLE_FILE,
    )
    before = sorted(tmp_path.rglob("*"))
    assert {
        name: read().shape for name, read in hf_folder.open_tensors(inside).items()
    } == dict.fromkeys(names, (2,))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shard_behind_a_link_is_read_as_tensors_or_not_at_all(tmp_path):
    """Links are followed because the hub's own cache consists of links. A file that is not
    safetensors is refused."""
    blob = tmp_path / "blob"
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"x": tiny_models.np.ones(2, "float32")}, blob)
    (inside / hf_folder.SINGLE_FILE).symlink_to(blob)
    assert hf_folder.open_tensors(inside)["x"]().tolist() == load_file(blob)["x"].tolist()
    (inside / hf_folder.SINGLE_FILE).unlink()
    (inside / hf_folder.SINGLE_FILE).symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="is damaged or no safetensors file") as error:
        hf_folder.open_tensors(inside)
    assert "root:" not in str(error.value)


def test_a_pickled_model_is_no_model(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="save the model as safetensors"):
        hf_folder.open_tensors(tmp_path)
    (tmp_path / hf_folder.SINGLE_FILE).write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        hf_folder.open_tensors(tmp_path)


# A workdir written by someone else.

EVIL = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.mark.usefixtures("one_device")
def test_a_resumed_run_runs_nothing_of_its_workdir(chain, tmp_path, monkeypatch):
    """config.json is compared with the given config and never executed. Other files are
    ignored."""
    config = stages.config_of(chain, "sft", {"steps": 1, "epochs": 0.0})
    workdir = tmp_path / "run"
    touched = tmp_path / "touched"
    run_stage(config, workdir)
    (workdir / "summary.json").unlink()
    names = (
        "config.py",
        "get_config.py",
        "conftest.py",
        "sitecustomize.py",
        "json.py",
        "numpy.py",
        "configs.py",
    )
    for name in names:
        (workdir / name).write_text(EVIL.format(str(touched)))
    monkeypatch.chdir(workdir)
    assert run_stage(config, workdir)
    assert not touched.exists()


@pytest.mark.usefixtures("one_device")
def test_no_file_of_a_run_is_written_through_a_link(chain, tmp_path):
    """The link is replaced, or the run is refused in one line. In no case does the target
    change."""
    config = stages.config_of(chain, "sft", {"steps": 1, "epochs": 0.0})
    run_stage(config, tmp_path / "run")
    names = [path.name for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert {
        "heartbeat-0.json",
        "goodput.jsonl",
        "tokenizer.json",
        "metrics.jsonl",
        "config.json",
    } <= {*names}
    precious = tmp_path / "precious"
    for name in names:
        precious.write_text("precious")
        workdir = tmp_path / f"with {name}"
        workdir.mkdir()
        (workdir / name).symlink_to(precious)
        code = cli.guarded(lambda workdir=workdir: run_stage(config, workdir))
        assert precious.read_text() == "precious", name
        assert code in (0, 2), name


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    "content", [b'{"seed": ', b"[1]", b"null", b"\xff\xfe", b"[" * 100_000]
)
def test_a_config_of_a_run_that_is_damaged_is_one_line(chain, tmp_path, content):
    config = stages.config_of(chain, "sft", {"steps": 1, "epochs": 0.0})
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        ConfigError,
        match=r"config\.json cannot be read \(.*\): restore a copy, or choose another",
    ):
        run_stage(config, tmp_path)


def test_nothing_is_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    workdir = tmp_path / "run"
    workdir.mkdir()
    precious.write_text("precious")
    for name in ("lock.json", "summary.json.tmp", "samples.jsonl"):
        (workdir / name).symlink_to(precious)
    with (
        pytest.raises(ConfigError, match=r"cannot be used: .*lock\.json"),
        lock_workdir(workdir),
    ):
        pass
    with pytest.raises(OSError, match="symbolic links"):
        write_json(workdir / "summary.json", {})
    keeping = {
        "total_steps": 1,
        "log_every": 1,
        "start_step": 1,
        "tensorboard": False,
        "console": False,
    }
    MetricLog(
        workdir, **keeping
    ).close()  # the log is rewound, and a file replaces the link
    assert not (workdir / "samples.jsonl").is_symlink()
    assert precious.read_text() == "precious"


def test_nothing_is_deleted_behind_a_link(tmp_path):
    precious = tmp_path / "precious"
    checkpoints = tmp_path / "run" / "checkpoints"
    precious.mkdir()
    (precious / "file").touch()
    checkpoints.mkdir(parents=True)
    for name in ("3.deleted", "4.orbax-checkpoint-tmp"):
        (checkpoints / name).symlink_to(precious)
    Checkpoints(
        tmp_path / "run",
        save_every=1,
        keep=1,
        best_metric="",
        best_mode="max",
        exported="params",
    ).close()
    assert list(checkpoints.iterdir()) == [] and (precious / "file").exists()


# Secrets.


def test_no_dump_shows_a_secret(tmp_path, capsys):
    config = {
        "stage": "world",
        "api_key": "hunter2",
        "source": "https://me:hunter2@host/x",
        "pad_token_id": 3,
    }
    claim_workdir(tmp_path, config)
    write_manifest(
        tmp_path,
        stage="world",
        config=config,
        model={},
        head=None,
        tokenizer_hash="0",
        tokenizer_path="https://me:hunter2@host/t",
        data_hashes={},
        parents={},
    )
    print(config_lines(config))
    assert (
        cli.guarded(
            lambda: require(False, f"config.source = {config['source']!r} is nowhere")
        )
        == 2
    )
    assert cli.guarded(lambda: int("password=hunter2")) == 1  # a traceback
    captured = capsys.readouterr()
    dumps = [path.read_text() for path in tmp_path.iterdir()] + [captured.out, captured.err]
    assert len(dumps) == 4
    for dump in dumps:
        assert "hunter2" not in dump and "(hidden)" in dump
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["config"]["pad_token_id"] == 3
    )
    (tmp_path / "summary.json").write_text("{}")
    claim_workdir(tmp_path, config)  # the same config again is accepted
    with pytest.raises(ConfigError) as error:
        claim_workdir(tmp_path, {**config, "pad_token_id": 4})
    assert "pad_token_id: 3 (stored) != 4 (given)" in str(
        error.value
    ) and "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "flag",
    [
        "--config.hf_token=hunter2",
        "--config.steps=password=hunter2",
        "--config.data.folder=s3://a:hunter2@b/c",
    ],
)
def test_no_command_shows_a_secret(flag):
    done = subprocess.run(
        [
            sys.executable,
            "scripts/train.py",
            "--config",
            "configs/ppo.py:tiny",
            flag,
            "--dry_run",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"HF_TOKEN": "hunter2"},
    )
    assert done.returncode == (0 if "folder" in flag else 2)
    assert "hunter2" not in done.stdout + done.stderr


# The terminal.


def test_an_error_cannot_drive_the_terminal(capsys):
    assert (
        cli.guarded(lambda: require(False, "no such file: a\x1b]0;evil\x07\u202e\udc80b"))
        == 2
    )
    assert (
        capsys.readouterr().err
        == "error: no such file: a\\x1b]0;evil\\x07\\u202e\\udc80b\n"
    )
