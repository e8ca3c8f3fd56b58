"""Certificates by the recipe of the documentation, and a clear word where there can be no namespaces."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fences import DOCS, examples
from namespaces import why_not


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.crt, and .crt and .key of router, prefill and decode."""
    return _certify(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names from an authority that nobody here believes."""
    return _certify(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def expired(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with certificates whose last day was yesterday."""
    return _certify(tmp_path_factory.mktemp("expired"), days=-1)


def _certify(folder: Path, days: int = 365) -> Path:
    (found,) = (e.code for e in examples(DOCS / "concepts" / "security.md") if e.code.startswith("umask"))
    recipe = found.replace("-days 365 ", f"-days {days} ")
    subprocess.run(["bash", "-ec", recipe], cwd=folder, check=True, capture_output=True)
    return folder / "tls"


@pytest.fixture
def namespaces() -> None:
    """Skips where this machine cannot make them."""
    if words := why_not():
        pytest.skip(words)
