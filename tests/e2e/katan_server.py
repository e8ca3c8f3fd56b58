"""llm-katan, a server of other makers that speaks the formats of five providers, as a process beside a test.

It checks each format's key, in its header, and refuses bodies that lack a field. `make test-slow` puts it where it is
looked for; without it a test is skipped.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

WAIT_S = 60.0
KATAN = Path(__file__).resolve().parents[2] / "build" / "llm-katan"
# Its own; not secrets.
KEYS = {
    "OPENAI": "llm-katan-openai-key",
    "ANTHROPIC": "llm-katan-anthropic-key",
    "GOOGLE": "llm-katan-vertexai-key",
    "AZURE": "llm-katan-azure-key",
    "BEDROCK": "llm-katan-bedrock-key",
}
# Where each format begins at it: base URL behind the address, codec, how the key is shown.
FORMATS = {
    "openai": ("/v1", "openai.chat", "bearer", "OPENAI"),
    "azure": ("/openai/v1", "openai.chat", "api-key", "AZURE"),
    "anthropic": ("/v1", "anthropic.messages", "x-api-key", "ANTHROPIC"),
    "gemini": ("/v1beta", "gemini.generate", "query", "GOOGLE"),
    "vertex": ("/v1/projects/p/locations/l/publishers/google", "gemini.generate", "bearer", "GOOGLE"),
    "bedrock": ("", "bedrock.converse", "bearer", "BEDROCK"),
}
# What it knows of OpenAI's format is older than the new name.
OLDER = {"openai.chat": {"rename": {"max_completion_tokens": "max_tokens"}}}


@contextlib.contextmanager
def llm_katan(folder: Path, *options: str) -> Iterator[str]:
    """Its address; nothing of it is left in the home folder."""
    if not KATAN.is_dir():
        pytest.skip("llm-katan is not in build/llm-katan: make test-slow puts it there")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", "echo-1", "--backend", "echo", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--providers", "openai,anthropic,vertexai,bedrock,azure_openai", "--validate-keys"]
    words += ["--stats-file", str(folder / "stats.json"), "--disable-dashboard", *options]
    with subprocess.Popen(
        [sys.executable, "-m", "llm_katan.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(KATAN)},
    ) as process:
        try:
            _until_healthy(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _until_healthy(process: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        assert process.poll() is None, "llm-katan has ended"
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{address}/health", timeout=1.0).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("llm-katan does not answer")
