"""Addresses in requests of all served formats, on the whole way to a provider that has to be sent the bytes.

Rows S08, S09 and S11 of the exam: nothing within this network is reached, whoever names it, and no bomb is unpacked.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import provider_wire as w
import pytest
from journeys import HELLO
from scripted import Rig
from test_fetch import FORMS, PNG, PUBLIC, Names, image

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers.fetch import Fetcher
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.network import Resolve
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.responses import parse_responses
from diptych.protos.responses_items import ItemIds, ItemReader

FORMATS = ("openai.chat", "gemini.generate", "bedrock.converse")  # of providers: an address in each would be fetched


@asynccontextmanager
async def gateway(
    resolve: Resolve, *, formats: Sequence[str] = FORMATS, **fetch: Any
) -> AsyncIterator[tuple[Gateway, Rig]]:
    async with Rig() as rig:
        places = rig.providers(1)
        given = {name: ProviderSettings.model_validate(places[f"rig-{name}"] | _sees()) for name in formats}
        routes = {name: {"targets": [f"{name}/well"], "retries": 0} for name in formats}
        ports = Ports(fetcher=Fetcher(FetchSettings(**fetch), resolve))
        settings = GatewaySettings.model_validate({"routes": routes})
        async with Gateway(settings, Registry.load(given, {}, {}), ports=ports) as made:
            yield made, rig


def _sees() -> dict[str, Any]:
    return {"quirks": {"media": ["image", "file"]}}


def chat(url: str, model: str) -> ChatRequest:
    """An image, and one that a tool showed."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": f"see {url} and /etc/passwd"}, part]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [part]},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    return parse_chat(json.dumps({"model": model, "messages": messages, "tools": tools}).encode())


def file(url: str, model: str) -> ChatRequest:
    """A document of a chat."""
    part = {"type": "file", "file": {"file_data": url, "filename": "x.pdf"}}
    return parse_chat(json.dumps({"model": model, "messages": [{"role": "user", "content": [part]}]}).encode())


