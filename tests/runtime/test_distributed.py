"""Two processes on 127.0.0.1 give the same metrics as one, write one log, stop together,
and resume."""

import json
import os
import socket
import subprocess
import sys

import pytest
from tests.support import stages
from tests.support.run_logs import read_samples

from instructax.checkpoints.steps import committed_steps
from instructax.config import ConfigError
from instructax.runtime import distributed
from instructax.runtime.metric_log import read_metrics

pytest_plugins = ("tests.support.pipeline_fixture",)

# The second process requests a stop, as Ctrl-C would, before it reads batch `stop_at`.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

from instructax import cli, experiment
from instructax.runtime import distributed
from instructax.stages.ppo import stage as ppo_stage

address, index, stop_at, config, workdir = sys.argv[1:]
distributed.join_processes(address, 2, int(index))
reader = ppo_stage.batch_reader


def watched_reader(*args):
    read = reader(*args)

    def watched(step):
        if (index, str(step)) == ("1", stop_at):
            os.kill(os.getpid(), signal.SIGINT)
        return read(step)

    return watched


ppo_stage.batch_reader = watched_reader
sys.exit(cli.guarded(lambda: experiment.run_stage(json.loads(config), Path(workdir))))
"""


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def run_both(config, workdir, stop_at: int) -> list[int]:
    """The exit codes of two processes, each with one device, that share the run."""
    arguments = [str(stop_at), json.dumps(config), str(workdir)]
    address = free_address()
    # The last occurrence of a flag wins.
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(index), *arguments], env=environment
        )
        for index in range(2)
    ]
    try:
        return [process.wait(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()


def test_two_processes_give_the_results_of_one(chain, tmp_path):
    config = stages.config_of(chain, "ppo-ptx", {})
    workdir = tmp_path / "run"
    assert run_both(config, workdir, stop_at=2) == [42, 42]
    assert committed_steps(workdir) == [2]  # both abandoned the iteration in progress
    assert run_both(config, workdir, stop_at=-1) == [0, 0]
    alone = read_metrics(chain / "ppo-ptx")
    together = read_metrics(workdir)
    assert (
        [line["step"] for line in together]
        == [line["step"] for line in alone]
        == [1, 2, 3, 4]
    )
    for one, two in zip(alone, together, strict=True):
        metrics = {
            name: value for name, value in one.items() if not name.startswith("time/")
        }
        # Gaps are rounding errors themselves, and two devices need larger microbatches,
        # with more empty rows.
        gaps = {name for name in metrics if name.endswith(("_gap", "padding"))}
        assert {name: two[name] for name in metrics.keys() - gaps} == pytest.approx(
            {name: metrics[name] for name in metrics.keys() - gaps}, rel=1e-3, abs=1e-5
        )
    for one, two in zip(
        read_samples(chain / "ppo-ptx"), read_samples(workdir), strict=True
    ):
        for name in ("step", "prompt", "response"):
            assert one[name] == two[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("127.0.0.1:1", None, 0),
            "--coordinator=127.0.0.1:1 needs --processes=N and --process=0 … N − 1, "
            "and got None",
        ),
        (("127.0.0.1:1", 2, 2), "--process=0 … N − 1, and got 2 and 2"),
        (("nonsense", 2, 0), "--coordinator=nonsense must be HOST:PORT or auto"),
        (("", 2, 1), "--coordinator= must be HOST:PORT or auto"),
        (("auto", 2, 0), "--coordinator=auto finds --processes and --process itself"),
    ],
)
def test_inconsistent_flags_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.join_processes(*arguments)


def test_four_processes_write_the_same_world_as_one(tmp_path):
    address = free_address()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "scripts/train.py",
        "--config",
        "configs/world.py:tiny",
        "--workdir",
    ]
    joined = [f"--coordinator={address}", "--processes=4"]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path / "four"), *joined, f"--process={i}"], env=environment
        )
        for i in range(4)
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * 4
    hashed = environment | {"PYTHONHASHSEED": "7"}  # set order must not affect any file
    assert (
        subprocess.run(
            [*command, str(tmp_path / "one")], env=hashed, timeout=300
        ).returncode
        == 0
    )
    names = {path.name for path in (tmp_path / "one").glob("*.gz")} | {"tokenizer.json"}
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "four" / name).read_bytes() == (
            tmp_path / "one" / name
        ).read_bytes()


def test_one_process_agrees_with_itself():
    assert distributed.all_hosts(True) and not distributed.all_hosts(False)
    assert distributed.any_host(True) and not distributed.any_host(False)
