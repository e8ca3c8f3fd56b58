"""Which addresses of the internet may be reached for a client's sake, and which texts are addresses at all.

fetch.py asks before each connection. Whatever leads, or might lead, back into this network is refused; so are all
forms of one address inside another.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

MAX_URL_CHARS: Final = 8192
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)
# Public ones that are a cloud's own, or lead to other networks.
_REFUSED_V4 = tuple(
    ipaddress.ip_network(text)
    for text in ("168.63.129.16/32", "192.88.99.0/24", "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15")
)
_REFUSED_V6 = tuple(
    ipaddress.ip_network(text)
    for text in (
        "::/96",  # IPv4 inside, compatible
        "::ffff:0:0/96",  # mapped
        "::ffff:0:0:0/96",  # translated
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",  # Teredo and protocol assignments
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)


class NotFetchable(ValueError):
    """Why an address is not reached; a phrase for the client."""


@dataclass(frozen=True, slots=True)
class Place:
    """An http(s) address in its parts. `target` is path and query; `host` is in lower case, without brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """For the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == {"http": 80, "https": 443}[self.scheme] else f"{host}:{self.port}"


def read_url(url: str) -> Place:
    """An address that every reader reads in the same way. Raises NotFetchable."""
    if len(url) > MAX_URL_CHARS:
        raise NotFetchable(f"it has more than {MAX_URL_CHARS} characters")
    if not url.isascii() or any(letter <= " " or letter in '\\<>"{}|^`\x7f' for letter in url):
        raise NotFetchable("it holds letters that an address cannot: write them with %")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise NotFetchable("it is no address") from None
    if parts.scheme not in ("http", "https") or not url.startswith(f"{parts.scheme}://"):
        raise NotFetchable("it is not of http or https")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise NotFetchable("it holds a name or a password")
    host = (parts.hostname or "").removesuffix(".")
    _check_host(host, is_bracketed="[" in parts.netloc)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, host, port if port is not None else 443 if parts.scheme == "https" else 80, target)


def _check_host(host: str, *, is_bracketed: bool) -> None:
    if is_bracketed:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise NotFetchable("its host is no IPv6 address") from None
        return
    labels = host.split(".")
    if not host or len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise NotFetchable("its host is no name")
    if _NUMBER.fullmatch(labels[-1]):
        # Other readers take 127.1, 0x7f.1 and 2130706433 for addresses.
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise NotFetchable("its host is a number, and not in the form 192.0.2.1") from None


def refusal(address: str) -> str:
    """Why an IP address is not reached for a client; empty: it may be."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "is no IP address"
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        return "is of one machine's network"
    refused = _REFUSED_V4 if found.version == 4 else _REFUSED_V6
    if not found.is_global or found.is_multicast or found.is_reserved or any(found in network for network in refused):
        return "is not of the public internet"
    if found.version == 6 and (int(found) >> 32) & 0xFFFF_FFFF in (0x0000_5EFE, 0x0200_5EFE):
        return "is not of the public internet"  # ISATAP: IPv4 inside
    return ""
