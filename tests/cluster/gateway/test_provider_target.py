"""A provider's model as a target: what it cannot do, what is said of it, keys, media behind addresses."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from journeys import HELLO, run
from prometheus_client import CollectorRegistry, generate_latest
from scripted import Rig

from diptych.cluster.gateway.billing import paid_usage
from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.metrics import GatewayMetrics
from diptych.cluster.gateway.ports import Ports
from diptych.cluster.gateway.provider_target import ProviderTarget
from diptych.cluster.gateway.public import UpstreamRefused
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.sizes import Size
from diptych.cluster.gateway.target import Target
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.fetch import Fetcher
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.errors import InvalidRequest, Overloaded, UnknownModel
from diptych.protos.failures import FailureKind

IMAGE = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


def made(
    providers: dict[str, dict[str, Any]],
    environ: dict[str, str] | None = None,
    ports: Ports | None = None,
    direct: bool = False,
    **routes: Any,
) -> Gateway:
    read = {name: ProviderSettings.model_validate(given) for name, given in providers.items()}
    settings = GatewaySettings.model_validate({"routes": routes, "direct": direct})
    return Gateway(settings, Registry.load(read, environ or {}), ports=ports)


async def test_what_a_provider_cannot_do_is_refused_left_out_or_told_as_the_route_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another router dropped the tools of requests and said nothing."""
    caplog.set_level(logging.WARNING, "diptych")
    lab = {"base_url": "http://127.0.0.1:9/v1", "api_key": "none", "quirks": {"unsupported": ["seed"]}}
    async with Rig() as rig:
        lab["base_url"] = f"http://127.0.0.1:{rig.port}/openai.chat"
        routes = {way: {"targets": ["lab/well"], "on_unsupported": way} for way in ("error", "warn", "drop")}
        async with made({"lab": lab}, **routes) as gateway:
            with pytest.raises(
                InvalidRequest, match=r"lab/well cannot do what seed .* asks for: leave it out"
            ) as caught:
                await gateway.chat("error", HELLO, seed=1)
            assert caught.value.param == "seed"
            assert rig.calls.total() == 0
            assert "lab/well cannot do what seed" in gateway.explain("error", HELLO, seed=1).candidates[0].excluded
            for way in ("warn", "drop"):
                async with gateway.stream(way, HELLO, seed=1) as events:
                    async for _ in events:
                        pass
                assert [(note.kind, note.field) for note in events.record.notes] == [("unsupported", "seed")]
        assert [record.message for record in caplog.records if "seed" in record.message] == [
            record.message for record in caplog.records if "lab/well is not told of seed" in record.message
        ]
        assert sum("is not told of seed" in record.message for record in caplog.records) == 1


async def test_a_missing_key_is_a_sentence_and_the_next_target_answers() -> None:
    """S05: the variable's name and how to do without; no request left the house."""
    async with Rig() as rig:
        lab = {"base_url": f"http://127.0.0.1:{rig.port}/openai.chat", "api_key": "none"}
        routes = {"alone": {"targets": ["groq/x"]}, "chat": {"targets": ["groq/x"], "fallback": ["lab/well"]}}
        async with made({"lab": lab, "groq": {}}, **routes) as gateway:
            with pytest.raises(UpstreamRefused, match=r"\$GROQ_API_KEY.*ollama"):
                await gateway.chat("alone", HELLO)
            assert (await gateway.chat("chat", HELLO)).message.content == "another answer"


async def test_clients_may_name_targets_of_listed_providers_where_the_settings_say_so() -> None:
    """Every provider of the table was open to every client, at the operator's cost."""
    async with Rig() as rig:
        lab = {"base_url": f"http://127.0.0.1:{rig.port}/openai.chat", "api_key": "none"}
        async with made({"lab": lab}, direct=True) as gateway:
            assert (await gateway.chat("lab/well", HELLO)).message.content == "another answer"
            for model in ("groq/x", "pool/x", "lab", "nobody/x"):
                with pytest.raises(UnknownModel):
                    await gateway.chat(model, HELLO)
        async with made({"lab": lab}) as gateway:
            with pytest.raises(UnknownModel):
                await gateway.chat("lab/well", HELLO)


