"""Diptych from Python: `diptych.connect(url)` talks to a running cluster over HTTP.

This file is published as `diptych/__init__.py`. Importing it loads nothing; the client comes with the first call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.cluster.client import AsyncClient, Client

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if os.path.basename(_FOLDER) == "package":
    # A source checkout: the other parts of the package are the folders at its root. Installed, they lie beside it.
    __path__.append(os.path.dirname(os.path.dirname(_FOLDER)))

__all__ = ["connect", "connect_async"]


def connect(url: str | None = None, *, tenant: str = "", key: str | None = None, timeout_s: float = 600.0) -> Client:
    """A client of the cluster at `url`; None: the one started last by you on this machine.

    `tenant` and `key` are sent with every request; `key` None: what DIPTYCH_API_KEY holds, if anything. With a key the
    tenant is the key's. `timeout_s` bounds the wait for each piece of an answer. Nothing is sent yet.
    Raises StartupError when `url` is None and no cluster runs.
    """
    from diptych.cluster.client import Client, locate
    from diptych.cluster.config import api_key

    return Client(locate(url), tenant=tenant, key=api_key() if key is None else key, timeout_s=timeout_s)


def connect_async(
    url: str | None = None, *, tenant: str = "", key: str | None = None, timeout_s: float = 600.0
) -> AsyncClient:
    """The same for asyncio: every method is a coroutine, every stream an async iterator."""
    from diptych.cluster.client import AsyncClient, locate
    from diptych.cluster.config import api_key

    return AsyncClient(locate(url), tenant=tenant, key=api_key() if key is None else key, timeout_s=timeout_s)
