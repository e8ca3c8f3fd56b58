"""A router with echo engines of any roles around it, for tests: no model, no HTTP, unix sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from diptych.cluster.config import LimitSettings, RouterSettings, TenantSettings
from diptych.protos.types import Role, SamplingParams

from .call import Explanation, GenerateCall, TokenDelta
from .router import Router
from .testing import EchoEngine, StaticDirectory

PROMPT = tuple(range(10, 30))
P, D = frozenset({Role.PREFILL}), frozenset({Role.DECODE})
PAIR = {"p": P, "d": D}


@dataclass
class Rig:
    """A router that is ready, and its engines by name."""

    router: Router
    directory: StaticDirectory
    engines: dict[str, EchoEngine]

    async def ask(self, max_tokens: int = 8) -> tuple[list[int], Explanation]:
        """The tokens of a whole answer, and how it was answered."""
        tokens: list[int] = []
        async for delta in self.router.generate(call(max_tokens)):
            assert not tokens or delta.tokens or delta.finish
            tokens += delta.tokens
            if delta.finish is not None:
                return tokens, delta.finish
        raise AssertionError("the answer ended without a finish")

    async def deltas(self, call: GenerateCall) -> list[TokenDelta]:
        """All of an answer."""
        return [delta async for delta in self.router.generate(call)]

    def ready(self) -> int:
        """Engines that welcomed the router."""
        return sum(session.is_ready for session in self.router.view.sessions())

    def metric(self, name: str) -> float:
        """A sample's value, summed over its labels."""
        found = [s for f in self.router.metrics.registry.collect() for s in f.samples if s.name == name]
        return sum(sample.value for sample in found)


def call(max_tokens: int = 8, timeout_s: float | None = None, traceparent: str = "") -> GenerateCall:
    """Of the rig's PROMPT."""
    return GenerateCall(
        model="echo",
        prompt=PROMPT,
        sampling=SamplingParams(max_tokens=max_tokens),
        timeout_s=timeout_s,
        traceparent=traceparent,
    )


def wanted(count: int) -> list[int]:
    """The tokens that echo engines answer PROMPT with."""
    return [PROMPT[i % len(PROMPT)] for i in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    """Poll until it holds. Raises TimeoutError after 20 s."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - conditions are plain functions over other tasks' state
            await asyncio.sleep(0.002)


@asynccontextmanager
async def rig(
    folder: Path,
    roles: dict[str, frozenset[Role]],
    *,
    step_s: float = 0.0,
    tokens_per_step: int = 1,
    **router_settings: object,
) -> AsyncIterator[Rig]:
    """Everything started and connected; afterwards nothing may be in flight any more. Further keywords are the
    router's settings.
    """
    async with AsyncExitStack() as stack:
        engines = {}
        for name, role in roles.items():
            engine = EchoEngine(
                f"unix:{folder}/{name}", engine_id=name, roles=role, step_s=step_s, tokens_per_step=tokens_per_step
            )
            await engine.start()
            stack.push_async_callback(engine.stop)
            engines[name] = engine
        directory = StaticDirectory([engine.info for engine in engines.values()])
        plain = {
            "limits": LimitSettings(request_timeout_s=30),
            "connect_timeout_s": 2,
            "tenants": {"gold": TenantSettings(weight=4)},
        }
        settings = RouterSettings.model_validate(plain | router_settings)
        router = Router(directory=directory, settings=settings, is_strict=True)
        await router.start()
        stack.push_async_callback(router.stop)
        made = Rig(router, directory, engines)
        await until(lambda: made.ready() == len(roles) and router.view.is_complete)
        yield made
        await until(lambda: router.in_flight == {} and router.admission.running == 0)
        assert all(session.in_flight == 0 for session in router.view.sessions())
        assert router.recovery.num_unproven == 0
