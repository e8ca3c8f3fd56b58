"""How a request shows who pays for it. client.py asks for what one request needs, just before it is sent.

auth_google.py and auth_aws.py hold the two ways that need another package; `auth_for` chooses. None of them sends
anything to a provider.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets as random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .provider import Provider
from .secrets import KeyReader, KeyUnreadable, Secret

_SALT: Final = random.token_bytes(16)  # key ids of two processes tell nothing about each other's keys


@dataclass(frozen=True, slots=True)
class Sending:
    """A request as far as a signature covers it. `url` is complete, `headers` have their names in lower case."""

    url: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Shown:
    """What goes with one request: headers, parameters of the address. `secrets` are what no text may repeat."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[Secret, ...] = ()


class Auth(Protocol):
    """One provider's way."""

    async def show(self, sending: Sending) -> Shown:
        """For this request. Raises ProviderFailure (AUTH) where there is no key, or none that can be used."""

    def key_id(self) -> str:
        """Another text for another key, which tells nothing about it; empty where there is none. Never raises."""


def key_id_of(secret: Secret) -> str:
    """Twelve characters that are the same for the same key, in this process."""
    return hmac.new(_SALT, secret.reveal().encode(), hashlib.sha256).hexdigest()[:12]


def needs_key(provider: Provider) -> str:
    """What to do where a key is missing, and how to do without: a sentence."""
    where = str(provider.key) if provider.key.kind != "none" else "its key"
    set_it = f"put it into {where}" if provider.key.kind == "file" else f"set {where}"
    return (
        f"{provider.name} needs a key: {set_it}, or say where it is by providers.{provider.name}.api_key "
        "(env:NAME or file:/path); without any key, start `ollama serve` and use ollama/MODEL, or serve an own pool "
        "and use pool/MODEL"
    )


def needs_litellm(name: str, why: str = "") -> str:
    """What to do where the library that a provider is reached through is not there."""
    return f"{name} is reached through the package litellm, which is not installed{why}: pip install 'diptych[litellm]'"


def refused(message: str) -> ProviderFailure:
    """No key, or none that can be used; nothing was sent."""
    return ProviderFailure(Failure(kind=FailureKind.AUTH, message=message, code="no_key"))


class KeyAuth:
    """A key as it is: in a header or a parameter."""

    def __init__(self, provider: Provider, keys: KeyReader) -> None:
        self._provider = provider
        self._keys = keys
        self._last: tuple[Secret, Shown] | None = None

    async def show(self, sending: Sending) -> Shown:
        """See Auth."""
        secret = self.secret()
        if secret is None:
            return Shown()
        last = self._last
        if last is None or (last[0] is not secret and last[0] != secret):
            last = self._last = (secret, _shown(self._provider.auth, secret))
        return last[1]

    def secret(self) -> Secret | None:
        """The key; None where the provider may go without. Raises ProviderFailure (AUTH)."""
        secret = self.try_secret()
        may_lack = self._provider.keyless or self._provider.auth == "none" or self._provider.key.kind == "none"
        if secret is None and not may_lack:
            raise refused(needs_key(self._provider))
        return secret

    def try_secret(self) -> Secret | None:
        """The key where there is one. Raises ProviderFailure (AUTH) for one that cannot be used."""
        try:
            return self._keys.read(self._provider.key)
        except KeyUnreadable as exc:
            raise refused(f"{self._provider.name}: {exc}") from None

    def key_id(self) -> str:
        """See Auth."""
        try:
            secret = self._keys.read(self._provider.key)
        except KeyUnreadable:
            return ""
        return key_id_of(secret) if secret is not None else ""


def _shown(scheme: str, secret: Secret) -> Shown:
    key = secret.reveal()
    match scheme:
        case "bearer" | "aws":
            return Shown({"authorization": f"Bearer {key}"}, secrets=(secret,))
        case "query":
            return Shown(query={"key": key}, secrets=(secret,))
        case "none":
            return Shown()
        case name:
            return Shown({name: key}, secrets=(secret,))


def auth_for(provider: Provider, keys: KeyReader) -> Auth:
    """The provider's way. Needs no other package yet."""
    if provider.auth == "google":
        from .auth_google import GoogleAuth

        return GoogleAuth(provider, keys)
    if provider.auth == "aws":
        from .auth_aws import AwsAuth

        return AwsAuth(provider, keys)
    return KeyAuth(provider, keys)
