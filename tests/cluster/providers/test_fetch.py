"""No address of a client's leads into this network: not by its form, its name, its redirect, nor by a second answer."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import provider_wire as w
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diptych.cluster.providers.addresses import NotFetchable, read_url, refusal
from diptych.cluster.providers.fetch import Fetched, Fetcher
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.network import resolve
from diptych.protos.errors import InvalidRequest

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 40
IMAGES = ("image/png", "image/jpeg")
PUBLIC = "93.184.215.14"

# Each of them reaches this machine, a neighbour or a cloud's metadata by some reader's rules.
FORMS = """
https://127.0.0.1:{port}/ https://127.1:{port}/ https://2130706433:{port}/ https://0x7f000001:{port}/
https://0177.0.0.1:{port}/ https://0x7f.1:{port}/ https://127.0.0.1.:{port}/ https://0:{port}/ https://0.0.0.0:{port}/
https://[::1]:{port}/ https://[::]:{port}/ https://[::ffff:127.0.0.1]:{port}/ https://[::ffff:7f00:1]:{port}/
https://[::127.0.0.1]:{port}/ https://[64:ff9b::7f00:1]:{port}/ https://[2002:7f00:1::]:{port}/
https://[fe80::1%25lo]:{port}/ https://[fd00:ec2::254]/ https://169.254.169.254/latest/meta-data/
https://10.0.0.1/ https://172.16.0.1/ https://192.168.1.1/ https://100.100.100.200/ https://168.63.129.16/
https://localhost:{port}/ https://private.test:{port}/ https://user@127.0.0.1:{port}/ https://good.test@127.0.0.1:{port}/
https://good.test:{port}\\@127.0.0.1/ https:/127.0.0.1:{port}/ https:127.0.0.1:{port} https:///127.0.0.1:{port}/
file:///etc/passwd ftp://127.0.0.1:{port}/ gopher://127.0.0.1:{port}/ data:text/plain,x //127.0.0.1:{port}/
HTTPS://127.0.0.1:{port}/ https://127.0.0.1%00.good.test:{port}/ https://\u2460\u2461\u2466.0.0.1:{port}/
https://224.0.0.1/ https://255.255.255.255/ http://good.test/ https://good.test:{port}/ https://exa_mple..test/
""".split()


class Names:
    """A resolver of its own: by name, one answer after the other, the last one again and again."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        found = self.answers.get(host, [[host]])
        return found.pop(0) if len(found) > 1 else found[0]


def image(data: bytes = PNG, **headers: str) -> w.Behaviour:
    return w.answers(data, **{"content_type": "image/png", **headers})


async def fetch(fetcher: Fetcher, url: str) -> Fetched:
    return await fetcher.fetch(url, "messages[0].content[0]", IMAGES)


@pytest.mark.parametrize("form", FORMS)
async def test_no_form_of_an_address_reaches_this_network(form: str) -> None:
    """S08: a canary listens on loopback, and nothing ever connects to it."""
    names = Names(localhost=[["127.0.0.1", "::1"]], private_test=[["10.1.2.3"]], good_test=[[PUBLIC]])
    async with w.wire(image()) as canary:
        with pytest.raises(InvalidRequest) as caught:
            await fetch(Fetcher(resolve=names), form.format(port=canary.port))
        assert canary.num_accepted == 0
    assert caught.value.param == "messages[0].content[0]"
    assert "cannot be fetched: " in str(caught.value)


async def test_a_name_with_one_private_address_among_others_is_refused() -> None:
    names = Names(mixed_test=[[PUBLIC, "127.0.0.1"]])
    with pytest.raises(InvalidRequest, match=r"the address of mixed\.test is not of the public internet"):
        await fetch(Fetcher(resolve=names), "https://mixed.test/a.png")


@pytest.mark.parametrize(
    ("status", "form"), [*((f"{code} A", FORMS[0]) for code in (301, 303, 307, 308)), *(("302 A", f) for f in FORMS)]
)
async def test_a_redirect_is_checked_as_the_first_address_is(status: str, form: str) -> None:
    """S09: an allowed host answers with a redirect to an internal one."""
    async with w.wire(image()) as canary:
        to = form.format(port=canary.port)
        async with w.wire(w.answers(b"", status, location=to.encode("ascii", "replace").decode())) as outside:
            settings = FetchSettings(private_hosts=("cdn.test",))
            names = Names(cdn_test=[["127.0.0.1"]], localhost=[["127.0.0.1"]])
            with pytest.raises(InvalidRequest):
                await fetch(Fetcher(settings, names), f"http://cdn.test:{outside.port}/a.png")
            assert len(outside.seen) == 1
        assert canary.num_accepted == 0


async def test_a_second_answer_of_the_resolver_is_never_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """S09: the name's address changes between the check and the connection."""
    reached: list[str] = []

    async def connect(self: object, factory: object, host: str, port: int) -> None:
        reached.append(host)
        raise ConnectionRefusedError(111, "refused")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(type(loop), "create_connection", connect)
    names = Names(rebind_test=[[PUBLIC], ["127.0.0.1"]])
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            await fetch(Fetcher(resolve=names), "https://rebind.test/a.png")
    assert reached == [PUBLIC]
    assert names.asked == ["rebind.test"] * 2


