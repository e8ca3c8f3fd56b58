"""`diptych route explain`: by a file alone, and at a server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from diptych.cluster.api.testing import front_door
from diptych.cluster.cli import app
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, says

TREE: dict[str, Any] = {
    "models": {"echo": {}},
    "providers": {"groq": {}, "openai": {}},
    "gateway": {
        "rule_headers": ["x-app"],
        "routes": {
            "chat": {"targets": ["pool/echo", "groq/llama-3.3-70b-versatile"], "fallback": ["smart"]},
            "smart": {"targets": ["openai/gpt-4.1"]},
        },
        "rules": [
            {"name": "home", "when": {"tenant": "acme"}, "then": {"only": "pool/*"}},
            {"name": "web", "when": {"headers": {"x-app": "web"}}, "then": {"route": "smart"}},
            {"name": "eu", "when": {"tag": "eu"}, "then": {"refuse": "not from there"}},
        ],
    },
}


def explain(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["route", "explain", *arguments])


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GROQ_API_KEY", "secret-key")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "diptych.yaml").write_text(yaml.safe_dump(TREE))
    return str(tmp_path / "diptych.yaml")


def test_a_file_alone_says_where_and_why(file: str) -> None:
    """Whoever writes rules must see what they do before anything is started."""
    usual = explain("--config", file, "--model", "chat", "--message", "hi")
    assert usual.exit_code == 0, usual.output
    assert "home  does not hold  tenant is none, and it wants acme" in usual.output
    assert "set $OPENAI_API_KEY" in usual.output
    assert "secret-key" not in usual.output
    home = explain("--config", file, "--model", "chat", "--message", "hi", "--tenant", "acme", "--json")
    told = json.loads(home.output)
    assert (told["target"], told["rule"], len(told["candidates"])) == ("pool/echo", "home", 1)
    web = explain("--config", file, "--model", "chat", "--message", "hi", "--header", "x-app=web")
    assert web.output.startswith("chat -> smart, by the rule web: no target")
    no = explain("--config", file, "--model", "chat", "--message", "hi", "--tag", "eu")
    assert no.output.startswith("chat, by the rule eu: no target\n  refused: not from there")


def test_a_whole_request_and_its_mistakes(file: str, tmp_path: Path) -> None:
    """Every mistake is a sentence and the exit code 1."""
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}))
    told = json.loads(explain("--config", file, "--request", str(body), "--json").output)
    assert told["output_tokens"] == 5
    assert json.loads(explain("--config", file, "--request", str(body), "--model", "smart", "--json").output)[
        "group"
    ] == ("smart")
    for arguments, words in (
        (("--model", "chat"), "give --model and --message, or a whole request by --request FILE"),
        (("--request", str(tmp_path / "none")), "cannot read"),
        (("--request", file), "diptych.yaml: the body"),
        (("--model", "nobody", "--message", "hi"), "there is no route 'nobody'"),
        (("--model", "chat", "--message", "hi", "--header", "x-cache=yes"), "x-cache: 'yes' is none of"),
    ):
        done = explain("--config", file, *arguments)
        assert (done.exit_code, words in done.output) == (1, True), done.output


@pytest.fixture
def server() -> Iterator[str]:
    """A front door in a thread: the verb waits for its answer."""
    ready, url, loop = threading.Event(), [""], asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        read = GatewaySettings.model_validate({"routes": {"chat": {"targets": ["p/a"]}}})
        async with front_door(gateway=read, targets=[ScriptedTarget("p/a", [says("x")])]) as door:
            url[0] = door.listener.url
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20)
    yield url[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(20)
    loop.close()


def test_a_server_says_the_same(server: str) -> None:
    """The verb's table is made of the page's JSON, whoever asks."""
    done = explain("--url", server, "--model", "chat", "--message", "hi", "--tenant", "acme")
    assert (done.exit_code, done.output.split("\n")[:2]) == (0, ["chat: p/a", "  it is the only one that can"])
    missing = explain("--url", server, "--model", "nobody", "--message", "hi")
    assert (missing.exit_code, "there is no route nobody" in missing.output) == (1, True)
    nobody = explain("--url", "http://127.0.0.1:1", "--model", "chat", "--message", "hi")
    assert (nobody.exit_code, "does not answer" in nobody.output) == (1, True)