async def test_media_behind_addresses_are_fetched_for_providers_that_read_none() -> None:
    """S08: by the one fetcher with its rules, within the attempt; another target may read the address itself."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: {len(IMAGE)}\r\n\r\n"
        writer.write(head.encode() + IMAGE)
        await writer.drain()
        writer.close()

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    image = {"type": "image_url", "image_url": {"url": f"http://pictures.lan:{port}/x.png"}}
    asked = [{"role": "user", "content": [image]}]
    async with Rig() as rig:
        place = {"base_url": f"http://127.0.0.1:{rig.port}/gemini.generate", "codec": "gemini.generate"}
        lab = place | {"api_key": "none", "auth": "none"}
        routes = {"chat": {"targets": ["lab/well"]}}
        open_to = Fetcher(FetchSettings(private_hosts=("pictures.lan",)), resolve)
        reads_none = Registry.load({"lab": ProviderSettings.model_validate(lab)}, {})
        provider = reads_none.provider("lab")
        object.__setattr__(provider, "reads_urls", ())
        settings = GatewaySettings.model_validate({"routes": routes})
        async with Gateway(settings, Clients(reads_none), ports=Ports(fetcher=open_to)) as gateway:
            assert (await gateway.chat("chat", asked)).message.content == "another answer"
            async with gateway.stream("chat", asked) as events:
                held = [open_to.room.held_bytes async for _ in events]
            assert held[0] == len(IMAGE)  # until the attempt's end, which may send them again
            assert events.reply().message.content == "another answer"
            assert open_to.room.held_bytes == 0
        full = Fetcher(FetchSettings(private_hosts=("pictures.lan",), timeout_s=0.05), resolve)
        async with (
            Gateway(settings, Clients(reads_none), ports=Ports(fetcher=full)) as gateway,
            full.room.part(full.settings.held_bytes, 0.0),
        ):
            for _ in range(12):  # no fault of the provider's
                with pytest.raises(Overloaded, match="of files behind addresses at once"):
                    await gateway.chat("chat", asked)
            assert gateway._shared.breakers.states() == {"lab/well": "closed"}
        async with Gateway(settings, Clients(reads_none), ports=Ports(fetcher=Fetcher(resolve=resolve))) as gateway:
            with pytest.raises(InvalidRequest, match="cannot be fetched") as caught:
                await gateway.chat("chat", asked)
            assert caught.value.param == "messages[0].content[0]"
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("wanted", [{"first_token_timeout_s": 4}, {"timeout_s": 4}, {}])
def test_who_waits_for_room_is_refused_before_it_looks_like_a_silent_provider(wanted: dict[str, float]) -> None:
    """A provider that nobody had asked yet had said nothing for too long: its breaker opened, its prompt was billed."""

    async def job() -> None:
        place = {"base_url": "http://127.0.0.1:9", "codec": "gemini.generate", "api_key": "none", "auth": "none"}
        registry = Registry.load({"lab": ProviderSettings.model_validate(place)}, {})
        object.__setattr__(registry.provider("lab"), "reads_urls", ())
        settings = GatewaySettings.model_validate(
            {"routes": {"chat": {"targets": ["lab/x"], "timeouts": {"first_token_s": 5}}}}
        )
        fetcher, loop = Fetcher(), asyncio.get_running_loop()
        image = {"type": "image_url", "image_url": {"url": "http://pictures.lan/x.png"}}
        asked = [{"role": "user", "content": [image]}]
        async with (
            Gateway(settings, registry, ports=Ports(clock=loop.time, fetcher=fetcher)) as gateway,
            fetcher.room.part(fetcher.settings.held_bytes, 0.0),
            gateway.stream("chat", asked, **wanted) as events,
        ):
            with pytest.raises(Overloaded, match="of files behind addresses at once"):
                await anext(aiter(events))
            assert events.record.failures == (FailureKind.UNSUPPORTED,)
            assert loop.time() < 5
            async with gateway.stream("chat", asked, **wanted) as left:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1):
                        await anext(aiter(left))
            (attempt,) = left.record.attempts
            assert (attempt.outcome, paid_usage(attempt, Size(400, 0))) == ("left", None)

    run(job())


def test_a_provider_target_is_a_target() -> None:
    """The two kinds of targets drifted apart."""
    registry = Registry.load({}, {})
    provider, model = registry.target("anthropic/claude")
    target: Target = ProviderTarget(Clients(registry), provider, model, fetcher=Fetcher())
    assert (target.name, target.is_own, target.weights, target.key_id) == ("anthropic/claude", False, "", "")


async def test_names_that_clients_make_up_fill_no_memory_and_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asked for a new model each time grew the router until it died."""
    monkeypatch.setattr("diptych.cluster.gateway.routes.MAX_DIRECT", 8)
    monkeypatch.setattr("diptych.cluster.gateway.course.MAX_BREAKERS", 8)
    monkeypatch.setattr("diptych.cluster.gateway.gateway.MAX_MADE", 8)
    registry = CollectorRegistry()
    async with Rig() as rig:
        lab = {"base_url": f"http://127.0.0.1:{rig.port}/openai.chat", "api_key": "none"}
        ports = Ports(metrics=GatewayMetrics(registry))
        async with made({"lab": lab}, direct=True, ports=ports, chat={"targets": ["lab/well"]}) as gateway:
            for n in range(30):
                with pytest.raises(UpstreamRefused):
                    await gateway.chat(f"lab/missing-{n}", HELLO)
            shared = gateway._shared
            assert len(shared.routes._direct) <= 8
            assert len(shared.breakers.states()) <= 8
            assert shared.routes.targets == {"lab/well"}
            assert len(gateway._made) <= 8
    text = generate_latest(registry).decode()
    assert 'target="lab/*"} 30.0' in text
    assert "missing" not in text
