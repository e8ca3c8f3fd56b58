"""What an engine's session cannot read or write for one request ends that request, never the session of all."""

from __future__ import annotations

import pytest

from diptych.cluster.engine.inbox import CancelRequest
from diptych.cluster.engine.testing import Start, finish, key, output
from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.types import (
    DecodeOrder,
    FinishReason,
    PrefillOrder,
    PromptLogprobs,
    Role,
    TokenLogprobs,
)


class Panic(BaseException):
    """As pyo3 raises for a panic of a library's Rust side."""


@pytest.mark.parametrize("error", [ValueError("secret"), Panic("secret")])
async def test_an_order_that_raises_while_it_is_read_ends_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Guards against one request that ends the session, and with it every request of its router."""
    inner = codec.order_from_pb

    def order_from_pb(message: pb.Submit, now: float) -> PrefillOrder | DecodeOrder:
        if message.handle == 2:
            raise error
        return inner(message, now)

    monkeypatch.setattr(codec, "order_from_pb", order_from_pb)
    engine = await start()
    async with engine.router() as router:
        for n in (1, 2, 3):
            await router.submit(n, n)
        [refusal] = (await router.tokens()).finishes
        assert (refusal.handle, refusal.error.code) == (2, "engine_fault")
        assert "secret" not in refusal.error.message
        assert len(await engine.items(2)) == 2
        engine.outbox.put(Role.DECODE, output((1, 0, 5), (3, 0, 6)))
        assert list((await router.tokens()).token) == [5, 6]


@pytest.mark.parametrize("part", ["logprobs", "prompt"])
async def test_an_output_that_raises_while_it_is_written_ends_its_request_alone(start: Start, part: str) -> None:
    """Guards against a step whose other tokens are lost because one request's numbers cannot be told."""
    engine = await start()
    broken = TokenLogprobs(0.0, -1, ())  # no rank is negative
    async with engine.router() as router:
        for n in (1, 2, 3):
            await router.submit(n, n)
        await engine.items(3)
        out = output((1, 0, 5))
        if part == "prompt":
            out.prompt_logprobs.append(PromptLogprobs(key(2), 1, (broken,)))
        out.add(key(2), 0, 9, broken if part == "logprobs" else None)
        out.add(key(3), 0, 6)
        engine.outbox.put(Role.DECODE, out)
        [refusal] = (await router.tokens()).finishes
        assert (refusal.handle, refusal.error.code) == (2, "engine_fault")
        step = await router.tokens()
        assert (list(step.handle), list(step.token)) == ([1, 3], [5, 6])
        assert await engine.items(1) == [CancelRequest(Role.DECODE, key(2))]
        engine.outbox.put(Role.DECODE, output(finishes=[finish(2, FinishReason.CANCELLED), finish(1)]))
        assert [one.handle for one in (await router.tokens()).finishes] == [1]
