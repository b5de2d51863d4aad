"""Exit codes and one-line error messages, in this process and of the commands
themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.support.run_logs import read_samples

from instructax import cli
from instructax.checkpoints.checksums import NewerFormatError
from instructax.checkpoints.restore import CheckpointMismatch
from instructax.config import ConfigError, require
from instructax.data.schema import DataError
from instructax.evals.intervals import win_rate
from instructax.experiment import dry_run, load_file, run_experiment, run_stage
from instructax.runtime.metric_log import read_metrics, read_summary
from instructax.stages.ppo.invariants import check_update
from instructax.training.loop import Interrupted

ROOT = Path(__file__).resolve().parents[1]
LINES = {
    "documents": 20,
    "demonstrated_prompts": 10,
    "demonstrations": 20,
    "comparisons": 10,
}
LINES |= {"prompts": 20, "gpt_prompts": 5, "public": 5}


def raiser(error: BaseException):
    def call():
        raise error

    return call


def broken_invariant():
    check_update({"first_ratio_gap": 0.5, "first_clipped_fraction": 0.0}, tolerance=0.1)


@pytest.mark.parametrize(
    ("call", "code", "line"),
    [
        (lambda: "a value", 0, ""),
        (
            lambda: require(False, "config.x = 3\n  must be 4"),
            2,
            "error: config.x = 3 must be 4\n",
        ),
        (lambda: load_file("/nowhere.py"), 2, "error: no such file: /nowhere.py\n"),
        (
            lambda: read_summary(Path("/nowhere")),
            2,
            "error: /nowhere is not a finished run: run the whole experiment, not "
            "its report alone\n",
        ),
        (
            broken_invariant,
            3,
            "invariant broken: at the first optimizer step the ratio differs from 1 "
            "by 0.5 (tolerance 0.1) and 0 "
            "of the tokens are clipped: old_logprobs and the update disagree; check "
            "parameters, temperature, "
            "dropout and dtype of the pass (or, with old_logprobs = 'sampled', the "
            "sampler) that produced them\n",
        ),
        (
            raiser(Interrupted(7)),
            42,
            "interrupted; step 7 is saved, the same command goes on from there\n",
        ),
        (raiser(KeyboardInterrupt()), 130, "interrupted\n"),
        (
            raiser(TimeoutError("at a barrier")),
            1,
            "error: another process of the run has ended or hangs: at a barrier\n",
        ),
        (raiser(MemoryError("8 GiB")), 2, f"error: {cli.OUT_OF_MEMORY}: 8 GiB\n"),
        (
            raiser(
                jax.errors.JaxRuntimeError(
                    "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n  a list"
                )
            ),
            2,
            f"error: {cli.OUT_OF_MEMORY}: RESOURCE_EXHAUSTED: Out of memory "
            f"allocating 9 bytes.\n",
        ),
        (
            raiser(PermissionError(13, "Permission denied", "/x")),
            2,
            "error: [Errno 13] Permission denied: '/x'\n",
        ),
    ],
)
def test_exit_code_and_line(call, code, line, capsys):
    assert cli.guarded(call) == code
    captured = capsys.readouterr()
    assert (captured.err, captured.out) == (line, "")


def test_a_closed_output_pipe_is_not_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert cli.guarded(raiser(BrokenPipeError())) == 0
    assert sys.stdout is None and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "call",
    [
        lambda: np.zeros(3).reshape(2, 2),  # in a library
        lambda: win_rate(np.zeros(3), np.zeros(4)),  # in an expression of this package
        raiser(ValueError("raised by a library")),
    ],
)
def test_other_value_errors_are_program_bugs(call, capsys):
    assert cli.guarded(call) == 1
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):")


def test_only_a_config_error_is_the_users_mistake(tmp_path, capsys):
    """Both errors are ValueErrors raised in the same kind of file; only the type
    decides."""
    (tmp_path / "ours.py").write_text(
        "from instructax.config import ConfigError\nraise ConfigError('size 7 must be 8')"
    )
    (tmp_path / "library.py").write_text("raise ValueError('size 7 must be 8')")
    assert cli.guarded(lambda: load_file(tmp_path / "ours.py")) == 2
    assert capsys.readouterr().err == "error: size 7 must be 8\n"
    assert cli.guarded(lambda: load_file(tmp_path / "library.py")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: size 7 must be 8"


@pytest.mark.parametrize("error", [DataError, CheckpointMismatch, NewerFormatError])
def test_errors_in_the_users_files_are_one_line(error, capsys):
    assert cli.guarded(raiser(error("data.jsonl:3: no prompt"))) == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: no prompt\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError: invalid syntax"),
        ("import nosuchmodule", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_location(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--dry_run", "--config", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        done.stderr.startswith("error: ")
        and message in done.stderr
        and "mine.py" in done.stderr
    )


@pytest.mark.parametrize(
    "text", ["a=" * 20_000, "a" * 100_000, "a-" * 50_000, "[" * 10_000]
)
def test_long_messages_are_shortened(text, capsys):
    assert cli.guarded(lambda: require(False, text)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text[:100]}") and len(line) < 11_000


def test_other_exceptions_pass_through():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 / 0)


def test_the_compilation_cache_is_enabled_unless_the_environment_sets_one(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    cli.enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == ""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.enable_compilation_cache()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.parent == tmp_path / "instructax" and re.fullmatch(
        r"compiled-[0-9a-f]{8}", folder.name
    )


def run(script: str, *arguments: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


TINY = ("--config", "configs/ppo.py:tiny")
MISTAKES = [
    (
        (*TINY, "--config.kl_ceof=0.1"),
        "unknown config value: 'kl_ceof' Did you mean \"kl_coef\"",
    ),
    ((*TINY, "--config.steps=many"), "flag --config.steps=many: invalid literal for int()"),
    ((*TINY, "--config.kl_coef=nan"), "config.kl_coef = nan must be a finite number"),
    (("--config", "configs/ppo.py:huge"), "size 'huge' must be one of 125m, 350m"),
    (("--config", "configs/ppo.py"), "size '' must be one of 125m, 350m"),
    (
        ("--config", "configs/world.py:small"),
        "size 'small' must be one of tiny, micro, milli, centi: only these",
    ),
    (("--config", "configs/none.py:tiny"), "--config: no such file: configs/none.py\n"),
    ((*TINY, "stray"), "unknown argument 'stray'; give --config=FILE:SIZE"),
    (
        (*TINY, "--config.compute.attention=flash"),
        "config.compute.attention = 'flash' must be one of 'auto', 'jax', 'cudnn'",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES]
)
def test_a_mistake_in_a_training_command_is_one_line(arguments, message, tmp_path):
    code, out, err = run("train.py", *arguments, "--workdir", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


WORK = ("--config", "configs/benchmark.py:ppo,S")
WRONG_WORKS = [
    ((*WORK, "--config.bogus=1"), "unknown config value: 'bogus'"),
    (("--config", "configs/benchmark.py:ppo,L"), "benchmark 'ppo,L' must be one of"),
    ((*WORK, "--ending=2"), "ending"),
    ((*WORK, "stray"), "unknown argument 'stray'; give --config"),
    (
        ("--config", "configs/benchmark.py:sft,S", "--ending=0.1"),
        "config.stage = 'pretrain' samples nothing",
    ),
    (("--config", "configs/world.py:tiny"), "config.stage = 'world' trains nothing"),
    (
        (*WORK, "--config.compute.attention=cudnn"),
        "config.compute.attention = 'cudnn' cannot run: platform cpu, allowed is",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG_WORKS, ids=[message[:24] for _, message in WRONG_WORKS]
)
def test_a_mistake_in_a_benchmark_command_is_one_line(arguments, message):
    code, out, err = run("benchmark.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


SAMPLES = [
    ((), "give --workdir=FOLDER of a finished run"),
    (
        ("--workdir=/nowhere",),
        "--workdir = '/nowhere' is not a finished run: train it first",
    ),
    (("--workdir=x", "--input=a.jsonl"), "give --input and --output together"),
    (("--workdir=x", "--chat", "--num_samples=2"), "--chat cannot be combined with"),
    (("--workdir=x", "--system=y"), "--system requires --chat"),
    (("--workdir=x", "--stop="), "--stop must not be empty"),
    (("--workdir=x", "--temperature=-1"), "temperature"),
    (
        ("--workdir=x", "--input=/nowhere.jsonl", "--output=/nowhere.out"),
        "--input = /nowhere.jsonl cannot be read",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), SAMPLES, ids=[message[:24] for _, message in SAMPLES]
)
def test_a_mistake_in_a_sampling_command_is_one_line(arguments, message):
    code, out, err = run("sample.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_a_training_command_without_a_workdir():
    assert run("train.py", *TINY) == (
        2,
        "",
        "error: give --config=FILE:SIZE --config.name=value … --workdir=FOLDER\n",
    )


def test_a_dry_run_prints_its_memory():
    code, out, err = run("train.py", *TINY, "--config.kl_coef=0.5", "--dry_run")
    assert (code, err) == (0, "")
    assert "\nconfig.kl_coef = 0.5\n" in out and "\nconfig.model.embed_dim = 32\n" in out
    assert (
        "mesh: data 1 × fsdp 1 × tensor 1 = 1 devices, or a multiple "
        "(config.mesh.data = -1)" in out
    )
    assert "held throughout" in out


def test_help_exits_with_code_0():
    code, out, err = run("train.py", "--help")
    assert (code, err) == (0, "") and "--config" in out
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "SEED=1" in done.stdout
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), "micro"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: it takes no arguments")


def test_a_mistake_in_an_experiment_command_is_one_line(tmp_path):
    code, out, err = run(
        "experiment.py", "experiments/none.py:tiny", "--workdir", str(tmp_path)
    )
    assert (code, out, err) == (2, "", "error: no such file: experiments/none.py\n")


EXPERIMENT = """
from instructax.experiment import RunSpec
from instructax.runtime.metric_log import read_summary

