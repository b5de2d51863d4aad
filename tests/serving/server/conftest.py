"""A policy and a client of its server, shared by all tests of this folder."""

import pytest
from tests.support import openai_server


@pytest.fixture(scope="session")
def policy():
    return openai_server.make_policy()


@pytest.fixture(scope="module")
def client(policy):
    pytest.importorskip("uvicorn")
    testclient = pytest.importorskip("starlette.testclient")
    from instructax.serving.server.app import make_app

    app = make_app(policy, "tiny", queue_limit=16)
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        yield client
