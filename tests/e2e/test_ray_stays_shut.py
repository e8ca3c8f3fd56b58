"""Ray's own ports, in a cluster with its defaults: who has no token, or another one, gets nothing from any of them.

Guards against a Ray that serves dashboard, jobs, agents, client, state or metrics to whoever reaches this machine's
loopback: a page in a browser, another user, a container with the host's network.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from serving import Cluster, alive, descendants, start_cluster, stop_cluster

DIPTYCH = Path(sys.executable).with_name("diptych")

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROUTES = """
/ /api/version /api/jobs/ /api/jobs/x/logs /api/job_agent/jobs/ /api/serve/applications/ /api/cluster_status
/api/v0/nodes /api/v0/actors /api/actors/kill /nodes?view=summary /logical/actors /api/packages/gcs/x
/api/authentication_mode /api/authenticate /worker/traceback?pid=1 /memory_profile?pid=1 /logs /metrics /static/x
/-/routes /-/healthz /api/healthz /api/local_raylet_healthz /log_proxy?url=http://127.0.0.1/ /events /timezone
""".split()
VERBS = ("GET", "POST", "PUT", "DELETE", "OPTIONS")
SHOWN = {
    "nothing": "",
    "another token": f"authorization: Bearer {'0' * 64}\r\n",
    "its header": f"x-ray-authorization: Bearer {'0' * 64}\r\n",
    "a page": "origin: http://evil.test\r\nsec-fetch-mode: cors\r\nuser-agent: Mozilla/5.0\r\n",
}
# Serve's proxy tells its applications' prefixes; nothing turns that off.
PREFIXES = "/-/routes"
# Liveness, which says nothing but that somebody is there.
OPEN = (PREFIXES, "/api/healthz", "/api/local_raylet_healthz", "/-/healthz", "/api/authentication_mode", "/api/version")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shut")
    config = {"models": {"echo": {"source": "echo", "kv": {"memory_mib": 32}}}, "data_dir": str(folder / "data")}
    file = folder / "diptych.yaml"
    file.write_text(yaml.safe_dump(config))
    # So that the API, which Ray Serve's proxy forwards to, asks for one.
    made = [DIPTYCH, "keys", "create", "ops", "--scope", "admin", "--config", str(file)]
    subprocess.run(made, capture_output=True, timeout=120, check=True)
    running = start_cluster(folder, "--config", str(file))
    yield running
    running.tree |= descendants(running.process.pid)
    assert stop_cluster(running) == 0, running.printed()
    assert not alive(running.tree)


def ports_of(cluster: Cluster) -> dict[int, str]:
    """All TCP ports of the cluster but the API's, with who listens."""
    found: dict[int, str] = {}
    for pid in descendants(cluster.process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.port] = f"{process.name()} {' '.join(process.cmdline())[:60]}"
    del found[int(cluster.url.rpartition(":")[2])]
    return found


def said(port: int, verb: str, route: str, *, host: str, more: str) -> bytes:
    """What comes back; at most its first 64 KiB."""
    asked = f"{verb} {route} HTTP/1.1\r\nhost: {host}\r\n{more}content-length: 0\r\nconnection: close\r\n\r\n"
    found = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as sock:
        sock.sendall(asked.encode())
        while len(found) < 1 << 16 and (piece := sock.recv(1 << 14)):
            found += piece
    return found


def test_no_route_and_no_verb_of_any_port_answers_a_stranger(own: Cluster) -> None:
    """S05: 401, 403, nothing there, or no HTTP at all."""
    ports = ports_of(own)
    assert ports, "Ray's ports are seen"
    talking = [port for port in ports if said(port, "GET", "/", host="127.0.0.1", more="").startswith(b"HTTP/1")]
    opened = []
    for port, route, verb in itertools.product(talking, ROUTES, VERBS):
        for shown, host in zip(SHOWN, ("127.0.0.1", "localhost", "evil.test", "evil.test"), strict=True):
            status = said(port, verb, route, host=host, more=SHOWN[shown])[9:12]
            if status.startswith((b"2", b"3")) and route not in OPEN:
                opened.append(f"{ports[port]}: {verb} {route} with {shown} gets {status.decode()}")
            if route == PREFIXES and status.startswith(b"2"):
                assert len(said(port, verb, route, host=host, more=SHOWN[shown]).partition(b"\r\n\r\n")[2]) < 64
    assert opened == [], "\n".join(opened)


ENTER = """
import sys, ray
ray.init(sys.argv[1], configure_logging=False, log_to_driver=False)
print("INSIDE", ray.cluster_resources())
"""


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["no token", "another token"])
def test_no_driver_joins_without_the_token(own: Cluster, token: str, tmp_path: Path) -> None:
    """S05: the head itself, and its client's port."""
    places = [line for line in own.printed().splitlines() if "ray://" in line]
    (head,) = {f"127.0.0.1:{port}" for port, who in ports_of(own).items() if who.startswith("gcs_server")} or {
        "127.0.0.1:1"
    }
    clients = [f"ray://127.0.0.1:{port}" for port, who in ports_of(own).items() if "ray.util.client" in who]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    for place in {head, *clients, *(line.split()[-1] for line in places)}:
        done = subprocess.run(
            [sys.executable, "-c", ENTER, place],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode != 0, (place, done.stdout)
        assert "INSIDE" not in done.stdout
