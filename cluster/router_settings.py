"""The branch `router:` of diptych.yaml: where it listens, what one client may ask of it, how it chooses engines.

config.py has it in its tree; a router replica receives it. It knows neither engines nor models.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import Field, field_validator

from diptych.cluster.batches.settings import BatchSettings, FileSettings
from diptych.cluster.browser_settings import BrowserSettings
from diptych.protos.settings import Bytes, Seconds, Settings

Port = Annotated[int, Field(ge=0, le=65535)]


class LimitSettings(Settings):
    """What one client may ask of a router replica; beyond it the answer is a 4xx or 503, at once."""

    body_bytes: Bytes = Field(4 << 20, description="largest request body")
    header_bytes: Bytes = Field(32 << 10, description="request line and headers together")
    header_timeout_s: Seconds = Field(10.0, description="time to send the headers")
    body_timeout_s: Seconds = Field(30.0, description="time to send the body")
    idle_timeout_s: Seconds = Field(75.0, description="a kept-alive connection without a request is closed")
    write_timeout_s: Seconds = Field(30.0, description="a client that reads nothing for this long is dropped")
    request_timeout_s: Seconds = Field(600.0, description="deadline of a request, unless it asks for a shorter one")
    first_token_timeout_s: Seconds | None = Field(
        None, description="time to the first token, unless a request asks for less; null: as long as the deadline lets"
    )
    idempotency_bytes: Bytes = Field(1 << 20, description="largest answer that is kept for its Idempotency-Key")
    max_connections: int = Field(1024, ge=1, description="open connections, 7/8 for one tenant; more are refused")
    max_running: int = Field(512, ge=1, description="requests in work; more of them wait")
    max_waiting: int = Field(256, ge=0, description="requests waiting for a place; one more gets 503 with retry-after")
    embedding_inputs: int = Field(2048, ge=1, description="texts of one request for embeddings")
    rerank_documents: int = Field(1000, ge=1, description="documents of one request to rerank")
    embedding_tokens: int = Field(600_000, ge=1, description="tokens of all texts of one request of these two kinds")


class PlacementSettings(Settings):
    """How the engines of a request are chosen."""

    policy: Literal["cost", "prefix", "session", "least_load", "round_robin"] = Field(
        "cost", description="cost: estimated time to the first token and between tokens; the others for comparison"
    )
    local_prefill_below: int = Field(
        0, ge=0, description="the decode engine computes a prompt itself when it lacks fewer tokens than this; 0: never"
    )
    session_ttl_s: Seconds = Field(600.0, description="an idle session (header x-session-id) is forgotten after this")
    ttft_target_s: Seconds = Field(1.0, description="cost: time to the first token that counts as 1")
    itl_target_s: Seconds = Field(0.1, description="cost: time between tokens that counts as 1")


MAX_LABEL_CHARS = 128
LABEL_RULE = f"must have 1 to {MAX_LABEL_CHARS} printable ASCII characters and no space around them"


def is_label(text: str) -> bool:
    """Whether `text` can name a tenant or a session: what a header can carry, and logs and metrics can show."""
    return 0 < len(text) <= MAX_LABEL_CHARS and text.isascii() and text.isprintable() and text == text.strip()


class TenantSettings(Settings):
    """A tenant: of the API key, or where none is asked for of the header x-tenant."""

    weight: float = Field(1.0, gt=0, le=1000, description="share of the engines while several tenants have work")
    requests_per_minute: int | None = Field(
        None, ge=1, description="requests begun in a minute, at each router; more: 429"
    )
    concurrency: int | None = Field(None, ge=1, description="requests in work, at each router; more: 429")
    most_urgent: int = Field(
        0, ge=-(2**31), lt=2**31, description="lowest priority that its keys may ask for; lower is sooner; else 400"
    )


class ResponsesSettings(Settings):
    """Stored responses of /v1/responses."""

    keep_days: int = Field(30, ge=1, le=3650, description="days that a response is kept after it was last gone on from")
    tenant_bytes: Bytes = Field(4 << 30, description="all stored responses of a tenant together; the next gets 403")
    max_background: int = Field(16, ge=1, description="background responses of a tenant in work; one more gets 429")
    lease_s: Seconds = Field(
        20.0, ge=1, description="a router that is silent for so long has lost its background responses"
    )


class RouterSettings(Settings):
    """The router deployment and its own HTTP listener."""

    host: str = Field(
        "127.0.0.1",
        description="address of the listener; off loopback it needs a key, and a proxy that speaks TLS in front",
    )
    port: Port = Field(8000, description="port of the listener; 0: a free port")
    serve_port: Port = Field(0, description="port of Ray Serve's HTTP proxy; 0: a free port")
    browser: BrowserSettings = BrowserSettings()
    limits: LimitSettings = LimitSettings()
    connect_timeout_s: Seconds = Field(5.0, description="time to reach an engine and be welcomed")
    drain_grace_s: Seconds = Field(30.0, description="running requests may take this long to finish at shutdown")
    default_max_tokens: int = Field(1024, ge=1, description="tokens generated when a chat request names no maximum")
    max_attempts: int = Field(3, ge=1, description="placements tried for a request before its first token")
    migration_limit: int = Field(2, ge=0, description="moves of a request to other engines after it; 0: none")
    retry_budget: float = Field(
        0.2, ge=0, le=1, description="further placements and moves, in the long run, per request that a tenant sends"
    )
    retry_burst: int = Field(
        0, ge=0, description="the same at once; 0: limits.max_running, so that a whole engine may be lost"
    )
    silence_s: Seconds = Field(1.0, description="an engine that tells nothing for this long is lost")
    quarantine_s: Seconds = Field(600.0, description="a request that ended two engines is refused for this long")
    placement: PlacementSettings = PlacementSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    responses: ResponsesSettings = ResponsesSettings()
    tenants: dict[str, TenantSettings] = Field(default={}, description="tenants with a share or limits of their own")

    @field_validator("tenants")
    @classmethod
    def _tenant_names(cls, tenants: dict[str, TenantSettings]) -> dict[str, TenantSettings]:
        for name in tenants:
            if not is_label(name):
                raise ValueError(f"the name {name!r} {LABEL_RULE}")
        return tenants

    @field_validator("host")
    @classmethod
    def _an_address(cls, host: str) -> str:
        try:
            ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        except ValueError:
            raise ValueError(f"{host!r} is not an IP address") from None
        return host

    @property
    def leaves_host(self) -> bool:
        """Whether other machines can reach the API."""
        return self.host != "localhost" and not ipaddress.ip_address(self.host).is_loopback
