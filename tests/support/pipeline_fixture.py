"""Fixtures of the tests of the stages; a plugin (`pytest_plugins`), so that a session makes
the chain of runs once."""

import fcntl
import os
from pathlib import Path

import pytest
from tests.support import stages

from instructax import experiment


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """A folder that all processes of this session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def one_device(monkeypatch) -> None:
    stages.use_devices(monkeypatch, 1)


@pytest.fixture(scope="session")
def chain(session_folder) -> Path:
    """The folder of the finished tiny alignment experiment: world, pretrain, sft, reward,
    ppo, ppo-ptx, evaluate."""
    root, done = session_folder / "chain", session_folder / "chain.done"
    with (session_folder / "chain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
        if not done.exists():
            with pytest.MonkeyPatch.context() as monkeypatch:
                stages.use_devices(monkeypatch, 1)
                experiment.run_experiment(f"{stages.CHAIN}:tiny", root, report_only=False)
            done.touch()
    return root
