"""The client of a provider: each way in which an answer goes wrong has its kind, and no connection or task stays."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator

import provider_wire as w
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from diptych.cluster.providers import answer as answers
from diptych.cluster.providers import client as client_module
from diptych.cluster.providers import network
from diptych.cluster.providers.client import ProviderClient
from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.metrics import ProviderMetrics
from diptych.cluster.providers.network import NameUnknown
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.providers.terms import HttpExchange
from diptych.protos.deltas import Content
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.providers.codec import Outgoing
from diptych.protos.providers.openai_relay import RelayObserver
from diptych.protos.replies import Ended, Event

K = FailureKind
# The one limit that a failure is about; all others are generous, so that a slow machine changes nothing.
SHORT = {
    "headers_timeout": {"headers_s": 0.15, "answer_s": 0.15},
    "first_token_timeout": {"first_token_s": 0.15},
    "idle_timeout": {"idle_s": 0.15},
}


def of(clients: Clients) -> ProviderClient:
    return clients.of(clients.registry.provider("lab"))


async def whole(client: ProviderClient, **timeouts: float) -> str:
    reply = await client.whole(w.OUTGOING, w.terms(**timeouts))
    return reply.message.content


async def stream(client: ProviderClient, **timeouts: float) -> list[Event]:
    return [event async for event in client.stream(w.STREAMED, w.terms(**timeouts))]


async def relay(client: ProviderClient, **timeouts: float) -> bytes:
    pieces = client.relay(w.STREAMED, w.terms(**timeouts), RelayObserver(drops_usage=False))
    return b"".join([piece async for piece in pieces if isinstance(piece, bytes)])


async def read_into(seen: list[object], source: AsyncIterator[object]) -> None:
    async for item in source:
        seen.append(item)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


async def test_one_connection_serves_answers_streams_and_errors() -> None:
    """An answer whose rest nobody reads would cost the next request a new connection, and TLS anew."""
    error = w.answers({"error": {"message": "slow down"}}, "429 Too Many Requests", retry_after="3", x_request_id="r1")
    async with w.wire(w.answers(w.REPLY), w.streams(*w.WHOLE_STREAM), error) as told, w.clients_of(told) as clients:
        client = of(clients)
        assert await whole(client) == "hello"
        events = await stream(client)
        assert text_of(events) == "hello"
        assert isinstance(events[-1], Ended)
        exchange = HttpExchange()
        with pytest.raises(ProviderFailure) as caught:
            await client.whole(w.OUTGOING, w.terms(), exchange)
        assert (caught.value.failure.kind, caught.value.failure.retry_after_s) == (K.RATE_LIMITED, 3.0)
        assert (exchange.status, exchange.retry_after, exchange.request_id) == (429, "3", "r1")
        assert "r1" in caught.value.detail
        assert told.num_accepted == client.num_connections == 1
    assert client.num_connections == 0


async def test_a_connection_that_was_idle_for_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool closes what it drops, and only then has anything to close."""
    monkeypatch.setattr(client_module, "_KEEPALIVE_S", {"http": 0.0, "https": 0.0})
    async with w.wire(w.answers(w.REPLY), w.answers(w.REPLY)) as told, w.clients_of(told) as clients:
        client = of(clients)
        for _ in range(2):
            assert await whole(client) == "hello"
        await asyncio.sleep(0)  # the transport tells of its end a turn later
        assert told.num_accepted == 2
        assert client.num_connections <= 1


@pytest.mark.parametrize("ray_is_first", [True, False])
async def test_what_headers_tell_is_read_however_they_are_written(ray_is_first: bool) -> None:
    """The proxy's id is the request's only where the provider gives none."""
    ids = [b"CF-Ray: ray", b"X-Request-ID: r1"]
    lines = [
        *(ids if ray_is_first else ids[::-1]),
        b"Content-Type: Application/JSON; charset=utf-8",
        b"X-RateLimit-Remaining-Requests: 9",
        b"Anthropic-Ratelimit-Tokens-Reset: 1ms",
        b"Server: cloudflare",
    ]
    body = json.dumps(w.REPLY).encode()
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *lines, b"Content-Length: %d" % len(body), b"", b""])
    async with w.wire(w.sends(head + body)) as told, w.clients_of(told) as clients:
        exchange = HttpExchange()
        await of(clients).whole(w.OUTGOING, w.terms(), exchange)
    assert exchange.request_id == "r1"
    assert exchange.limits == {"x-ratelimit-remaining-requests": "9", "anthropic-ratelimit-tokens-reset": "1ms"}


