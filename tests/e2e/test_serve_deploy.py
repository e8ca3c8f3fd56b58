"""On a Ray cluster that exists: `serve build` and `serve deploy` bring manager, engines and router up, and take them
down again. The Ray is this test's own child.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import alive, descendants, free_port

from diptych.cluster.control.host import free_ports
from diptych.cluster.control.launch import end_tree, ray_environment, spawn

PATIENCE_S = 240
DIPTYCH = (sys.executable, "-c", "from diptych.cluster.cli import main; main()")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_deploy.yaml"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Site:
    """A Ray head, its address, that of its dashboard (which `serve deploy` speaks to) and a folder."""

    head: subprocess.Popen[bytes]
    address: str
    dashboard: str
    folder: Path
    environment: dict[str, str]

    def serve(self, *words: str, check: bool = True) -> str:
        """Ray's `serve` command."""
        done = subprocess.run(
            [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=self.environment | {"RAY_DASHBOARD_ADDRESS": self.dashboard, "RAY_ADDRESS": self.address},
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def diptych(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Our command, where Ray's commands find this Ray and the user's other clusters are not found."""
        own = self.folder / "none"
        own.mkdir(exist_ok=True)
        return subprocess.run(
            [*DIPTYCH, *words],
            capture_output=True,
            env=self.environment | {"RAY_ADDRESS": self.address, "TMPDIR": str(own)},
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def app(self) -> dict[str, Any]:
        text = self.serve("status")
        return dict(yaml.safe_load(text[text.index("proxies:") :])["applications"].get("diptych", {}))

    def engines(self) -> list[str]:
        """Command lines of engine and manager processes of this Ray."""
        return [line for line in alive(descendants(self.head.pid)) if re.search("EngineActor|PoolManager", line)]


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:
        folder = Path(name)
        dashboard, client, agent = free_ports(3)
        options = {
            "port": 0,
            "temp-dir": folder / "ray",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "object-store-memory": 96 << 20,
        }
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text("0" * 64)
        environment = os.environ | ray_environment(token)
        start = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
        head = spawn(
            [*start, *(f"--{name}={value}" for name, value in options.items())],
            folder / "ray.log",
            environment,
        )
        try:
            address = folder / "ray" / "ray_current_cluster"
            until(lambda: address.exists() and address.read_text().strip(), (folder / "ray.log").read_text)
            made = Site(head, address.read_text().strip(), f"http://127.0.0.1:{dashboard}", folder, environment)
            yield made
        finally:
            end_tree(head)


def until(condition: Callable[[], object], message: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.5)


def ask(port: int, model: str = "smollm2-135m-instruct") -> dict[str, Any]:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return dict(json.load(reply))


def deploy(site: Site, config: dict[str, Any]) -> None:
    file = site.folder / "deploy.yaml"
    file.write_text(yaml.safe_dump(config))
    site.serve("deploy", str(file))


def test_the_example_deploys_answers_scales_and_goes(site: Site) -> None:
    config = yaml.safe_load(EXAMPLE.read_text())
    port = config["http_options"]["port"] = free_port()
    [app] = config["applications"]
    app["args"]["run_dir"] = str(site.folder / "run")
    deploy(site, config)
    until(lambda: site.app().get("status") == "RUNNING", lambda: str(site.app()))
    assert ask(port)["usage"]["completion_tokens"] == 8
    assert len(site.engines()) == 3
    status = site.diptych("status")
    assert "prefill-0" in status.stdout, status.stderr
    assert "router-" in status.stdout
    scaled = site.diptych("scale", "smollm2-135m-instruct", "--prefill", "0", "--address", site.address)
    assert "prefill-0 has finished its requests and ended" in scaled.stdout, scaled.stderr
    grown = site.diptych("scale", "smollm2-135m-instruct", "--prefill", "1")
    assert "prefill-0 is ready" in grown.stdout, grown.stderr
    assert ask(port)["usage"]["completion_tokens"] == 8
    site.serve("shutdown", "-y")
    until(lambda: not site.engines(), lambda: str(site.engines()))
    with pytest.raises(urllib.error.URLError):
        ask(port)
    gone = site.diptych("status")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "no Serve app diptych" in gone.stderr
    assert gone.stderr.count("\n") == 1, gone.stderr


class Asking(threading.Thread):
    """A request after the other, each on a connection of its own."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.wrong, self.over = url, list[str](), threading.Event()
        self.answers = 0

    def run(self) -> None:
        body = json.dumps({"model": "echo", "prompt": [1, 2, 3], "max_tokens": 20}).encode()
        while not self.over.is_set():
            request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                    reply.read()
            except OSError as exc:
                self.wrong.append(repr(exc))
            self.answers += 1


def replicas(site: Site, name: str) -> set[int]:
    lines = alive(descendants(site.head.pid))
    return {int(line.split()[0]) for line in lines if f"ServeReplica:diptych:{name}" in line}


def test_the_router_of_an_app_is_replaced_without_a_refused_connection_also_after_the_death_of_its_holder(
    site: Site,
) -> None:
    config = yaml.safe_load(EXAMPLE.read_text())
    config["http_options"]["port"] = free_port()
    [app] = config["applications"]
    echo = {"source": "echo", "kv": {"memory_mib": 32}}
    app["args"] = {"run_dir": str(site.folder / "run"), "models": {"echo": echo}}
    deploy(site, config)
    until(lambda: site.app().get("status") == "RUNNING", lambda: str(site.app()))
    url = site.diptych("status").stdout.split(": ")[0]
    asking = Asking(url)
    asking.start()

    def handed_over_from(old: int) -> None:
        until(lambda: not alive({old}), lambda: "the old replica does not end")
        before = asking.answers
        until(lambda: asking.answers > before, lambda: f"no answers any more: {asking.wrong}")
        assert asking.wrong == []

    [router] = replicas(site, "Router")
    os.kill(router, signal.SIGTERM)
    handed_over_from(router)
    [pools] = replicas(site, "Pools")
    os.kill(pools, signal.SIGKILL)
    until(lambda: len(found := replicas(site, "Pools")) == 1 and found != {pools}, lambda: "no other Pools")
    until(lambda: site.app().get("status") == "RUNNING", lambda: str(site.app()))
    [router] = replicas(site, "Router")
    done = site.diptych("restart", "--router")
    assert f"before {router})" in done.stdout, done.stderr
    handed_over_from(router)
    assert site.diptych("status").stdout.split(": ")[0] == url
    [router] = replicas(site, "Router")
    app["args"]["router"] = {"default_max_tokens": 10}
    deploy(site, config)
    until(lambda: not alive({router}), lambda: "the old replica does not end")
    until(lambda: site.app().get("status") == "RUNNING", lambda: str(site.app()))
    assert site.diptych("status").stdout.split(": ")[0] == url
    # The engines of the old Pools end before those of the new one are there; connections are taken all along.
    assert [what for what in asking.wrong if "HTTPError 503" not in what] == []
    assert ask(config["http_options"]["port"], "echo")["usage"]["completion_tokens"] == 8
    asking.over.set()
    asking.join()
    site.serve("shutdown", "-y")
    until(lambda: not site.engines(), lambda: str(site.engines()))
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health", timeout=PATIENCE_S)


def test_what_serve_build_prints_deploys(site: Site) -> None:
    built = site.folder / "built.yaml"
    site.serve("build", "diptych.cluster.entry:app", "-o", str(built))
    config = yaml.safe_load(built.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    [app] = config["applications"]
    assert {deployment["name"] for deployment in app["deployments"]} == {"Router", "Pools"}
    app["name"] = "diptych"
    deploy(site, config)
    until(lambda: site.app().get("status") == "RUNNING", lambda: str(site.app()))
    assert ask(config["http_options"]["port"])["usage"]["completion_tokens"] == 8
    site.serve("shutdown", "-y")
    until(lambda: not site.engines(), lambda: str(site.engines()))


def test_a_wrong_configuration_fails_the_deployment_with_its_sentence(site: Site) -> None:
    config = yaml.safe_load(EXAMPLE.read_text())
    config["http_options"]["port"] = free_port()
    [app] = config["applications"]
    app["args"] = {"router": {"prot": 1}}
    deploy(site, config)
    until(lambda: site.app().get("status") == "DEPLOY_FAILED", lambda: str(site.app()))
    assert "router.prot is not a known key (did you mean port?)" in site.app()["message"]
    assert not site.engines()
