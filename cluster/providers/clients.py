"""The clients of one process: one for each provider that is used, made when it is first asked for.

The gateway holds one of these. It knows neither models nor requests.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import cache

import httpcore2
from prometheus_client import CollectorRegistry

from diptych.protos.failures import FailureKind

from .auth import auth_for, refused
from .client import ProviderClient
from .litellm_client import LitellmClient
from .metrics import Counts, ProviderMetrics
from .network import Resolve, resolve
from .network_failures import failed
from .provider import Provider
from .registry import Registry


@cache
def _tls(ca_file: str) -> ssl.SSLContext:
    """Making one takes milliseconds, and all clients can share it."""
    if not ca_file:
        return httpcore2.default_ssl_context()
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as exc:
        reason = (exc.strerror if not isinstance(exc, ssl.SSLError) else "") or "it holds no certificates in PEM"
        raise failed(FailureKind.CONNECT, f"the authorities in {ca_file} cannot be read: {reason}", "ca_file") from exc


class Clients:
    """Providers' clients by their names."""

    def __init__(self, registry: Registry, metrics: ProviderMetrics | None = None, resolve: Resolve = resolve) -> None:
        self.registry = registry
        self._metrics = metrics if metrics is not None else ProviderMetrics(CollectorRegistry())
        self._resolve = resolve
        self._clients: dict[str, ProviderClient | LitellmClient] = {}

    def of(self, provider: Provider) -> ProviderClient | LitellmClient:
        """Its client; the same each time. Raises ProviderFailure where its address is not complete (AUTH), or
        its `ca_file` holds none (CONNECT).
        """
        client = self._clients.get(provider.name)
        if client is None or client.provider is not provider:
            if provider.lacks:
                raise refused(provider.lacks)
            client = self._clients[provider.name] = self._made(provider)
        return client

    async def close(self) -> None:
        """Closes all connections."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()

    def _made(self, provider: Provider) -> ProviderClient | LitellmClient:
        def counts(read: Callable[[], int]) -> Counts:
            return self._metrics.of(provider.name, read)

        if provider.via == "litellm":
            return LitellmClient(provider, self.registry.keys, counts)
        return ProviderClient(
            provider,
            auth_for(provider, self.registry.keys),
            counts,
            tls=_tls(provider.ca_file) if provider.base_url.startswith("https") else None,
            resolve=self._resolve,
        )
