"""Streams of providers that speak the client's format pass through the front door as bytes, under the same promises.

They guard against a relayed answer that ends twice, or not at all, or that loses its headers and its life.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from behaviours import BEHAVIOURS
from scripted import Rig

from diptych.cluster.api.testing import front_door
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, says
from diptych.cluster.providers.settings import ProviderSettings

assert {"cut_in_the_middle", "empty_stream"} <= BEHAVIOURS.keys()
CUT = "rig/cut_in_the_middle"
ASK = {"messages": [{"role": "user", "content": "hello"}], "stream": True}


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with Rig() as rig:
        given = rig.providers(1)["rig-openai.chat"]
        settings = GatewaySettings.model_validate(
            {
                "direct": True,
                "routes": {
                    "well": {"targets": ["rig/well"]},
                    "cut": {
                        "targets": ["rig/cut_in_the_middle", "s/b"],
                        "strategy": "priority",
                        "midstream": "continue",
                    },
                    "first": {"targets": ["rig/empty_stream", "rig/well"], "strategy": "priority"},
                },
            }
        )
        async with (
            front_door(
                gateway=settings,
                targets=[ScriptedTarget("s/b", [says("the rest")], continues="prefill")],
                providers={"rig": ProviderSettings.model_validate(given)},
            ) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as client,
        ):
            yield client


def read(text: str) -> tuple[list[dict[str, Any]], str]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return chunks, "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


async def test_bytes_pass_with_our_names_and_one_end(http: httpx2.AsyncClient) -> None:
    for model, target in (("well", "rig/well"), ("rig/well", "rig/well"), ("first", "rig/well")):
        told = await http.post("/v1/chat/completions", json={**ASK, "model": model})
        chunks, text = read(told.text)
        assert text.endswith("answer")
        assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {(told.headers["x-request-id"], model)}
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]].count("stop") == 1
        assert told.text.count("data: [DONE]") == 1
        assert told.text.endswith("data: [DONE]\n\n")
        assert told.headers["x-route-target"] == target
    life = (await http.get("/v1/requests")).json()["data"][0]
    assert (life["state"], life["choices"][0]["state"]) == ("finished", "finished")


async def test_what_breaks_off_goes_on_in_events(http: httpx2.AsyncClient) -> None:
    told = await http.post("/v1/chat/completions", json={**ASK, "model": "cut"})
    chunks, text = read(told.text)
    assert (text, told.text.count("[DONE]")) == ("half an the rest", 1)
    assert ": goes on at s/b" in told.text
    assert [c["choices"][0]["delta"].get("role") for c in chunks].count("assistant") == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_what_needs_more_than_bytes_comes_in_events(http: httpx2.AsyncClient) -> None:
    more = {"model": "well", "explain": True}
    told = await http.post("/v1/chat/completions", json={**ASK, **more})
    chunks, text = read(told.text)
    assert text.endswith("answer")
    assert chunks[-1]["diptych"]["choices"][0]["target"] == "rig/well"
    whole = await http.post("/v1/chat/completions", json={**ASK, "model": "well", "stream": False})
    assert whole.json()["choices"][0]["message"]["content"].endswith("answer")
