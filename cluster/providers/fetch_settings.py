"""The branch `fetch:` of diptych.yaml: what is fetched for clients, from where, and how much."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from diptych.protos.settings import Bytes, Seconds, Settings


class FetchSettings(Settings):
    """Remote images and documents of requests, where the provider does not fetch them itself."""

    enabled: bool = Field(True, description="false: a request with an address that would have to be fetched is refused")
    hosts: tuple[str, ...] = Field(
        (), description="names that alone may be fetched from, *.example.com for all below one; none: any public host"
    )
    private_hosts: tuple[str, ...] = Field(
        (), description="the same, of hosts of this network: any address, any port, and http"
    )
    http: bool = Field(False, description="plain http of public hosts")
    max_bytes: Bytes = Field(20 << 20, description="of one file")
    request_bytes: Bytes = Field(50 << 20, description="of all files of a request")
    held_bytes: Bytes = Field(
        512 << 20,
        description="of all requests in work at one router; others wait in turn. A request takes up to three times as "
        "much memory as its files have bytes",
    )
    timeout_s: Seconds = Field(10.0, description="of one file, redirects included; and of the wait for room")
    max_redirects: int = Field(3, ge=0, le=10, description="of one file")

    @model_validator(mode="after")
    def _holds_a_request(self) -> Self:
        if self.held_bytes < self.request_bytes:
            raise ValueError(
                f"held_bytes, {self.held_bytes} for all requests together, is less than request_bytes, "
                f"{self.request_bytes} for one: raise the one or lower the other"
            )
        return self
