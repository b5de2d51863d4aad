"""Fixtures for the stage tests. A pytest plugin, so that the chain of runs is computed once
per session."""

import fcntl
import os
from pathlib import Path

import pytest
from tests.support import stages

from instructax import experiment


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """A folder shared by all processes of the test session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def one_device(monkeypatch) -> None:
    stages.use_devices(monkeypatch, 1)


@pytest.fixture(scope="session")
def chain(session_folder) -> Path:
    """The folder of the finished tiny alignment experiment.

    Its runs are world, pretrain, sft, reward, ppo, ppo-ptx and evaluate.
    """
    root = session_folder / "chain"
    done = session_folder / "chain.done"
    with (session_folder / "chain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be computing it
        if not done.exists():
            with pytest.MonkeyPatch.context() as monkeypatch:
                stages.use_devices(monkeypatch, 1)
                experiment.run_experiment(f"{stages.CHAIN}:tiny", root, report_only=False)
            done.touch()
    return root
