"""The small endpoints tell the truth about the router and its engines."""

from __future__ import annotations

import subprocess
import sys

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from diptych.cluster.api.testing import FrontDoor
from diptych.cluster.router.call import Loss
from diptych.cluster.router.rig import until

ASK = {"model": "echo", "prompt": "hello world, hello hello", "max_tokens": 9}


async def test_health_is_about_the_process_and_ready_about_the_engines(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    assert (await http.get("/ready")).json() == {"ready": True, "models": {"echo": {"prefill": 1, "decode": 1}}}
    door.directory.set([door.prefill.info])
    await until(lambda: not door.router.is_ready("echo"))
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 200
    response = await http.post("/v1/completions", json=ASK)
    assert response.status_code == 503
    assert "retry-after" in response.headers
    door.directory.set([door.prefill.info, door.decode.info])
    await until(lambda: door.router.is_ready("echo"))
    assert (await http.post("/v1/completions", json=ASK)).status_code == 200


async def test_models_lists_what_is_served(http: httpx2.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["echo"]
    assert listed["data"][0] == (await http.get("/v1/models/echo")).json()
    assert listed["data"][0]["max_model_len"] == 2048


async def test_metrics_parse_and_count(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    for _ in range(3):
        await http.post("/v1/completions", json=ASK)
    door.decode.send_status(door.decode.status())
    await until(lambda: door.router.view.session(door.decode.info.ref).status.steps > 0)  # type: ignore[union-attr]
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    model = ("model", "echo")
    prompt = len(door.tokenizer.encode(ASK["prompt"]).ids)
    asker = (model, ("path", "pd"), ("tenant", "other"))
    assert values["diptych_requests_total", (model, ("outcome", "ok"), ("tenant", "other"))] == 3
    assert values["diptych_requests_in_flight", (model,)] == 0
    assert values["diptych_ttft_seconds_count", asker] == 3
    assert values["diptych_e2e_seconds_count", asker] == 3
    assert values["diptych_output_tokens_sum", (model,)] == 27
    assert values["diptych_kv_transfer_bytes_total", (model, ("transport", "echo"))] == 3 * 1024 * prompt
    assert values["diptych_prefix_hit_tokens_total", (model, ("where", "prefill"))] == 3 * (prompt // 16 * 16)
    decode = (("engine", "decode-0"), model, ("role", "decode"))
    assert values["diptych_engine_up", decode] == 1
    assert values["diptych_engine_blocks_total", decode] == 4096
    assert values["diptych_engine_generated_tokens_total", decode] > 0


async def test_info_names_engines_choices_versions_and_the_last_requests(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    await http.post("/v1/completions", json=ASK)
    info = (await http.get("/info")).json()
    engines = {engine["engine"]: engine for engine in info["engines"]}
    assert engines["prefill-0"]["roles"] == ["prefill"]
    assert engines["decode-0"]["epoch"] == door.decode.info.ref.epoch
    assert engines["decode-0"]["blocks"]["total"] == 4096
    assert engines["decode-0"]["pid"] == door.decode.info.pid
    assert info["degraded"] == ["echo engine: nothing is computed"]
    assert info["routers"][0]["in_flight"] == {}
    assert info["versions"].keys() >= {"diptych", "python", "grpcio"}
    last = info["last_requests"][-1]
    assert (last["prefill_engine"], last["decode_engine"], last["transport"]) == ("prefill-0", "decode-0", "echo")
    assert last["transfer_bytes"] > 0
    assert info["losses"] == []
    door.router.losses.append(Loss(engine="decode-7", epoch=3, at_unix=1.5, cause="silent"))
    told = {"engine": "decode-7", "epoch": 3, "at_unix": 1.5, "cause": "silent"}
    assert (await http.get("/info")).json()["losses"] == [told]
    door.directory.set([door.decode.info])
    await until(lambda: not list(door.router.view.live("echo", next(iter(door.prefill.info.roles)))))
    assert any("no prefill engine" in choice for choice in (await http.get("/info")).json()["degraded"])
    door.directory.set([])
    await until(lambda: not list(door.router.view.live("echo", next(iter(door.decode.info.roles)))))
    assert any("no decode engine" in choice for choice in (await http.get("/info")).json()["degraded"])


def test_neither_torch_nor_ray_nor_transformers_is_loaded() -> None:
    code = (
        "import sys, diptych.cluster.api.app, diptych.cluster.api.listener, diptych.cluster.router.router, "
        "diptych.cluster.observability.tracing, diptych.cluster.chat;"
        "print([name for name in ('torch', 'ray', 'transformers', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/responses/", "/v1/responses"),
        ("/v1/nothing", ""),
    ],
)
async def test_a_wrong_base_url_is_told_the_path_that_is_there(http: httpx2.AsyncClient, path: str, meant: str) -> None:
    """With or without /v1 is what the official clients differ in, and what a newcomer gets wrong first."""
    reply = await http.post(path, json=ASK)
    told = f"there is no {path} here" + (f", but {meant}: look at the client's base URL" if meant else "")
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, told)
