"""POST /v1/route/explain: where a chat request would go, and why. The body and the headers are those that would be sent
to /v1/chat/completions; nothing is sent on, nothing is charged.

An admin's key may ask as somebody else, by the query: tenant, key, session, and tag, which may be given several times.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.config import LABEL_RULE, is_label
from diptych.cluster.router.router import Router
from diptych.protos.errors import Forbidden, InvalidRequest, RequestTooLarge, UnknownModel
from diptych.protos.openai import parse_chat
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable

from .access import caller_of, may_administer, tenant_of
from .body import label, read_body, refuse_body
from .errors import BodyTimeout
from .generation import session_of
from .tokenize import INLINE_BYTES

if TYPE_CHECKING:  # where there are no routes, nothing of the gateway is imported
    from diptych.cluster.gateway.ports import Context

    from .routed import RoutedModels

QUERIES = ("key", "session", "tag", "tenant")


class RouteExplainApp:
    """The ASGI application. `routes` None: there are none, and `own` models answer for themselves."""

    def __init__(self, router: Router, own: Mapping[str, object], routes: RoutedModels | None) -> None:
        self._router = router
        self._own = own
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        data = json.dumps(await self._answer(scope, body), separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})

    async def _answer(self, scope: Scope, body: bytes) -> JsonObject:
        """Raises RequestError."""
        request = parse_chat(body) if len(body) <= INLINE_BYTES else await asyncio.to_thread(parse_chat, body)
        routes = self._routes
        if routes is None or not routes.takes(request.model, self._own):
            if request.model in self._own:
                raise InvalidRequest(
                    f"model: {printable(request.model)} is an own model and no route: its engines answer, whoever asks",
                    "model",
                )
            known = "none" if routes is None else ", ".join(routes.names) or "none"
            raise UnknownModel(f"model: there is no route {printable(request.model)}; there are: {known}", "model")
        context = self._context(scope, session_of(request.prompt_cache_key), routes)
        told = routes.gateway.explain(request, context=context)
        return {"object": "route.explanation", **told.told(is_operator=may_administer(scope))}

    def _context(self, scope: Scope, session: str, routes: RoutedModels) -> Context:
        from diptych.cluster.gateway.ports import Context

        from .overrides import overrides

        context = Context(tenant=tenant_of(scope), session=label(scope, "x-session-id") or session)
        readable = routes.gateway.settings.rule_headers
        query = _query(scope)
        if query and not may_administer(scope):
            raise Forbidden(f"{next(iter(query))}: only an admin's key may ask as somebody else; leave the query out")
        # Who may ask as anybody may wish for anybody; the wishes of others are bound by their keys.
        context = overrides(context, None if query else caller_of(scope), scope["headers"], readable=readable)
        return replace(
            context,
            tenant=query.get("tenant", (context.tenant,))[-1],
            key=query.get("key", (context.key,))[-1],
            session=query.get("session", (context.session,))[-1],
            tags=query.get("tag", context.tags),
        )


def _query(scope: Scope) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name not in QUERIES:
            raise InvalidRequest(
                f"there is no query {printable(name)} here; there are: {', '.join(QUERIES)}", printable(name)
            )
        if not is_label(value):
            raise InvalidRequest(f"{name} {LABEL_RULE}", name)
        if name in found and name != "tag":
            raise InvalidRequest(f"{name} is given twice", name)
        found[name] = (*found.get(name, ()), value)
    return found
