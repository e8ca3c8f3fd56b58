"""Keys of a served cluster: made, limited and revoked by the command beside it, at every router it has had."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

from diptych.cluster.keys import LOOK_S

DIPTYCH = Path(sys.executable).with_name("diptych")
ASK: dict[str, Any] = {"model": "echo", "prompt": "hello there", "max_tokens": 2}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def command(*words: str) -> str:
    """What it printed; its keys go to its standard output alone."""
    done = subprocess.run([DIPTYCH, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    folder = tmp_path_factory.mktemp("keys")
    config = {"models": {"echo": {"source": "echo", "kv": {"memory_mib": 32}}}, "data_dir": str(folder / "data")}
    file = folder / "diptych.yaml"
    file.write_text(yaml.safe_dump(config))
    running = start_cluster(folder, "--config", str(file))
    yield running, str(file)
    running.tree |= descendants(running.process.pid)
    assert stop_cluster(running) == 0, running.printed()
    assert not alive(running.tree)


def heard_elsewhere(cluster: Cluster) -> list[str]:
    """Sockets of the cluster that other machines can reach, by process."""
    found = []
    for pid in descendants(cluster.process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and not one.raddr):
                    address = ipaddress.ip_address(one.laddr.ip)
                    if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                        found.append(f"{process.name()} {one.laddr.ip}:{one.laddr.port}")
    return found


def test_with_its_defaults_it_listens_on_loopback_alone(own: tuple[Cluster, str]) -> None:
    """Ray Serve opens a port on all addresses in each replica; what Ray opens next is seen here."""
    cluster, _ = own
    ports = {
        one.laddr.port
        for pid in descendants(cluster.process.pid)
        for one in psutil.Process(pid).net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    }
    assert int(cluster.url.rpartition(":")[2]) in ports, "sockets are seen"
    assert heard_elsewhere(cluster) == []


def test_a_key_s_life(own: tuple[Cluster, str]) -> None:
    cluster, file = own
    with httpx2.Client(base_url=cluster.url, timeout=60) as http:

        def status(key: str = "") -> int:
            headers = {"x-api-key": key} if key else {}
            return http.post("/v1/completions", json=ASK, headers=headers).status_code

        assert status() == 200, "nobody is asked for a key while there is none"
        key = command("keys", "create", "team-a", "--config", file)
        time.sleep(LOOK_S)
        assert (status(), status(key)) == (401, 200)
        few = command("keys", "create", "team-b", "--requests-per-minute", "2", "--config", file)
        time.sleep(LOOK_S)
        assert [status(few) for _ in range(4)] == [200, 200, 429, 429]

        # Another router, and one after a crash, ask as the first did.
        admin = command("keys", "create", "ops", "--scope", "admin", "--config", file)
        time.sleep(LOOK_S)
        (router,) = http.get("/info", headers={"x-api-key": admin}).json()["routers"]
        subprocess.run(["kill", "-9", str(router["pid"])], check=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if http.get("/ready").status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
        assert (status(), status(key), status(admin)) == (401, 200, 403)
        assert heard_elsewhere(cluster) == [], "of the next router neither"
        for page in ("/metrics", "/info"):
            asked = [http.get(page, headers={"x-api-key": one}).status_code for one in ("", key, admin)]
            assert asked == [401, 403, 200]

        listed = json.loads(command("keys", "list", "--json", "--config", file))
        (mine,) = [one["id"] for one in listed if one["tenant"] == "team-a"]
        command("keys", "revoke", mine, "--config", file)
        revoked_at = time.monotonic()
        while (began := time.monotonic()) < revoked_at + 3 * LOOK_S:
            opened = status(key) == 200
            assert not (opened and began >= revoked_at + LOOK_S)
        assert status(key) in (401, 429), "429 after a hundred attempts"
    log = cluster.printed()
    assert not [one for one in (key, few, admin) if one in log]


def test_an_api_that_others_can_reach_wants_a_key_first(tmp_path: Path) -> None:
    place = ["--set", f"data_dir={tmp_path}"]
    started = [DIPTYCH, "serve", "--set", "router.host=0.0.0.0", "--set", "router.port=0", *place]
    done = subprocess.run(started, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "router.host 0.0.0.0 is reachable from other machines, and no key opens the API" in done.stderr
    assert "diptych keys create TENANT" in done.stderr