def messages(url: str, model: str) -> ChatRequest:
    """Anthropic's two kinds."""
    source = {"type": "url", "url": url}
    content = [{"type": "image", "source": source}, {"type": "document", "source": source}]
    body = {"model": model, "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    return parse_messages(json.dumps(body).encode())


def responses(url: str, model: str) -> ChatRequest:
    """Of the Responses API."""
    content = [{"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url}]
    item = {"role": "user", "content": content}
    request = parse_responses(json.dumps({"model": model, "input": [item]}).encode())
    reader = ItemReader(ItemIds(f"resp_{0:024x}"), lambda *_: None, {})  # type: ignore[arg-type]
    reader.read(request.items, "input")
    return request.as_chat(reader.messages())


INGRESSES = (chat, file, messages, responses)


async def test_no_form_of_an_address_leads_into_this_network_from_any_format() -> None:
    """S08: sixty forms, four ingresses, three formats of providers; a canary on loopback hears nothing."""
    names = Names(localhost=[["127.0.0.1", "::1"]], private_test=[["10.1.2.3"]], good_test=[[PUBLIC]])
    calm = random.Random(8)
    async with w.wire(image()) as canary, gateway(names) as (made, rig):
        for form in FORMS:
            url = form.format(port=canary.port)
            for ingress in INGRESSES:
                with pytest.raises(InvalidRequest) as caught:
                    await made.chat(ingress(url, calm.choice(FORMATS)))
                assert caught.value.param, (form, ingress)
                assert str(caught.value).isprintable()
        assert (canary.num_accepted, rig.calls.total()) == (0, 0)


async def test_an_allowed_host_leads_nowhere_else_by_redirects_or_changed_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S09: two hundred tries."""
    reached: list[str] = []
    async with w.wire(image()) as canary:
        to = f"http://127.0.0.1:{canary.port}/"
        answers = [w.answers(b"", f"{code} Elsewhere", location=to) for code in (301, 302, 303, 307, 308)]
        async with w.wire(*answers * 20) as outside:
            names = Names(cdn_test=[["127.0.0.1"]])
            async with gateway(names, formats=FORMATS[:1], private_hosts=("cdn.test",)) as (made, rig):
                url = f"http://cdn.test:{outside.port}/a.png"
                for ingress in INGRESSES * 25:
                    with pytest.raises(InvalidRequest):
                        await made.chat(ingress(url, FORMATS[0]))
                assert rig.calls.total() == 0
            assert outside.seen
        names = Names(rebind_test=[[PUBLIC] if n % 2 == 0 else ["127.0.0.1"] for n in range(200)])
        loop = asyncio.get_running_loop()

        async def connect(self: object, factory: object, host: str, port: int) -> None:
            reached.append(host)
            raise ConnectionRefusedError(111, "refused")

        async with gateway(names, formats=FORMATS[:1]) as (made, rig):
            monkeypatch.setattr(type(loop), "create_connection", connect)
            for ingress in INGRESSES * 25:
                with pytest.raises(InvalidRequest):
                    await made.chat(ingress(f"https://rebind.test:{443}/a.png", FORMATS[0]))
            monkeypatch.undo()
        assert canary.num_accepted == 0
        assert set(reached) == {PUBLIC}


def claims(side: int) -> bytes:
    """A PNG that says it has so many pixels on a side, of one bit, packed to next to nothing."""
    size = side.to_bytes(4, "big")
    return PNG[:8] + b"\0\0\0\rIHDR" + size + size + b"\x01\0\0\0\0" + b"\0" * 40


BOMBS = {
    "packed on the way": image(gzip.compress(b"\0" * (8 << 20)), content_encoding="gzip"),
    "a length that is told": w.sends(w.head(content_type="image/png", content_length=str(1 << 40)), PNG),
    "a length that is not told": w.sends(w.head(content_type="image/png"), *(PNG + b"\0" * (1 << 20),) * 6),
    "what a picture is not": image(gzip.compress(b"\0" * (8 << 20))),
    "a page": w.answers(b"<html>" * 1000, content_type="image/png"),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_behind_an_address_is_refused_before_it_is_unpacked(name: str) -> None:
    """S11: within a second and a few megabytes."""
    async with w.wire(BOMBS[name]) as outside:
        names = Names(cdn_test=[["127.0.0.1"]])
        async with gateway(names, formats=FORMATS[1:2], private_hosts=("cdn.test",), max_bytes=4 << 20) as (made, rig):
            tracemalloc.start()
            began = time.process_time()
            with pytest.raises(InvalidRequest):
                await made.chat(chat(f"http://cdn.test:{outside.port}/a.png", FORMATS[1]))
            seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert rig.calls.total() == 0
    assert (seconds < 1, peak < 32 << 20) == (True, True), (seconds, peak)


async def test_pictures_that_say_they_are_huge_are_sent_as_they_are_and_never_unpacked_here() -> None:
    """S11: pixels are the provider's; this server looks at a file's first bytes alone."""
    async with w.wire(image(claims(30_000))) as outside:
        names = Names(cdn_test=[["127.0.0.1"]])
        async with gateway(names, formats=FORMATS[1:2], private_hosts=("cdn.test",)) as (made, rig):
            tracemalloc.start()
            for ingress in (chat,):
                await made.chat(ingress(f"http://cdn.test:{outside.port}/a.png", FORMATS[1]))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert rig.calls.total() == 1
    assert peak < 16 << 20


async def test_a_text_that_looks_like_an_address_is_a_text() -> None:
    """S08: what reads like a link or a path is fetched by nobody."""
    words = "http://127.0.0.1/ file:///etc/passwd ![x](http://127.0.0.1/x.png) ../../etc/passwd"
    names = Names()
    async with gateway(names) as (made, rig):
        for model in FORMATS:
            asked = [{**HELLO[0], "content": words}]
            assert (await made.chat(model, asked)).message.content == "another answer"
        assert rig.calls.total() == len(FORMATS)
    assert set(names.asked) <= {"127.0.0.1"}