WRONG_WHOLES = {
    "no json": (w.answers(b"{"), K.SERVER, "malformed"),
    "no object": (w.answers([1]), K.SERVER, "malformed"),
    "empty": (w.answers(b""), K.SERVER, "malformed"),
    "deep": (w.answers(b"[" * 100_000), K.SERVER, "malformed"),
    "html": (w.answers(b"<html>", content_type="text/html; charset=x"), K.SERVER, "content_type"),
    "cut": (w.sends(w.head(content_length="10") + b"{", then="close"), K.SERVER, "cut"),
    "not http": (w.sends(b"HELLO\r\n\r\n", then="close"), K.SERVER, "not_http"),
    "no answer": (w.sends(then="close"), K.SERVER, "disconnected"),
    "redirect": (w.answers({}, "302 Found", location="https://other.test/"), K.NOT_FOUND, "redirect"),
    "headers never end": (w.sends(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 200_000, then="close"), K.SERVER, "not_http"),
    "odd encoding": (w.answers(b"x", content_encoding="br"), K.SERVER, "encoding"),
    "not gzip": (w.answers(b"{}", content_encoding="gzip"), K.SERVER, "encoding"),
    "hang before headers": (w.sends(then="hang"), K.FIRST_TOKEN_TIMEOUT, "headers_timeout"),
    "hang in the headers": (w.sends(b"HTTP/1.1 200 OK\r\n", then="hang"), K.FIRST_TOKEN_TIMEOUT, "headers_timeout"),
    "hang in the body": (w.sends(w.head(content_length="9") + b"{", then="hang"), K.IDLE_TIMEOUT, "idle_timeout"),
    "503": (w.answers(b"busy", "503 Service Unavailable", content_type="text/plain"), K.OVERLOADED, ""),
}


@pytest.mark.parametrize("name", WRONG_WHOLES)
async def test_a_wrong_whole_answer_has_its_kind(name: str) -> None:
    behaviour, kind, code = WRONG_WHOLES[name]
    async with w.wire(behaviour) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await whole(of(clients), **SHORT.get(code, {}))
        assert (caught.value.failure.kind, caught.value.failure.code) == (kind, code)
        assert caught.value.target == "lab"
        assert "\n" not in str(caught.value)
    assert len(told.seen) <= 1  # no second attempt was made behind the caller's back


CUT = (w.WHOLE_STREAM[0], w.WHOLE_STREAM[1])
WRONG_STREAMS = {
    "cut": (w.streams(*CUT, then="close", is_cut=True), K.SERVER, "cut", "hello"),
    "ends early": (w.streams(*CUT), K.SERVER, "", "hello"),
    "empty": (w.streams(), K.SERVER, "", ""),
    "hang": (w.streams(*CUT, then="hang", is_cut=True), K.IDLE_TIMEOUT, "idle_timeout", "hello"),
    "no token": (w.streams(b": ping\n\n", then="hang", is_cut=True), K.FIRST_TOKEN_TIMEOUT, "first_token_timeout", ""),
    "hang before headers": (w.sends(then="hang"), K.FIRST_TOKEN_TIMEOUT, "headers_timeout", ""),
    "html": (w.answers(b"<html>", content_type="text/html"), K.SERVER, "content_type", ""),
    "error in json": (w.answers({"error": {"message": "no", "code": 500}}), K.SERVER, None, ""),
    "error in band": (w.streams(b'data: {"error": {"message": "no", "code": 529}}\n\n'), None, None, ""),
}