LINES = {"documents": 20, "demonstrated_prompts": 10, "demonstrations": 20}
LINES |= {"comparisons": 10, "prompts": 20, "gpt_prompts": 5, "public": 5}
LINES = {f"lines.{name}": size for name, size in LINES.items()}

def get_runs(size, root):
    runs = []
    for seed, name in enumerate(("a", "b")):
        runs.append(RunSpec(name, f"configs/world.py:{size}", {**LINES, "seed": seed}))
    return runs

def report(root):
    print("report:", *(read_summary(root / name)["stage"] for name in ("a", "b")))
"""


def test_an_experiment_runs_in_order_and_resumes_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "both.py"
    root = tmp_path / "runs"
    path.write_text(EXPERIMENT)
    with pytest.raises(ConfigError, match="runs/a is not a finished run"):
        run_experiment(f"{path}:tiny", root, report_only=True)
    run_experiment(f"{path}:tiny", root, report_only=False)
    lines = capsys.readouterr().out.splitlines()
    said = (
        "20 documents, 10 demonstrated_prompts, 20 demonstrations, 10 "
        "comparisons, 20 prompts, 5 gpt_prompts, 5 public"
    )
    for number, name in enumerate("ab"):
        lines.remove(
            f"world of seed {number} in {root / name}: {said}; training its tokenizer"
        )
    assert lines == [
        "[1/2] a: configs/world.py:tiny",
        "[2/2] b: configs/world.py:tiny",
        "report: world world",
    ]
    texts = [(root / name / "text.jsonl.gz").read_bytes() for name in ("a", "b")]
    assert texts[0] != texts[1]  # the overrides reached the runs

    (root / "b" / "summary.json").unlink()
    run_experiment(f"{path}:tiny", root, report_only=False)
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] a: configs/world.py:tiny",
        f"{root}/a is finished; nothing to do",
        "[2/2] b: configs/world.py:tiny",
        f"world of seed 1 in {root}/b: {said}; training its tokenizer",
        "report: world world",
    ]
    assert [(root / name / "text.jsonl.gz").read_bytes() for name in ("a", "b")] == texts


def test_an_experiment_whose_report_cannot_be_drawn_does_not_start(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "both.py").write_text(EXPERIMENT)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for report_only in (False, True):
        with pytest.raises(
            ConfigError, match=r"not installed: pip install 'instructax\[plots\]'"
        ):
            run_experiment(
                f"{tmp_path / 'both.py'}:tiny", tmp_path / "runs", report_only=report_only
            )
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = {"stage": "world", "seed": 0, "vocab_size": 300, "lines": LINES}
    assert run_stage(config, tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"holds a run with another config \(.*seed.*\); give the stored values",
    ):
        run_stage({**config, "seed": 1}, tmp_path)
    assert not run_stage(config, tmp_path)


def test_a_config_must_be_a_python_file(tmp_path):
    (tmp_path / "notes.md").write_text("# notes")
    with pytest.raises(ConfigError, match=r"notes\.md is not a Python file"):
        load_file(tmp_path / "notes.md")


def test_a_world_needs_no_device_memory():
    config = {"stage": "world", "seed": 0, "vocab_size": 300, "lines": LINES}
    assert dry_run(config) == "nothing is trained"


def test_metrics_and_samples_are_read_back(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "samples.jsonl").write_text('{"prompt": "a"}\n')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    assert read_samples(tmp_path) == [{"prompt": "a"}]
