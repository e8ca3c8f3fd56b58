"""POST /v1/batches and what is asked of batches afterwards. A tenant sees its own alone.

The work is done by cluster/batches, of this replica or another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from diptych.cluster.config import RouterSettings
from diptych.cluster.store import batches
from diptych.cluster.store.database import Store
from diptych.protos.errors import RequestTooLarge
from diptych.protos.openai_batches import BATCH_ID, batch_object, parse_batch, unknown_batch
from diptych.protos.openai_files import page_object, read_paging

from .access import caller_of, tenant_of
from .body import read_body, refuse_body
from .errors import BodyTimeout

MOST_LISTED: Final = 100
LISTED: Final = 20
_QUERIES: Final = ("after", "limit")


class BatchMaking:
    """The ASGI application of POST /v1/batches. `clock`: seconds since 1970."""

    def __init__(
        self,
        store: Store,
        settings: RouterSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings.batches
        self._limits = settings.limits
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            body = await read_body(scope, receive, self._limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        await (await self._made(scope, body))(scope, receive, send)

    async def _made(self, scope: Scope, body: bytes) -> Response:
        """A batch that is validated next."""
        wanted = parse_batch(body)
        key, now = caller_of(scope), int(self._clock())
        maker = batches.Maker(tenant_of(scope)) if key is None else batches.Maker(key.tenant, key.id, key.tags)
        batch_id, settings = "batch_" + os.urandom(16).hex(), self._settings
        batch = await self._store.write(
            lambda c: batches.add(
                c,
                batch_id,
                wanted,
                maker,
                most_live=settings.tenant_batches,
                most_bytes=settings.input_bytes,
                now=now,
            )
        )
        return JSONResponse(batch_object(batch))


class BatchesPages:
    """The other routes. `clock`: seconds since 1970."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def list(self, request: Request) -> Response:
        """The tenant's batches, the newest first."""
        paging = read_paging(request.query_params.multi_items(), known=_QUERIES, most=MOST_LISTED, default=LISTED)
        if paging.after is not None and not BATCH_ID.fullmatch(paging.after):
            raise unknown_batch(paging.after)
        tenant = tenant_of(request.scope)
        page, has_more = await self._store.read(lambda c: batches.listed(c, tenant, paging))
        return JSONResponse(page_object([batch_object(batch) for batch in page], has_more=has_more))

    async def one(self, request: Request) -> Response:
        """One batch."""
        batch_id, tenant = _id_of(request), tenant_of(request.scope)
        return JSONResponse(batch_object(await self._store.read(lambda c: batches.find(c, batch_id, tenant))))

    async def cancel(self, request: Request) -> Response:
        """No line is begun any more; what is answered stays."""
        batch_id, tenant, now = _id_of(request), tenant_of(request.scope), int(self._clock())
        batch = await self._store.write(lambda c: batches.cancel(c, batch_id, tenant, now=now))
        return JSONResponse(batch_object(batch))


def _id_of(request: Request) -> str:
    batch_id: str = request.path_params["id"]
    if not BATCH_ID.fullmatch(batch_id):
        raise unknown_batch(batch_id)
    return batch_id