@pytest.mark.parametrize("name", WRONG_STREAMS)
@pytest.mark.parametrize("way", ["stream", "relay"])
async def test_a_wrong_stream_has_its_kind_and_what_came_before_is_told(name: str, way: str) -> None:
    """A failure that swallowed the events in front of it would make the gateway believe that nothing was sent."""
    behaviour, kind, code, text = WRONG_STREAMS[name]
    seen: list[object] = []
    async with w.wire(behaviour) as told, w.clients_of(told) as clients:
        client = of(clients)
        limits = w.terms(**SHORT.get(code or "", {}))
        source: AsyncIterator[object] = (
            client.stream(w.STREAMED, limits)
            if way == "stream"
            else client.relay(w.STREAMED, limits, RelayObserver(drops_usage=False))
        )
        with pytest.raises(ProviderFailure) as caught:
            await read_into(seen, source)
    assert kind in (None, caught.value.failure.kind)
    assert code in (None, caught.value.failure.code)
    if way == "stream":
        assert "".join(item.text for item in seen if isinstance(item, Content)) == text
    elif text:
        assert seen == list(CUT)


async def test_a_stream_that_lacks_only_its_last_bytes_is_whole() -> None:
    """The answer had ended: to fail it would be to pay for it twice."""
    pieces = w.WHOLE_STREAM[:-1]
    async with w.wire(w.streams(*pieces, then="close", is_cut=True)) as told, w.clients_of(told) as clients:
        assert isinstance((await stream(of(clients)))[-1], Ended)
        assert await relay(of(clients)) == b"".join(pieces)


async def test_a_stream_that_said_its_end_and_then_hangs_is_whole() -> None:
    """Without its last line, and with its connection open, a complete answer was a failure after the idle time."""
    pieces = w.WHOLE_STREAM[:-1]
    behaviour = w.sends(w.head(**w.SSE) + b"".join(map(w.framed, pieces)), then="hang")  # there is no time between them
    async with w.wire(behaviour) as told, w.clients_of(told) as clients:
        limits = ({"idle_s": 0.5}, {"total_s": 1.5})
        found = await asyncio.gather(*(ask(of(clients), **then) for then in limits for ask in (stream, relay)))
    for events, relayed in (found[:2], found[2:]):
        assert isinstance(events[-1], Ended)
        assert relayed == b"".join(pieces)


async def test_an_error_whose_words_never_end_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then held the attempt to its deadline, and with it what would follow the failure."""

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(w.head("503 Busy", content_type="text/plain", transfer_encoding="chunked"))
        while not writer.is_closing():
            writer.write(w.framed(b"."))
            await writer.drain()
            await asyncio.sleep(0.005)
        return False

    monkeypatch.setattr(answers, "MAX_ERROR_S", 0.05)
    async with w.wire(behave) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await stream(of(clients))
        assert (caught.value.failure.kind, caught.value.failure.status) == (K.OVERLOADED, 503)
        await told.all_closed()


async def test_a_flood_of_pieces_leaves_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that came in one go were read in one go: chunks of one byte each kept all other requests waiting for as
    long as the provider wished.
    """
    num_turns = 0

    async def other() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(network, "_TURN_S", -1.0)
    flood = b"".join([w.framed(b":")] * 3000 + [w.framed(b"\n\n")])
    told_by = w.sends(w.head(**w.SSE) + flood + b"".join(map(w.framed, w.WHOLE_STREAM)) + b"0\r\n\r\n")
    async with w.wire(told_by) as told, w.clients_of(told) as clients:
        task = asyncio.create_task(other())
        assert text_of(await stream(of(clients))) == "hello"
        task.cancel()
    assert num_turns > 3000


