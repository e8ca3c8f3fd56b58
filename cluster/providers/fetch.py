"""The one fetcher of what clients' addresses lead to: images and documents that go into a request as bytes.

A host's name is resolved once, all that it stands for is checked, and the connection goes to just these addresses;
each redirect is another address and is checked alike. Nothing of the client's or of this server's is sent along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urljoin

import httpcore2

from diptych.protos.errors import InvalidRequest
from diptych.protos.providers.media_types import by_bytes
from diptych.protos.strict_json import printable

from .addresses import NotFetchable, Place, read_url, refusal
from .fetch_settings import FetchSettings
from .metrics import FetchMetrics
from .network import AddressRefused, NameUnknown, Network, Resolve, TlsFailed, resolve
from .room import Room

_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = (301, 302, 303, 307, 308)
# Kinds that all begin with the bytes that `by_bytes` knows: what begins in another way is none of them.
_SAY_THEMSELVES = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf"})
_LOOKUPS: Final = ThreadPoolExecutor(8, "fetch-lookup")
_UNTOLD: Final = ("", "application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was there. `media_type` is in lower case and without parameters, as told or as the first bytes say."""

    data: bytes = field(repr=False)
    media_type: str


class Fetcher:
    """For any number of files at once; connections are not kept. Who fetches holds a part of `room` while the bytes are
    there.
    """

    def __init__(
        self,
        settings: FetchSettings | None = None,
        resolve: Resolve | None = None,
        metrics: FetchMetrics | None = None,
    ) -> None:
        self.settings = settings if settings is not None else FetchSettings()
        self.room = Room(self.settings.held_bytes, metrics)
        self._resolve = resolve if resolve is not None else _resolve_apart

    async def fetch(self, url: str, path: str, media_types: Collection[str], most_bytes: int | None = None) -> Fetched:
        """The bytes at `url`, of one of `media_types` (`image/png`, or `image/*` for all such). `path` is the field for
        the error. Raises InvalidRequest for all that goes wrong, with the reason.
        """
        try:
            if not self.settings.enabled:
                raise NotFetchable("this server fetches nothing: send the content itself as data:TYPE;base64,...")
            async with asyncio.timeout(self.settings.timeout_s):
                return await self._followed(url, media_types, min(most_bytes or 1 << 62, self.settings.max_bytes))
        except TimeoutError:
            reason = f"it did not come within {self.settings.timeout_s:g} s"
        except (NotFetchable, NameUnknown, AddressRefused, TlsFailed) as exc:
            reason = str(exc)
        except httpcore2.ConnectError:
            reason = "its host cannot be reached"
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError):
            reason = "its host broke the answer off, or sent something that is not HTTP"
        raise InvalidRequest(f"{path}: {printable(url, 100)} cannot be fetched: {reason}", path)

    async def _followed(self, url: str, media_types: Collection[str], most_bytes: int) -> Fetched:
        for _ in range(self.settings.max_redirects + 1):
            place = read_url(url)
            self._check(place)
            found = await self._at(place, media_types, most_bytes)
            if isinstance(found, Fetched):
                return found
            url = urljoin(url, found)
        raise NotFetchable(f"it leads to more than {self.settings.max_redirects} other addresses")

    def _check(self, place: Place) -> None:
        settings = self.settings
        if _is_named(place.host, settings.private_hosts):
            return
        if settings.hosts and not _is_named(place.host, settings.hosts):
            raise NotFetchable(f"the host {place.host} is not one that this server fetches from")
        if place.scheme == "http" and not settings.http:
            raise NotFetchable("plain http is not fetched: use https")
        if place.port != _PORTS[place.scheme]:
            raise NotFetchable(f"the port {place.port} is not the one of {place.scheme}")

    async def _at(self, place: Place, media_types: Collection[str], most_bytes: int) -> Fetched | str:
        """The file, or where a redirect leads."""
        pool = httpcore2.AsyncConnectionPool(max_keepalive_connections=0, network_backend=Network(self._checked))
        url = httpcore2.URL(
            scheme=place.scheme.encode(),
            host=place.host.encode(),
            port=place.port,
            target=place.target.encode(),
        )
        headers = {
            "host": place.netloc,
            "user-agent": "diptych",
            "accept": ", ".join(sorted(media_types)),
            "accept-encoding": "identity",
        }
        request = httpcore2.Request("GET", url, headers=[(k.encode(), v.encode()) for k, v in headers.items()])
        async with pool:
            response = await pool.handle_async_request(request)
            try:
                return await self._read(response, media_types, most_bytes)
            finally:
                await response.aclose()

    async def _checked(self, host: str, port: int) -> Sequence[str]:
        """The addresses to connect to: all of the host's, each of them allowed."""
        addresses = await self._resolve(host, port)
        if not _is_named(host, self.settings.private_hosts):
            for address in addresses:
                if reason := refusal(address):
                    raise AddressRefused(f"the address of {host} {reason}")
        return addresses

    async def _read(self, response: httpcore2.Response, media_types: Collection[str], most_bytes: int) -> Fetched | str:
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and "location" in headers:
            return headers["location"]
        if response.status != 200:
            raise NotFetchable(f"its host answered {response.status}")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise NotFetchable("its host sent it compressed, which was not asked for")
        too_large = f"it has more than {most_bytes} bytes"
        if (told := headers.get("content-length", "0")).isdigit() and int(told[:18]) > most_bytes:
            raise NotFetchable(too_large)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in _UNTOLD and not is_one_of(media_type, media_types):
            raise NotFetchable(f"it is of the type {printable(media_type, 60)}, and {_listed(media_types)} is wanted")
        pieces, size_bytes = [], 0
        async for piece in response.aiter_stream():
            size_bytes += len(piece)
            if size_bytes > most_bytes:
                raise NotFetchable(too_large)
            pieces.append(piece)
        data = b"".join(pieces)
        found = by_bytes(data)  # has the last word: readers go by them
        is_other = not found and media_type in _SAY_THEMSELVES
        media_type = found or media_type
        if not data or is_other or not is_one_of(media_type, media_types):
            raise NotFetchable(f"what is there is not {_listed(media_types)}")
        return Fetched(data, media_type)


async def _resolve_apart(host: str, port: int) -> Sequence[str]:
    """In threads of its own: names whose servers never answer, a client's choice, must not hold up the threads in which
    providers' names are looked up.
    """
    return await resolve(host, port, _LOOKUPS)


def _is_named(host: str, names: Collection[str]) -> bool:
    for name in names:
        name = name.lower()
        if host == name or (name.startswith("*.") and host.endswith(name[1:])):
            return True
    return False


def is_one_of(media_type: str, wanted: Collection[str]) -> bool:
    """Whether a media type is among `wanted`, in which `image/*` stands for all images."""
    return media_type in wanted or f"{media_type.partition('/')[0]}/*" in wanted


def _listed(media_types: Collection[str]) -> str:
    return " or ".join(sorted(media_types))
