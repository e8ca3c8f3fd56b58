"""Connections: TLS is checked against the name that was asked for, a host's second address is tried, bytes are kept."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

import provider_wire as w
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.network import Network, Stream
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings
from diptych.protos.failures import FailureKind, ProviderFailure


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert, private


async def loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


async def test_tls_is_with_the_name_that_was_asked_for(tmp_path: Path) -> None:
    """A key sent over a connection whose certificate nobody checked is a key given away."""
    cert, private = certificate(tmp_path, "lab.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    names: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    async with w.wire(w.streams(*w.WHOLE_STREAM), tls=context) as told:

        def lab(host: str, ca_file: str | None) -> ProviderSettings:
            return ProviderSettings(base_url=f"https://{host}:{told.port}/v1", api_key="env:K", ca_file=ca_file)

        registry = Registry.load(
            {
                "right": lab("lab.test", str(cert)),
                "other": lab("other.test", str(cert)),
                "untrusted": lab("lab.test", None),
            },
            {"K": w.KEY},
        )
        clients = Clients(registry, resolve=loopback)
        events = [event async for event in clients.of(registry.provider("right")).stream(w.STREAMED, w.terms())]
        assert events
        assert told.seen[0].headers["host"] == f"lab.test:{told.port}"
        for name, words in (("other", "other.test"), ("untrusted", "self-signed certificate")):
            with pytest.raises(ProviderFailure) as caught:
                await clients.of(registry.provider(name)).whole(w.OUTGOING, w.terms())
            assert (caught.value.failure.kind, caught.value.failure.code) == (FailureKind.CONNECT, "tls")
            assert words in str(caught.value)
        await clients.close()
    assert names == ["lab.test", "other.test", "lab.test"]
    assert len(told.seen) == 1


async def test_a_proxy_sees_the_hosts_name_and_nothing_of_the_key(tmp_path: Path) -> None:
    """$HTTPS_PROXY stands for a tunnel; its own password is for it alone."""
    cert, private = certificate(tmp_path, "lab.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    passed = bytearray()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed.extend(await reader.readuntil(b"\r\n\r\n"))
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", told.port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while piece := await source.read(1 << 16):
                passed.extend(piece)
                sink.write(piece)
            sink.close()

        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with w.wire(w.answers(w.REPLY), tls=context) as told:
        proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        lab = ProviderSettings(base_url=f"https://lab.test:{told.port}/v1", api_key="env:K", ca_file=str(cert))
        registry = Registry.load({"lab": lab}, {"K": w.KEY, "HTTPS_PROXY": f"http://user:pass%40word@127.0.0.1:{port}"})
        assert "pass" not in repr(registry.provider("lab"))
        clients = Clients(registry)
        reply = await clients.of(registry.provider("lab")).whole(w.OUTGOING, w.terms())
        assert reply.message.content == "hello"
        assert told.seen[0].headers["authorization"] == f"Bearer {w.KEY}"
        assert "proxy-authorization" not in told.seen[0].headers
        await clients.close()
        await told.all_closed()
        proxy.close()
    assert bytes(passed).startswith(f"CONNECT lab.test:{told.port} HTTP/1.1".encode())
    assert b"proxy-authorization: basic " in bytes(passed).lower()
    assert w.KEY.encode() not in passed


async def test_authorities_that_cannot_be_read_are_a_failure_of_the_provider(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        lab = ProviderSettings(base_url="https://lab.test/v1", api_key="none", ca_file=str(file))
        registry = Registry.load({"lab": lab}, {})
        with pytest.raises(ProviderFailure, match="authorities"):
            Clients(registry).of(registry.provider("lab"))


async def test_plain_http_where_tls_is_expected_is_told(tmp_path: Path) -> None:
    async with w.wire(w.answers(w.REPLY)) as told:
        registry = Registry.load({"lab": ProviderSettings(base_url=f"https://x.test:{told.port}", api_key="none")}, {})
        clients = Clients(registry, resolve=loopback)
        with pytest.raises(ProviderFailure) as caught:
            await clients.of(registry.provider("lab")).whole(w.OUTGOING, w.terms(connect_s=0.1))
        assert caught.value.failure.kind is FailureKind.CONNECT
        await clients.close()


async def test_the_second_address_is_tried_when_the_first_refuses() -> None:
    async def two(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]

    async with w.wire(w.answers(w.REPLY)) as told:
        registry = Registry.load({"lab": ProviderSettings(base_url=f"http://lab:{told.port}", api_key="none")}, {})
        clients = Clients(registry, resolve=two)
        reply = await clients.of(registry.provider("lab")).whole(w.OUTGOING, w.terms())
        assert reply.message.content == "hello"
        assert ipaddress.ip_address("127.0.0.2").is_loopback
        await clients.close()


async def test_more_bytes_than_are_read_stop_the_peer_and_none_is_lost() -> None:
    sent = bytes(range(256)) * (4 << 12)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    network = Network()
    stream: Stream = await network.connect_tcp("127.0.0.1", server.sockets[0].getsockname()[1], timeout=5)
    assert network.open == {stream}
    got = bytearray()
    while piece := await stream.read(1 << 16):
        got += piece
        await asyncio.sleep(0)
    assert bytes(got) == sent
    await stream.aclose()
    await asyncio.sleep(0)
    assert network.open == set()
    server.close()