async def test_a_stream_that_goes_on_and_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoder keeps until it can tell it has no other end than this."""
    monkeypatch.setattr(client_module, "MAX_BODY_BYTES", 10_000)
    silent = w.chunk({"x": "a" * 3000})
    async with w.wire(w.streams(*[silent] * 5, *w.WHOLE_STREAM)) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await stream(of(clients))
        assert caught.value.failure.code == "too_large"
    spoken = w.chunk({"content": "a" * 3000})
    async with w.wire(w.streams(*[spoken] * 5, *w.WHOLE_STREAM)) as told, w.clients_of(told) as clients:
        assert len(text_of(await stream(of(clients)))) > 10_000


async def test_bytes_behind_the_end_are_read_and_dropped() -> None:
    extra = (*w.WHOLE_STREAM, b": bye\n\n", w.chunk({"content": "more"}))
    async with w.wire(w.streams(*extra)) as told, w.clients_of(told) as clients:
        assert text_of(await stream(of(clients))) == "hello"
        assert w.DONE in await relay(of(clients))
        assert told.num_accepted == 1


async def test_a_stream_that_never_ends_behind_its_end_ends_for_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MAX_TAIL_S", 0.01)
    async with w.wire(w.streams(*w.WHOLE_STREAM, then="hang", is_cut=True)) as told, w.clients_of(told) as clients:
        assert text_of(await stream(of(clients))) == "hello"
        await told.all_closed()


async def test_a_whole_answer_to_a_request_for_a_stream_is_told_as_events() -> None:
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told) as clients:
        assert text_of(await stream(of(clients))) == "hello"


async def test_a_packed_answer_is_unpacked_and_a_bomb_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte that unpacks to a gigabyte would end the process."""
    packed = gzip.compress(json.dumps(w.REPLY).encode())
    monkeypatch.setattr(answers, "MAX_BODY_BYTES", 1 << 20)
    bomb = gzip.compress(b" " * (8 << 20))
    behaviours = [w.answers(packed, content_encoding="gzip"), w.answers(bomb, content_encoding="gzip")]
    async with w.wire(*behaviours) as told, w.clients_of(told) as clients:
        assert await whole(of(clients)) == "hello"
        with pytest.raises(ProviderFailure) as caught:
            await whole(of(clients))
        assert caught.value.failure.code == "too_large"


async def test_an_answer_that_does_not_end_is_refused_at_its_limit() -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(w.head(content_type="application/json", transfer_encoding="chunked"))
        while not writer.is_closing():
            writer.write(w.framed(b" " * (1 << 20)))
            await writer.drain()
            await asyncio.sleep(0)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.Answer.whole, "__defaults__", (4 << 20,))
        async with w.wire(behave) as told, w.clients_of(told) as clients:
            with pytest.raises(ProviderFailure) as caught:
                await whole(of(clients))
            assert caught.value.failure.code == "too_large"
            await told.all_closed()


async def test_pings_do_not_put_off_the_first_token_but_keep_an_answer_alive() -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(w.head(**w.SSE))
        while not writer.is_closing():
            writer.write(w.framed(b": ping\n\n"))
            await writer.drain()
            await asyncio.sleep(0.005)
        return False

    async with w.wire(behave) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await stream(of(clients), first_token_s=1.2, idle_s=1.0)
        assert caught.value.failure.code == "first_token_timeout"


async def test_the_deadline_is_over_all_phases() -> None:
    async with w.wire(w.streams(*CUT, then="hang", is_cut=True)) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await stream(of(clients), total_s=0.1)
        assert caught.value.failure.kind is K.TOTAL_TIMEOUT
        with pytest.raises(ProviderFailure) as caught:
            await whole(of(clients), total_s=0.1)
        assert caught.value.failure.kind is K.TOTAL_TIMEOUT


