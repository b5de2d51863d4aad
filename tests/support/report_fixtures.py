"""Fixtures of the report's tests: a plugin (`pytest_plugins`), so that the logs are written
once per session."""

import pytest
from tests.support import report_logs

from instructax import report
from instructax.report.judging import judge_experiment
from instructax.report.results import load_experiment


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The folder of a synthetic experiment with three sizes."""
    return report_logs.write_family(tmp_path_factory.mktemp("logs") / "family")


@pytest.fixture(scope="session")
def judged(family):
    """The judged family."""
    return judge_experiment(load_experiment(family))


@pytest.fixture(scope="session")
def page(family, tmp_path_factory):
    """The path of the family's page."""
    return report.write_report([family], tmp_path_factory.mktemp("report"))
