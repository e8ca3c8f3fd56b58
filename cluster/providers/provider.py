"""A provider as it is used: the table's data with a configuration's changes, addresses complete, keys by reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import urlsplit

from diptych.protos.providers.quirks import Quirks

from .secrets import NO_KEY, KeyReference

# How a request shows its key: three names of headers, a query parameter, Google's and Amazon's own ways, or not at all.
AuthScheme = Literal["bearer", "x-api-key", "api-key", "x-goog-api-key", "query", "google", "aws", "none"]
AUTH_SCHEMES: tuple[AuthScheme, ...] = get_args(AuthScheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """An outside service. `lacks` says in a sentence what keeps it from being used, empty: nothing that is known before
    its key is read. `keyless` says how to start one that needs no key; empty: a key is needed.
    """

    name: str
    title: str
    base_url: str  # empty: the library's own (via litellm)
    codec: str
    via: Literal["http", "litellm"] = "http"  # who talks to it: client.py, or litellm_client.py
    auth: AuthScheme = "bearer"
    key: KeyReference = NO_KEY
    keyless: str = ""
    quirks: Quirks = field(default_factory=Quirks)
    headers: Mapping[str, str] = field(default_factory=dict)
    # How addresses of media begin that it fetches itself; what is behind others must be sent (inlined_media.py).
    reads_urls: tuple[str, ...] = ("https://", "http://")
    region: str = ""
    service: str = ""  # Amazon's word for it, which signatures hold
    source: str = ""
    checked: str = ""
    is_built_in: bool = False
    lacks: str = ""
    proxy: str = field(default="", repr=False)  # may hold a password, of the environment
    ca_file: str = ""
    max_connections: int = 512

    @property
    def host(self) -> str:
        """Where its key may go, with the port where one is named."""
        return urlsplit(self.base_url).netloc

    def __str__(self) -> str:
        return self.name
