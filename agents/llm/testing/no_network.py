"""For pytest: `addopts = -p diptych.llm.testing.no_network` keeps a whole run from reaching models.

Written without pytest, which is no dependency: its hooks are plain functions. For one test use forbid_network itself.
"""

from __future__ import annotations

from contextlib import ExitStack

from ..network import forbid_network

_held = ExitStack()


def pytest_sessionstart() -> None:
    """Before anything is collected: a module that calls a model where it is imported is told, too."""
    _held.enter_context(forbid_network())


def pytest_sessionfinish() -> None:
    """The network is as it was."""
    _held.close()
