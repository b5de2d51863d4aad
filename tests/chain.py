"""Fixtures of the tests of the stages; a plugin (`pytest_plugins`), so that a session makes the chain of runs once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import stages
from instructax import experiment


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory) -> Path:
    """Where this session's compiled programs are kept."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def quick_compiles(compiled_folder) -> Iterator[None]:
    with stages.quickly_compiled(compiled_folder):
        yield


@pytest.fixture
def one_device(monkeypatch) -> None:
    stages.use_devices(monkeypatch, 1)


@pytest.fixture(scope="session")
def chain(tmp_path_factory, compiled_folder) -> Path:
    """The folder of the finished tiny alignment experiment: world, pretrain, sft, reward, ppo, ppo-ptx, evaluate."""
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as monkeypatch, stages.quickly_compiled(compiled_folder):
        stages.use_devices(monkeypatch, 1)
        experiment.run_experiment(f"{stages.CHAIN}:tiny", root, report_only=False)
    return root
