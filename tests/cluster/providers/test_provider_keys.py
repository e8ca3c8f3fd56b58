"""A provider's key goes to its own host and into no text: the one thing of a router that everybody wants to steal."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import logging
import pickle
import traceback
from pathlib import Path

import provider_wire as w
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diptych.cluster.providers.secrets import (
    HIDDEN,
    KeyReader,
    KeyReference,
    KeyUnreadable,
    Secret,
    plain,
    redacted,
)
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.failures import FailureKind, ProviderFailure

SECRET = Secret(w.KEY)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("way", ["whole", "stream"])
async def test_a_key_never_leaves_for_another_host(status: str, way: str) -> None:
    """HTTP clients that follow a redirect have sent keys along, above all to another port of the same host."""
    async with w.wire(w.answers(w.REPLY)) as other:
        to = f"http://127.0.0.1:{other.port}/v1/chat/completions"
        async with w.wire(w.answers({}, status, location=to)) as told, w.clients_of(told) as clients:
            client = clients.of(clients.registry.provider("lab"))
            terms = w.terms()
            sent = client.whole(w.OUTGOING, terms) if way == "whole" else anext(client.stream(w.STREAMED, terms))
            with pytest.raises(ProviderFailure) as caught:
                await sent
            assert caught.value.failure.code == "redirect"
            assert "base_url" in str(caught.value)
            assert [seen.headers["authorization"] for seen in told.seen] == [f"Bearer {w.KEY}"]
        assert other.num_accepted == 0


ECHOES = [
    w.KEY,
    f"Bearer {w.KEY}",
    w.KEY[:12] + "...",
    w.KEY[-9:],
    f"key={w.KEY}&x=1",
    base64.b64encode(w.KEY.encode()).decode(),
    json.dumps({"headers": {"authorization": f"Bearer {w.KEY}"}}),
]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("way", ["body", "html", "stream", "code"])
async def test_a_provider_that_repeats_the_key_does_not_make_us_repeat_it(
    echo: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    error = {"message": f"wrong key: {echo}", "code": echo, "param": echo, "type": echo}
    behaviours = {
        "body": w.answers({"error": error}, "401 Unauthorized", x_request_id=echo),
        "html": w.answers(f"<h1>{echo}</h1>".encode(), "500 Oops", content_type="text/html"),
        "stream": w.streams(b"data: " + json.dumps({"error": error}).encode() + b"\n\n"),
        "code": w.answers(b"x", content_type=f"text/{w.KEY}"),
    }
    async with w.wire(behaviours[way]) as told, w.clients_of(told) as clients:
        provider = clients.registry.provider("lab")
        client = clients.of(provider)
        with pytest.raises(ProviderFailure) as caught:
            async for _ in client.stream(w.STREAMED, w.terms()):
                pass
        shown = [
            str(caught.value),
            repr(caught.value),
            caught.value.detail,
            "".join(traceback.format_exception(caught.value)),
            repr(provider),
            repr(clients.registry.keys),
            repr(vars(client)),
            client.key_id(),
            caplog.text,
        ]
        for text in shown:
            assert not any(w.KEY[at : at + 8] in text for at in range(3, len(w.KEY) - 7)), text
            assert echo not in text


@settings(max_examples=60)
@given(
    key=st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789-_.+/=", min_size=1, max_size=80),
    before=st.text(max_size=30),
    after=st.text(max_size=30),
    cut=st.integers(0, 40),
)
def test_no_piece_of_a_key_that_matters_stays(key: str, before: str, after: str, cut: int) -> None:
    piece = key[cut:] if len(key) - cut >= 8 else key
    told = redacted(f"{before} {piece} {after}", [Secret(key)])
    if len(piece) >= 8:
        assert not any(piece[at : at + 8] in told.replace(HIDDEN, "\0") for at in range(len(piece) - 7))
    else:
        assert key not in told.replace(HIDDEN, "\0")


def test_a_text_without_the_key_stays_as_it_is() -> None:
    text = "the model llama-3.3-70b-versatile is not known; see https://example.com/docs/models?x=sk"
    assert redacted(text, [SECRET]) == text


@pytest.mark.parametrize("key", ["gsk_abcdefghijklmnopqrst", "sk-proj-abcdef********wxyz", "AIzaSyA1234567890abcdefg"])
def test_what_looks_like_a_key_is_hidden_too(key: str) -> None:
    """Somebody else's: the provider answers for another customer, or the client has put one into its prompt."""
    assert redacted(f"Incorrect API key provided: {key}.", []).startswith(f"Incorrect API key provided: {HIDDEN}")