async def test_what_keeps_a_connection_from_being_made_is_told_apart() -> None:
    closed = socket.socket()  # it is bound and does not listen: nobody else gets its port
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    registry = Registry.load(
        {
            "gone": ProviderSettings(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"),
            "nowhere": ProviderSettings(base_url="http://nowhere.test/v1", api_key="none"),
        },
        {},
    )

    async def no_name(host: str, port: int) -> list[str]:
        if host == "nowhere.test":
            raise NameUnknown(f"the name {host} has no address")
        return [host]

    clients = Clients(registry, resolve=no_name)
    for name, code in (("gone", "refused"), ("nowhere", "dns")):
        with pytest.raises(ProviderFailure) as caught:
            await clients.of(registry.provider(name)).whole(w.OUTGOING, w.terms())
        assert (caught.value.failure.kind, caught.value.failure.code) == (K.CONNECT, code)
    await clients.close()
    closed.close()


async def test_a_full_pool_is_an_overload_not_a_wait_for_ever() -> None:
    async with (
        w.wire(w.streams(w.WHOLE_STREAM[0], then="hang", is_cut=True)) as told,
        w.clients_of(told, max_connections=1) as clients,
    ):
        first = of(clients).stream(w.STREAMED, w.terms())
        await anext(first)
        with pytest.raises(ProviderFailure) as caught:
            await whole(of(clients), connect_s=0.02)
        assert (caught.value.failure.kind, caught.value.failure.code) == (K.OVERLOADED, "connections")
        await first.aclose()


async def test_an_abandoned_stream_leaves_no_connection_and_no_task() -> None:
    """Each client that goes away in mid-answer would leave one behind, and the provider would go on billing."""
    async with w.wire(w.streams(*CUT, then="hang", is_cut=True)) as told, w.clients_of(told) as clients:
        client = of(clients)
        tasks = asyncio.all_tasks()
        for way in ("closed", "cancelled"):
            source = client.stream(w.STREAMED, w.terms())
            await anext(source)
            assert client.num_connections == 1
            if way == "closed":
                await source.aclose()
            else:
                await anext(source)
                await anext(source)
                reading = asyncio.ensure_future(anext(source))
                await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            await told.all_closed()
            assert client.num_connections == 0
        told.behaviours = [w.sends(then="hang")]
        await told.asked()
        waiting = asyncio.ensure_future(whole(client))
        await told.asked()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await told.all_closed()
        assert {task for task in asyncio.all_tasks() - tasks if "serve" not in repr(task)} == set()


async def test_metrics_count_outcomes_kinds_bytes_and_connections() -> None:
    exported = CollectorRegistry()
    async with w.wire(w.answers(w.REPLY), w.answers({}, "500 Oops")) as told:
        lab = ProviderSettings(base_url=f"http://127.0.0.1:{told.port}/v1", api_key="none")
        clients = Clients(Registry.load({"lab": lab}, {}), ProviderMetrics(exported))
        await whole(of(clients))
        with pytest.raises(ProviderFailure):
            await whole(of(clients))
        text = generate_latest(exported).decode()
        for line in (
            'diptych_provider_requests_total{outcome="answered",provider="lab"} 1.0',
            'diptych_provider_requests_total{outcome="failed",provider="lab"} 1.0',
            'diptych_provider_failures_total{kind="server",provider="lab"} 1.0',
            'diptych_provider_connections{provider="lab"} 1.0',
            f'diptych_provider_bytes_total{{direction="out",provider="lab"}} {2.0 * len(told.seen[0].body)}',
        ):
            assert line in text
        await clients.close()


async def test_an_answer_that_makes_its_codec_stumble_is_the_providers_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else would be an error of ours, after which no other target is tried."""

    class Stumbling:
        name, framing, skipped = "openai.chat", "sse", 0

        def reply(self, body: object, quirks: object) -> None:
            raise KeyError("choices")

        def decoder(self, quirks: object) -> Stumbling:
            return self

        def feed(self, event: object) -> None:
            raise AttributeError("x")

    async with w.wire(w.answers(w.REPLY), w.streams(*w.WHOLE_STREAM)) as told, w.clients_of(told) as clients:
        monkeypatch.setattr(of(clients), "codec", Stumbling())
        for ask in (whole, stream):
            with pytest.raises(ProviderFailure) as caught:
                await ask(of(clients))
            assert (caught.value.failure.kind, caught.value.failure.code) == (K.SERVER, "unreadable")


@pytest.mark.parametrize("path", ["//evil.test/x", "evil.test", "/x y", "/x\r\nhost: evil.test", "/\u00e9"])
async def test_no_model_name_changes_where_a_request_goes(path: str) -> None:
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told) as clients:
        with pytest.raises(ProviderFailure) as caught:
            await of(clients).whole(Outgoing(path=path, body={}), w.terms())
        assert caught.value.failure.kind is K.BAD_REQUEST
        assert not told.seen


async def test_half_of_a_surrogate_pair_is_sent_escaped() -> None:
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told) as clients:
        await of(clients).whole(Outgoing(path="/x", body={"text": "\ud800"}), w.terms())
        assert told.seen[0].body == b'{"text":"\\ud800"}'


@pytest.fixture(autouse=True)
async def no_task_stays() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}
