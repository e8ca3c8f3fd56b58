"""The scripts of bench/, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gpu() -> ModuleType:
    return _script("gpu")


@pytest.fixture(scope="session")
def table() -> ModuleType:
    return _script("table")


@pytest.fixture(scope="session")
def gateway() -> ModuleType:
    return _script("gateway")


@pytest.fixture(scope="session")
def engine() -> ModuleType:
    return _part("one_engine")


@pytest.fixture(scope="session")
def schemas() -> ModuleType:
    return _part("structured_schemas")


@pytest.fixture(scope="session")
def answers(engine: ModuleType, schemas: ModuleType) -> ModuleType:
    return _script("structured_answers")


@pytest.fixture(scope="session")
def costs(engine: ModuleType) -> ModuleType:
    return _script("mask_cost")


@pytest.fixture(scope="session")
def kills() -> ModuleType:
    return _script("kills")


def _part(name: str) -> ModuleType:
    """What scripts import by its plain name."""
    module = sys.modules[name] = _script(name)
    return module
