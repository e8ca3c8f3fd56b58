from __future__ import annotations

import subprocess
import sys

import pytest

ROUTER = (
    "diptych.cluster.entry",
    "diptych.cluster.api.app",
    "diptych.cluster.api.listener",
    "diptych.cluster.api.served",
    "diptych.cluster.control.directory",
    "diptych.cluster.router.router",
)
COMMAND = ("diptych.cluster.cli", "diptych.cluster.serve", "diptych.cluster.status", "diptych.cluster.control.engines")


def loaded_after(*modules: str) -> set[str]:
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    return set(done.stdout.split())


def test_the_router_process_never_imports_torch() -> None:
    """torch costs 300 MB and seconds; the router only needs tokenizers and jinja2."""
    loaded = loaded_after(*ROUTER)
    assert "tokenizers" in loaded
    assert not {"torch", "transformers", "triton"} & loaded


def test_the_command_never_imports_torch() -> None:
    assert not {"torch", "transformers"} & loaded_after(*COMMAND)


@pytest.mark.parametrize("module", ["diptych.cluster.cli", "diptych.cluster.config"])
def test_the_command_line_itself_loads_nothing_heavy(module: str) -> None:
    assert not {"torch", "ray", "grpc", "starlette", "transformers"} & loaded_after(module)
