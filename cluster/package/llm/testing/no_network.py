"""The plugin for pytest under its published name: `-p diptych.llm.testing.no_network`."""

from diptych.agents.llm.testing.no_network import pytest_sessionfinish, pytest_sessionstart

__all__ = ["pytest_sessionfinish", "pytest_sessionstart"]
