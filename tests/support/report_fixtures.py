"""Fixtures of the tests of the report; a plugin (`pytest_plugins`), so that a session makes
its logs once."""

import pytest
from tests.support import report_logs

from instructax import report
from instructax.report.judging import read
from instructax.report.results import load


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The folder of a synthetic family."""
    return report_logs.write_family(tmp_path_factory.mktemp("logs") / "family")


@pytest.fixture(scope="session")
def reading(family):
    """The family, judged."""
    return read(load(family))


@pytest.fixture(scope="session")
def page(family, tmp_path_factory):
    """The family's page."""
    return report.write([family], tmp_path_factory.mktemp("report"))
