"""The branch `providers:` of diptych.yaml: which of the built-in providers are used, how they differ here, own ones.

registry.py makes Providers of it. Keys are named by reference: a key itself is refused, and never repeated.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from diptych.protos.settings import Settings

from .provider import AUTH_SCHEMES, AuthScheme
from .secrets import KeyReference, redacted
from .table import NAME, RESERVED, known_codec, read_quirks

LITELLM = "litellm"  # in place of a codec: the library's own
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_OWN_HEADERS = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding", "expect", "upgrade")
_KEY_HEADER = re.compile(r"(?i)auth|(?:^|-)(?:api-?)?key$|secret|token$|password|^cookie$")
_LOCAL_ENDINGS = (".local", ".internal", ".lan", ".svc", ".cluster.local", ".home.arpa", ".test", ".localhost")


class ProviderSettings(Settings):
    """A provider: one of the built-in table, as it is or changed, or an own one, which names base_url and codec."""

    base_url: str | None = Field(None, description="where its API begins, for example http://10.0.0.7:8000/v1")
    codec: str | None = Field(
        None,
        description="what it speaks: openai.chat, openai.responses, anthropic.messages, gemini.generate or "
        "bedrock.converse; litellm: whatever that package speaks, which diptych[litellm] installs; null: the table's, "
        "for an own one openai.chat",
    )
    api_key: str | None = Field(
        None, description="where its key is: env:NAME, file:/path or none; null: the variable that the table names"
    )
    auth: AuthScheme | None = Field(
        None,
        description="how the key is shown: bearer, x-api-key, api-key, x-goog-api-key (headers), query, google, aws "
        "or none; null: the table's, for an own one as its codec's maker does it",
    )
    account: str | None = Field(None, description="for {account} in the table's address: a resource or a project")
    region: str | None = Field(None, description="for {region} in the table's address")
    quirks: dict[str, Any] = Field(
        {}, description="how it differs from the format that it speaks; docs/providers.md lists them"
    )
    reads_urls: bool | None = Field(
        None,
        description="it fetches images and documents by their addresses; false: they are fetched here and sent; "
        "null: the table's, for an own one false",
    )
    headers: dict[str, str] = Field({}, description="sent with each request; no keys")
    proxy: str | None = Field(
        None, description="http://host:port of a proxy; null: $HTTPS_PROXY for https, unless $NO_PROXY excepts the host"
    )
    ca_file: str | None = Field(None, description="PEM file of the authorities to trust instead of the system's")
    max_connections: int = Field(512, ge=1, description="open connections of a router replica to it")
    allow_plaintext: bool = Field(False, description="send the key over plain http to a host outside this network")

    @field_validator("base_url")
    @classmethod
    def _address(cls, url: str | None) -> str | None:
        return url if url is None else checked_base_url(url)

    @field_validator("codec")
    @classmethod
    def _codec(cls, name: str | None) -> str | None:
        return name if name in (None, LITELLM) else known_codec(name)

    @field_validator("api_key", mode="before")
    @classmethod
    def _reference(cls, given: object) -> object:
        if given is not None:
            KeyReference.parse(given)
        return given

    @field_validator("auth", mode="before")
    @classmethod
    def _scheme(cls, given: object) -> object:
        if given is not None and given not in AUTH_SCHEMES:
            raise ValueError(f"should be one of {', '.join(AUTH_SCHEMES)}")
        return given

    @field_validator("account", "region")
    @classmethod
    def _placed(cls, given: str | None, info: ValidationInfo) -> str | None:
        return given if given is None else checked_place(given)

    @field_validator("quirks")
    @classmethod
    def _quirks(cls, given: dict[str, Any]) -> dict[str, Any]:
        headers = read_quirks(given).get("headers", {})
        try:
            checked_headers(headers)
        except ValueError as exc:
            raise ValueError(f"headers: {exc}") from None
        return given

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, given: dict[str, str]) -> dict[str, str]:
        return checked_headers(given)

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:_-]+/?", url):
            raise ValueError("should be http://host:port; a name or password for it does not belong in a configuration")
        return url


Named = TypeVar("Named", bound=Mapping[str, Any])
_BY_KEY = ": a key is named by api_key (env:NAME or file:/path), and how it is shown by auth"


def checked_headers(given: Mapping[str, str]) -> dict[str, str]:
    """Headers that are always sent: none that the client writes itself, and no key. Raises ValueError, which repeats no
    value.
    """
    for name, value in given.items():
        if not _HEADER.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise ValueError(f"{name[:64]!r} cannot be set here")
        if _KEY_HEADER.search(name) or redacted(value) != value:
            raise ValueError(f"{name!r} cannot be set here" + _BY_KEY)
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"{name}: its value has letters that no header can carry")
    return dict(given)


def checked_names(providers: Named) -> Named:
    """The group `providers`, whose names can be ones. Raises ValueError."""
    for name in providers:
        if name in RESERVED:
            raise ValueError(f"{name!r} is what own pools are called by; give the provider another name")
        if not NAME.fullmatch(name):
            hint = f"; write {name.lower()}" if NAME.fullmatch(name.lower()) else ""
            raise ValueError(
                f"{name!r} cannot be a provider's name: lower-case letters, digits, '.', '_' and '-'{hint}"
            )
    return providers


NamedProviders = Annotated[dict[str, ProviderSettings], AfterValidator(checked_names)]


def checked_base_url(url: str) -> str:
    """An address without anything that does not belong there. Raises ValueError, which repeats no password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("should be an address such as https://api.example.com/v1") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError("should hold no name or password: a key is named by api_key (env:NAME or file:/path)")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("should be an address such as https://api.example.com/v1, http or https")
    if parts.query or parts.fragment or not url.isascii() or any(letter <= " " for letter in url):
        raise ValueError("should end with the path: no '?', '#', spaces or letters outside ASCII")
    for ending in ("/chat/completions", "/messages", "/responses"):
        if parts.path.rstrip("/").endswith(ending):
            raise ValueError(f"should end before {ending}, which is added to it")
    return url.rstrip("/")


def checked_place(text: str) -> str:
    """What may stand for {account} or {region}. Raises ValueError."""
    if not _PLACE.fullmatch(text):
        raise ValueError(f"{redacted(text[:64])!r} should be a name: letters, digits, '.', '_' and '-'")
    return text


def is_near(url: str) -> bool:
    """Whether an address says by itself that it is of this machine or this network."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_LOCAL_ENDINGS)
    return address.is_private or address.is_loopback or address.is_link_local
