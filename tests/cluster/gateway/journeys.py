"""Gateways over scripted targets, on a loop whose time passes only when everybody waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from loop import SimLoop

from diptych.cluster.gateway.gateway import Gateway
from diptych.cluster.gateway.ports import Context, Ports
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.signals import StreamItem
from diptych.cluster.gateway.target import Target
from diptych.protos.deltas import Content
from diptych.protos.openai import ChatRequest
from diptych.protos.openai import parse_chat as parse_chat

T = TypeVar("T")
HELLO = [{"role": "user", "content": "hello"}]


def run(job: Coroutine[Any, Any, T]) -> T:
    """What `job` gives, on a virtual clock from 0. Nothing may be left behind."""
    loop = SimLoop()
    try:
        asyncio.set_event_loop(None)
        result = loop.run_until_complete(_alone(job))
        loop.run_until_complete(loop.shutdown_asyncgens())
        return result
    finally:
        loop.close()


async def _alone(job: Coroutine[Any, Any, T]) -> T:
    result = await job
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"
    return result


def gateway(
    *targets: Target,
    routes: dict[str, Any] | None = None,
    ports: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **route: Any,
) -> Gateway:
    """With a route `chat` over all targets that no route of `routes` names, in their order."""
    others = routes or {}
    named = {entry for other in others.values() for entry in other["targets"]}
    mine = {"targets": [target.name for target in targets if target.name not in named], "strategy": "priority"}
    read = GatewaySettings.model_validate({"routes": {"chat": mine | route, **others}, **(settings or {})})
    clock = asyncio.get_running_loop().time
    return Gateway(read, targets=targets, ports=Ports(clock=clock, rng=random.Random(7), **(ports or {})))


async def read(
    gate: Gateway, model: str = "chat", *, restarts: bool = False, context: Context | None = None, **params: Any
) -> tuple[list[StreamItem], Exception | None, Any]:
    """All that a stream tells, what it raised, its record."""
    items: list[StreamItem] = []
    async with gate.stream(
        model, HELLO, restarts=restarts, context=context or Context(), stream=True, **params
    ) as events:
        try:
            async for item in events:
                items.append(item)
        except Exception as exc:
            return items, exc, events.record
    return items, None, events.record


def text_of(items: Sequence[StreamItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Content))


def asked_text(request: ChatRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.messages]
