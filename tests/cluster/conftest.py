"""Certificates, made by the recipe of the documentation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fences import DOCS, examples


@pytest.fixture(scope="session")
def recipe() -> str:
    """The commands on the page, as a reader would copy them."""
    (found,) = (e.code for e in examples(DOCS / "concepts" / "security.md") if e.code.startswith("umask"))
    return found


@pytest.fixture(scope="session")
def authority(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.crt, and .crt and .key of router, prefill and decode."""
    return certify(recipe, tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names from an authority that nobody here believes."""
    return certify(recipe, tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def expired(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with certificates whose last day was yesterday."""
    return certify(recipe.replace("-days 365 ", "-days -1 "), tmp_path_factory.mktemp("expired"))


def certify(recipe: str, folder: Path) -> Path:
    subprocess.run(["bash", "-ec", recipe], cwd=folder, check=True, capture_output=True)
    return folder / "tls"
