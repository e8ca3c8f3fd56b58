"""`diptych serve` with routes: a provider that this test starts, and the cluster's own pool, behind one name.

Guards against a router replica that was never told of the routes, keys that are read in the wrong process, and a start
that finds a missing key only when the first request comes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ASK: dict[str, Any] = {"model": "both", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


class Provider(BaseHTTPRequestHandler):
    """Answers in OpenAI's format, while `is_well`, to who shows its key."""

    is_well = True
    seen: list[str]

    def do_POST(self) -> None:
        """One chat completion."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: Any = self.server
        server.seen.append(self.headers["authorization"])
        message = {"role": "assistant", "content": "from outside"}
        body = {
            "id": "x",
            "object": "chat.completion",
            "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
        data = json.dumps(body if server.is_well else {"error": {"message": "down"}}).encode()
        self.send_response(200 if server.is_well else 503)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def provider() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.is_well, server.seen = True, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def config(provider: ThreadingHTTPServer, folder: Path) -> Path:
    file = folder / "diptych.yaml"
    url = f"http://127.0.0.1:{provider.server_address[1]}/v1"
    tree = {
        "models": {"echo": {"source": "echo", "kv": {"memory_mib": 32}}},
        "data_dir": str(folder / "data"),
        "providers": {"near": {"base_url": url, "api_key": f"file:{folder / 'key'}"}},
        "gateway": {
            "direct": True,
            "routes": {"both": {"targets": ["near/m", "pool/echo"], "strategy": "priority", "retries": 1}},
        },
    }
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def cluster(provider: ThreadingHTTPServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("routes")
    (folder / "key").touch(mode=0o600)
    (folder / "key").write_text("secret-of-the-provider")
    running = start_cluster(folder, "--config", str(config(provider, folder)))
    yield running
    running.tree |= descendants(running.process.pid)
    assert stop_cluster(running) == 0, running.printed()
    assert not alive(running.tree)


def test_a_route_leads_outside_and_to_the_own_pool(cluster: Cluster, provider: Any) -> None:
    told = httpx2.post(f"{cluster.url}/v1/chat/completions", json=ASK, timeout=60)
    assert told.json()["choices"][0]["message"]["content"] == "from outside"
    assert told.headers["x-route-target"] == "near/m"
    assert provider.seen[-1] == "Bearer secret-of-the-provider"
    provider.is_well = False
    told = httpx2.post(f"{cluster.url}/v1/chat/completions", json=ASK, timeout=60)
    assert (told.status_code, told.headers["x-route-target"]) == (200, "pool/echo")
    provider.is_well = True
    direct = httpx2.post(f"{cluster.url}/v1/chat/completions", json={**ASK, "model": "near/other"}, timeout=60)
    assert direct.headers["x-route-target"] == "near/other"
    own = httpx2.post(f"{cluster.url}/v1/chat/completions", json={**ASK, "model": "echo"}, timeout=60)
    assert "x-route-target" not in own.headers
    assert "both" in [card["id"] for card in httpx2.get(f"{cluster.url}/v1/models", timeout=60).json()["data"]]
    metrics = httpx2.get(f"{cluster.url}/metrics", timeout=60).text
    assert 'diptych_gateway_requests_total{outcome="answered",route="both"}' in metrics


def test_a_dry_run_and_the_board_of_the_routers(cluster: Cluster) -> None:
    """The replica reaches the actor through which routers meet, and explains what it would do."""
    told = httpx2.post(f"{cluster.url}/v1/route/explain", json=ASK, timeout=60).json()
    assert [one["target"] for one in told["candidates"]] == ["near/m", "pool/echo"]
    reported = 'diptych_gateway_state_exchanges_total{outcome="ok"}'
    deadline = time.monotonic() + 60
    while reported not in httpx2.get(f"{cluster.url}/metrics", timeout=60).text:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_missing_key_stops_the_start(provider: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Before Ray starts, with the place of the key."""
    command = [Path(sys.executable).with_name("diptych"), "serve", "--config", config(provider, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "near" in done.stderr
    assert str(tmp_path / "key") in done.stderr