async def test_names_that_are_never_resolved_hold_up_no_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images at names whose servers keep silent took all threads in which providers' names are looked up."""
    loop, is_over = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(2))
    known = socket.getaddrinfo

    def look_up(host: str, *args: Any, **options: Any) -> Any:
        if host.endswith(".silent.test"):
            is_over.wait(60)
            raise OSError
        return known("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    fetcher = Fetcher(FetchSettings(timeout_s=60))
    waiting = [asyncio.create_task(fetch(fetcher, f"https://{i}.silent.test/")) for i in range(12)]
    try:
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            assert await resolve("provider.test", 443) == ["127.0.0.1"]
    finally:
        is_over.set()
        for found in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(found, InvalidRequest)


async def test_what_is_allowed_is_fetched_with_nothing_of_ours() -> None:
    async with w.wire(image()) as outside:
        settings = FetchSettings(private_hosts=("*.lab.test",))
        names = Names(cdn_lab_test=[["127.0.0.1"]])
        found = await fetch(Fetcher(settings, names), f"http://cdn.lab.test:{outside.port}/a.png?x=1")
        assert (found.data, found.media_type) == (PNG, "image/png")
        (seen,) = outside.seen
        assert seen.line == "GET /a.png?x=1 HTTP/1.1"
        assert set(seen.headers) == {"host", "user-agent", "accept", "accept-encoding"}
        assert seen.headers["host"] == f"cdn.lab.test:{outside.port}"
        await outside.all_closed()


async def test_redirects_are_followed_to_their_limit() -> None:
    to = w.answers(b"", "302 Found", location="/b.png")
    async with w.wire(to, image(), to) as outside:
        fetcher = Fetcher(FetchSettings(private_hosts=("127.0.0.1",), max_redirects=1))
        url = f"http://127.0.0.1:{outside.port}/a.png"
        assert (await fetch(fetcher, url)).data == PNG
        with pytest.raises(InvalidRequest, match="more than 1 other addresses"):
            await fetch(fetcher, url)


async def test_an_allow_list_is_the_end_of_it() -> None:
    fetcher = Fetcher(FetchSettings(hosts=("good.test", "*.cdn.test")), Names())
    for host in ("bad.test", "cdn.test", "evilgood.test", "good.test.evil.test"):
        with pytest.raises(InvalidRequest, match="is not one that this server fetches from"):
            await fetch(fetcher, f"https://{host}/")
    with pytest.raises(InvalidRequest, match="send the content itself"):
        await fetch(Fetcher(FetchSettings(enabled=False)), "https://good.test/")


ENDLESS = w.sends(w.head(content_type="image/png"), PNG, b"\0" * 5000, then="hang")
WRONG = {
    "too large, told": (image(content_length="5000"), "more than 1000 bytes"),
    "too large, untold": (ENDLESS, "more than 1000 bytes"),
    "too large, by a lie": (w.sends(w.head(content_length="9" * 18, content_type="image/png")), "more than 1000"),
    "packed": (image(content_encoding="gzip"), "compressed"),
    "html": (w.answers(b"<html>", content_type="text/html"), "of the type text/html"),
    "html that says png": (image(b"<html><script>"), "what is there is not image/"),
    "svg": (w.answers(b"<svg/>", content_type="image/svg+xml"), "of the type image/svg"),
    "untold": (w.answers(b"anything", content_type="application/octet-stream"), "what is there is not image/"),
    "empty": (image(b""), "what is there is not image/"),
    "404": (w.answers(b"", "404 Not Found"), "answered 404"),
    "cut": (
        w.sends(w.head(content_length="100", content_type="image/png") + PNG, then="close"),
        "broke the answer off",
    ),
    "not http": (w.sends(b"SSH-2.0\r\n\r\n", then="close"), "not HTTP"),
    "slow": (w.sends(then="hang"), "within 0.2 s"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_not_a_picture_of_the_right_size_is_refused(name: str) -> None:
    """S11: nothing is unpacked or read beyond its limit."""
    behaviour, words = WRONG[name]
    async with w.wire(behaviour) as outside:
        timeout_s = 0.2 if name == "slow" else 60
        settings = FetchSettings(private_hosts=("127.0.0.1",), max_bytes=1000, timeout_s=timeout_s)
        with pytest.raises(InvalidRequest, match=words):
            await fetch(Fetcher(settings), f"http://127.0.0.1:{outside.port}/")
        await outside.all_closed()


async def test_the_first_bytes_say_what_a_file_is() -> None:
    async with w.wire(image(b"\xff\xd8\xff\xe0" + b"\0" * 9)) as outside:
        found = await fetch(Fetcher(FetchSettings(private_hosts=("127.0.0.1",))), f"http://127.0.0.1:{outside.port}/")
        assert found.media_type == "image/jpeg"


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1))
@example(int(ipaddress.ip_address("169.254.169.254")))
def test_an_ipv4_address_is_refused_in_every_ipv6_form_too(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    if not address.is_global:
        assert refusal(str(address))
    for prefix in ("::ffff:0:0", "::", "64:ff9b::", "2002::"):
        shift = 80 if prefix == "2002::" else 0
        inside = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | (number << shift))
        assert refusal(str(inside))
    assert refusal(str(ipaddress.IPv6Address((0x2A00 << 112) | (0x5EFE << 32) | number)))


def test_public_addresses_are_not_refused() -> None:
    for address in (PUBLIC, "1.1.1.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "2a00:1450:4001::65"):
        assert refusal(address) == ""


@settings(max_examples=150)
@given(st.text(max_size=60) | st.from_regex(r"https?://[!-~]{0,40}", fullmatch=True))
def test_an_address_is_read_in_one_way_or_not_at_all(url: str) -> None:
    """What is checked must be what is connected to: nothing of the text may end up elsewhere."""
    try:
        place = read_url(url)
    except NotFetchable:
        return
    again = read_url(f"{place.scheme}://{place.netloc}{place.target}")
    assert again == place
    assert "@" not in place.netloc
    assert not set(place.target + place.host) & set(" \r\n\t\\")
