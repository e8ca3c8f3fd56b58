"""The branch `router.browser` of diptych.yaml. Imports nothing that starts anything."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from diptych.protos.settings import Settings

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,15}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]{0,30}://([a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?")


class BrowserSettings(Settings):
    """What web pages may do; programs that are no browser are not concerned."""

    origins: tuple[str, ...] = Field(
        (), description="pages that may use the API, such as https://chat.example.com; others get 403"
    )
    hosts: tuple[str, ...] = Field(
        (), description="names besides localhost and addresses by which a server without API keys may be called"
    )

    @field_validator("hosts")
    @classmethod
    def _host_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a host; write it without scheme, port and wildcards")
        return names

    @field_validator("origins")
    @classmethod
    def _pages(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin; write scheme://host or scheme://host:port as browsers send it, in small "
                    "letters and without a path. There is no wildcard: any page that a user opens could use the API"
                )
        return origins
