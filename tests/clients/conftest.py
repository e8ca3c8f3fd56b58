"""One small cluster of echo engines for all clients: real engines and grammars, the least answer they allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_host import hosted

# Before a client is imported: none reports what it does to its makers.
os.environ.update(OPENAI_AGENTS_DISABLE_TRACING="1", LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false")


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some clients leave connections to the collector of garbage, which tells of them in whichever test runs then."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """What a client is told, besides any key: the address of the API."""
    with hosted() as cluster:
        yield cluster.listener.url + "/v1"