def test_a_secret_shows_itself_nowhere() -> None:
    for text in (repr(SECRET), str(SECRET), f"{SECRET}", f"{SECRET:>40}", f"{[SECRET]}", "{}".format(SECRET)):  # noqa: UP032
        assert w.KEY not in text
    assert json.loads(json.dumps({"key": SECRET}, default=plain)) == {"key": HIDDEN}
    for leave in (json.dumps, pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(SECRET)  # type: ignore[operator]
    assert Secret(w.KEY) == SECRET
    assert Secret("other") != SECRET


@pytest.mark.parametrize("given", [w.KEY, "env:", "env:1X", "env:A B", "file:", "sk:abc", 12345, ["x"], True])
def test_a_key_in_the_configuration_is_refused_and_not_repeated(given: object) -> None:
    with pytest.raises(ValidationError) as caught:
        ProviderSettings(base_url="https://x.test/v1", api_key=given)  # type: ignore[arg-type]
    assert "does not belong in a configuration" in str(caught.value)
    assert not (isinstance(given, str) and len(given) > 8) or given not in str(caught.value)


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "api-key", "cookie", "x-goog-api-key", "X-Auth-Token"])
def test_no_header_of_the_configuration_holds_a_key(name: str) -> None:
    """It would be sent, shown by `repr`, and hidden in no error."""
    for found in ({"headers": {name: "plain"}}, {"quirks": {"headers": {name: "plain"}}}, {"headers": {"x": w.KEY}}):
        with pytest.raises(ValidationError) as caught:
            ProviderSettings(base_url="https://x.test/v1", **found)
        assert "a key is named by api_key" in str(caught.value)
        assert w.KEY not in str(caught.value)
    given = {
        "anthropic-beta": "a-2025-01-01",
        "x-team": "a",
        "http-referer": "https://a.test",
        "openai-organization": "o",
    }
    assert ProviderSettings(base_url="https://x.test/v1", headers=given, quirks={"headers": given}).headers == given


def test_keys_are_read_when_they_are_used(tmp_path: Path) -> None:
    """A key that was read once and for all would have to be replaced with a restart."""
    file = tmp_path / "key"
    environ = {"A": "", "B": " second "}
    reader = KeyReader(environ)
    either, kept = KeyReference("env", "A|B"), KeyReference.parse(f"file:{file}")
    assert reader.read(either) == Secret("second")
    environ["A"] = "first"
    assert reader.read(either) == Secret("first")
    assert reader.read(either) is reader.read(either)  # whose pieces are made once, not for each answer
    assert reader.read(kept) is None
    file.write_text("one\n")
    assert reader.read(kept) == reader.read(kept) == Secret("one")
    file.write_text("another\n")
    assert reader.read(kept) == Secret("another")
    assert reader.read(KeyReference("none")) is None


@pytest.mark.parametrize(
    "content", [b"", b"a b", b"a\r\nx-evil: 1", b"caf\xc3\xa9", b"x" * 20_000, b"a\0b"], ids=lambda c: repr(c[:8])
)
def test_a_key_that_no_header_can_carry_is_told_by_its_place_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(KeyUnreadable) as caught:
        KeyReader({}).read(KeyReference("file", str(file)))
    assert str(file) in str(caught.value)
    assert "evil" not in str(caught.value)
    with pytest.raises(KeyUnreadable):
        KeyReader({}).read(KeyReference("file", str(tmp_path)))


def test_a_key_has_the_letters_that_a_header_can_carry() -> None:
    """Not one more: a line end would begin a header of the key's own."""
    can = ""
    for number in (*range(0x180), 0x2028, 0xFF01, 0x1F600):
        with contextlib.suppress(KeyUnreadable):
            KeyReader({"A": f"a{chr(number)}b"}).read(KeyReference("env", "A"))
            can += chr(number)
    assert can == "".join(chr(number) for number in range(0x21, 0x7F))


async def test_a_missing_key_is_a_failure_that_says_what_to_set_and_how_to_do_without() -> None:
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told, api_key="env:NOT_SET") as clients:
        client = clients.of(clients.registry.provider("lab"))
        with pytest.raises(ProviderFailure) as caught:
            await client.whole(w.OUTGOING, w.terms())
        assert caught.value.failure.kind is FailureKind.AUTH
        for words in ("$NOT_SET", "providers.lab.api_key", "`ollama serve`", "pool/MODEL"):
            assert words in str(caught.value)
        assert client.key_id() == ""
        assert not told.seen


async def test_another_key_has_another_id_at_once() -> None:
    """The gateway forgets a key's failures when the key changes: by this id."""
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told) as clients:
        client = clients.of(clients.registry.provider("lab"))
        first = client.key_id()
        environ = clients.registry.keys.environ
        assert isinstance(environ, dict)
        environ["LAB_KEY"] = "sk-another-0123456789"
        assert client.key_id() not in (first, "")
        await client.whole(w.OUTGOING, w.terms())
        assert told.seen[0].headers["authorization"] == "Bearer sk-another-0123456789"


SCHEMES = {
    "bearer": ("authorization", f"Bearer {w.KEY}"),
    "x-api-key": ("x-api-key", w.KEY),
    "api-key": ("api-key", w.KEY),
    "x-goog-api-key": ("x-goog-api-key", w.KEY),
}


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_each_scheme_shows_the_key_where_it_says(scheme: str) -> None:
    name, value = SCHEMES[scheme]
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told, auth=scheme) as clients:
        await clients.of(clients.registry.provider("lab")).whole(w.OUTGOING, w.terms())
        assert told.seen[0].headers[name] == value
        assert sum(w.KEY in text for text in [told.seen[0].line, *told.seen[0].headers.values()]) == 1


async def test_a_key_in_the_address_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with w.wire(w.answers(w.REPLY)) as told, w.clients_of(told, auth="query") as clients:
        await clients.of(clients.registry.provider("lab")).whole(w.OUTGOING, w.terms())
        assert told.seen[0].line == f"POST /v1/chat/completions?key={w.KEY} HTTP/1.1"
    assert w.KEY not in caplog.text
