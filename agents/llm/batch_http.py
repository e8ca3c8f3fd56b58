"""Files and batches of a provider over HTTP: the provider's own address and key, one request a step.

batch_places.py knows what is asked. Nothing is asked twice here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diptych.protos.failures import Failure, FailureKind, ProviderFailure

from .background import of_this_loop
from .network import check_network
from .upstream import HttpUpstream

if TYPE_CHECKING:
    import httpx2

JsonObject = dict[str, Any]
MAX_RESULT_BYTES = 1 << 30  # a file of results that is larger is refused
_TIMEOUT_S = 60.0  # to connect, and between two pieces of an answer


@dataclass(frozen=True, slots=True)
class File:
    """To upload."""

    name: str
    content: bytes = field(repr=False)
    form: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Asking:
    """A step: one request, and the bytes of its answer. Raises ProviderFailure."""

    upstream: HttpUpstream
    method: str
    path: str  # behind the provider's base URL
    body: JsonObject | File | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)

    async def perform(self) -> bytes:
        """Ask."""
        import httpx2

        from diptych.cluster.providers.auth import Sending, auth_for
        from diptych.cluster.providers.secrets import redacted

        provider = self.upstream.provider
        url = provider.base_url.rstrip("/") + self.path
        check_network(url, f"the batches of {provider.name}")
        headers = {"user-agent": "diptych", **_lower(provider.headers), **_lower(self.headers)}
        shown = await auth_for(provider, self.upstream.keys).show(Sending(url, headers, b""))
        query = {**self.query, **dict(shown.query)}
        client = await of_this_loop(("batches", self.upstream), self._client, httpx2.AsyncClient.aclose)
        try:
            request = client.build_request(
                self.method,
                url,
                params=query or None,
                headers={**headers, **shown.headers},
                **self._content(),
            )
            answer = await client.send(request, stream=True)
            try:
                content = await _read(answer, provider.name)
            finally:
                await answer.aclose()
        except httpx2.TransportError as exc:
            kind = FailureKind.CONNECT if isinstance(exc, httpx2.ConnectError) else FailureKind.SERVER
            words = redacted(f"{provider.name} cannot be asked for batches: {exc or type(exc).__name__}", shown.secrets)
            raise ProviderFailure(Failure(kind=kind, message=words, code="network"), provider.name) from exc
        if answer.is_success:
            return content
        headers = {name.lower(): value for name, value in answer.headers.items()}
        found = self.upstream.codec.failure(answer.status_code, headers, content)
        clean = Failure(
            kind=found.kind,
            message=redacted(found.message, shown.secrets),
            status=answer.status_code,
            retry_after_s=found.retry_after_s,
            param=found.param,
            code=found.code,
        )
        raise ProviderFailure(clean, provider.name)

    def _client(self) -> httpx2.AsyncClient:
        import ssl

        import httpx2

        provider = self.upstream.provider
        return httpx2.AsyncClient(
            timeout=_TIMEOUT_S,
            follow_redirects=False,
            trust_env=False,
            proxy=provider.proxy or None,
            verify=ssl.create_default_context(cafile=provider.ca_file) if provider.ca_file else True,
        )

    def _content(self) -> dict[str, Any]:
        if isinstance(self.body, File):
            return {"data": dict(self.body.form), "files": {"file": (self.body.name, self.body.content)}}
        return {} if self.body is None else {"json": self.body}


def json_of(content: bytes, what: str) -> JsonObject:
    """The object in an answer. Raises ProviderFailure."""
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=f"{what} is no JSON object", code="malformed"))
    return found


def objects_in(content: bytes) -> list[JsonObject]:
    """The lines of a file that are JSON objects. Other ends of lines than LF are part of texts."""
    found = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


async def _read(answer: httpx2.Response, name: str) -> bytes:
    pieces, size = [], 0
    async for piece in answer.aiter_bytes():
        size += len(piece)
        if size > MAX_RESULT_BYTES:
            words = f"{name} sent more than {MAX_RESULT_BYTES >> 20} MiB of results"
            raise ProviderFailure(Failure(kind=FailureKind.SERVER, message=words, code="too_large"), name)
        pieces.append(piece)
    return b"".join(pieces)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}
