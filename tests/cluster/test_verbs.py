from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from diptych.cluster.cli import app
from diptych.cluster.inprocess import post_json
from diptych.cluster.scale import run_restart, run_scale
from diptych.cluster.status import render, run_status
from diptych.protos.errors import StartupError
from diptych.protos.types import GENERATING, Role

INFO = {
    "models": [{"id": "tiny"}],
    "engines": [
        {
            "engine": "prefill-0",
            "model": "tiny",
            "connected": True,
            "draining": False,
            "pid": 41,
            "running": 2,
            "waiting": 3,
            "steps": 77,
            "blocks": {"total": 10, "free": 5, "cached": 4, "used": 1},
        }
    ],
    "routers": [{"id": "router-a", "pid": 43, "in_flight": {"tiny": 5}, "waiting": 6}],
    "degraded": ["slow"],
}


def test_status_shows_engines_blocks_and_queues() -> None:
    text = render("http://u", INFO)
    assert "prefill-0  tiny   connected  41   2        3        1/4/5                    77" in text
    assert "router-a (pid 43): 5 in work, 6 waiting" in text
    assert "degraded: slow" in text


def test_status_tells_of_engines_that_drain_and_that_are_lost() -> None:
    engine = INFO["engines"][0]  # type: ignore[index]
    assert "draining" in render("http://u", INFO | {"engines": [engine | {"draining": True}]})
    assert "lost" in render("http://u", INFO | {"engines": [engine | {"connected": False}]})


def test_status_without_a_cluster_is_a_sentence_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.cluster.config.default_run_dir", lambda: Path("/tmp/none"))
    monkeypatch.setattr("diptych.cluster.control.connect.ray_address", lambda: None)
    assert run_status(None, ["run_dir=/tmp/diptych-none"], None) == 1
    assert "no cluster of yours runs here (looked in /tmp/diptych-none)" in capsys.readouterr().err
    assert run_status(None, [], "http://127.0.0.1:1") == 1
    assert "does not answer" in capsys.readouterr().err


def test_scale_looks_in_the_run_dir_that_is_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.cluster.control.connect.ray_address", lambda: None)
    assert run_scale("m", {Role.DECODE: 2}, overrides=["run_dir=/tmp/diptych-none"]) == 1
    told = capsys.readouterr().err
    assert "(looked in /tmp/diptych-none)" in told
    assert "--config" in told


def test_the_router_is_restarted_for_all_models_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    for model, role in (("tiny", None), (None, Role.DECODE)):
        assert run_restart(model, role, router=True) == 1
        assert "--router is the router of all models and roles" in capsys.readouterr().err


def test_the_verbs_and_options_of_the_command_are_these() -> None:
    """The command line is an interface: a change here is a change for users."""
    import typer.main

    group = typer.main.get_command(app)
    verbs = {name: {o for p in verb.params for o in p.opts} for name, verb in group.commands.items()}  # type: ignore[attr-defined]
    where = {"--config", "--set"}
    assert verbs == {
        "serve": where | {"--model", "--port", "--address", "--kv-gib"},
        "status": where | {"--url"},
        "scale": where | {"model", "--prefill", "--decode", "--embed", "--url", "--address"},
        "restart": where | {"model", "--role", "--router", "--url", "--address"},
        "apply": where | {"--url"},
        "role": where | {"engine", "role", "--url", "--address"},
        "models": where | {"--url"},
        "usage": where | {"--by", "--since", "--until", "--tenant", "--key", "--json", "--url"},
        "doctor": where | {"--json"},
        "batch": set(),  # their own verbs are below
        "keys": set(),
        "providers": set(),
        "route": set(),
        "bench": set(),
        "chat": where | {"--url", "--model", "--system", "--max-tokens", "--temperature"},
        "run": {"target", "--arg", "--model", "--stream", "--json"},
    }
    of_keys = {name: {o for p in verb.params for o in p.opts} for name, verb in group.commands["keys"].commands.items()}  # type: ignore[attr-defined]
    limits = {"--expires", "--requests-per-minute", "--concurrency"}
    assert of_keys == {
        "create": where | limits | {"tenant", "--name", "--scope", "--file", "--may-override", "--tag"},
        "list": where | {"--tenant", "--json"},
        "revoke": where | {"key_id"},
    }
    others = {
        group_name: {name: {o for p in verb.params for o in p.opts} for name, verb in verbs.commands.items()}  # type: ignore[attr-defined]
        for group_name, verbs in group.commands.items()
        if group_name in ("batch", "providers", "route")
    }
    who = {"--tenant", "--key", "--session", "--tag", "--header"}
    job = {"job", "target"}
    assert others == {
        "batch": {
            "submit": {"target", "items", "--id", "--model", "--window", "--state-file", "--wait", "--poll"},
            "status": job | {"--json"},
            "wait": job | {"--poll"},
            "cancel": job,
            "results": job,
            "list": {"prefix", "target", "--limit", "--json"},
        },
        "providers": {"list": where | {"--json"}, "test": where | {"target", "--timeout", "--json"}},
        "route": {"explain": where | who | {"--model", "--message", "--request", "--json", "--url"}},
    }
    measures = {
        name: {o for p in verb.params for o in p.opts} for name, verb in group.commands["bench"].commands.items()
    }  # type: ignore[attr-defined]
    both = where | {"--model", "--prompts", "--output", "--json"}
    assert measures == {
        "offline": both
        | {"--random-weights", "--layout", "--workload", "--repeats", "--through", "--profile", "--path", "--kv-gib"},
        "serve": both
        | {"--url", "--requests", "--rate", "--input", "--seed", "--vocab", "--concurrency", "--timeout", "--clients"},
        "kernels": {"--op", "--tune", "--json"},
    }


def test_serve_goes_on_when_nobody_reads_its_output() -> None:
    """Or Ctrl-C in `diptych serve | tee log`, which ends tee first, would end the cluster without order."""
    reader, writer = os.pipe()
    os.close(reader)
    program = "from diptych.cluster.serve import say; say('draining'); say('stopped'); raise SystemExit(7)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, b"")


async def test_a_handle_call_is_an_ordinary_request_to_the_app() -> None:
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"got": await request.json(), "type": request.headers["content-type"]}, 201)

    starlette = Starlette(routes=[Route("/v1/echo", echo, methods=["POST"])])
    status, answer = await post_json(starlette, "/v1/echo", json.dumps({"a": [1, "x" * 5000]}).encode())
    assert status == 201
    assert answer == {"got": {"a": [1, "x" * 5000]}, "type": "application/json"}


def test_errors_keep_their_message_through_pickle() -> None:
    """They cross Ray on the way from an engine to the terminal."""
    import pickle

    error = pickle.loads(pickle.dumps(StartupError("a sentence", detail="d")))
    assert (str(error), error.detail) == ("a sentence", "d")


def test_kv_gib_of_serve_is_every_engines_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    served = []
    monkeypatch.setattr("diptych.cluster.serve.run_serve", lambda config, began: served.append(config) or 0)
    done = CliRunner().invoke(app, ["serve", "--kv-gib", "2.5", "--set", "models.m.decode.kv={memory_mib: 3}"])
    assert done.exit_code == 0, done.output
    [config] = served
    assert {model.pool_kv(role).memory_mib for model in config.models.values() for role in GENERATING} == {2560}
    assert CliRunner().invoke(app, ["serve", "--kv-gib", "0"]).exit_code == 2
