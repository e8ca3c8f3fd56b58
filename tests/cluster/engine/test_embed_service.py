"""The gRPC surface of engines of both kinds: each refuses the other's work in words, and another life's orders.

Guards: a generation order that an embed engine leaves unanswered; texts that reach a life which was not meant; a bad id
that fails a step instead of its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from small_cluster import small_cluster
from text_cluster import TextCluster, make_encoder, text_cluster, trust_of_all

from diptych.protos import engine_pb2 as pb
from diptych.protos.channels import EMBED, open_channel
from diptych.protos.embedding import EmbedKind, EmbedOrder, TextRow, order_to_pb, values_of
from diptych.protos.engine_pb2_grpc import EngineStub
from diptych.protos.errors import DiptychError, EngineError, InvalidRequest, ShuttingDown
from diptych.protos.trust import ROUTER
from diptych.protos.types import DecodeOrder, EngineRef, Finish, GenerateRequest, Role, SamplingParams, TransferKey


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[TextCluster]:
    folder = await asyncio.to_thread(make_encoder, tmp_path / "encoder")
    async with text_cluster(tmp_path, {"encoder": folder}) as made:
        yield made


async def embed(ref: EngineRef, order: pb.EmbedOrder, *, trust: Any, role: str = "embed") -> list[pb.EmbedPart]:
    async with open_channel(trust, ref.target, role=role) as channel:
        stub: Any = EngineStub(channel)  # type: ignore[no-untyped-call]
        return [part async for part in stub.Embed(order, metadata=trust.proof(EMBED, ref))]


def order(*ids: int, kind: EmbedKind = EmbedKind.VECTORS, epoch: int = 1, **more: Any) -> pb.EmbedOrder:
    return order_to_pb(EmbedOrder(kind=kind, rows=(TextRow(list(ids)),), **more), 0.0, epoch)


async def told(cluster: TextCluster, message: pb.EmbedOrder) -> DiptychError:
    [ref] = cluster.infos
    with pytest.raises(DiptychError) as caught:
        values_of(await embed(ref, message, trust=trust_of_all()(ROUTER)), 1)
    return caught.value


async def test_an_order_is_answered_and_a_wrong_one_told(cluster: TextCluster) -> None:
    [ref] = cluster.infos
    [values], _ = values_of(await embed(ref, order(2, 5, 3), trust=trust_of_all()(ROUTER)), 1)
    assert len(values) == 32
    assert "fenced" in (await told(cluster, order(2, epoch=9))).code
    for wrong in (
        order(2, 10**6),
        order(*[2] * 25),
        order(2, dimensions=33),
        order(2, kind=EmbedKind.SCORES),
        pb.EmbedOrder(kind=pb.EMBED_KIND_VECTORS),
    ):
        assert isinstance(await told(cluster, wrong), InvalidRequest)
    assert cluster.count("embed_steps_total") == 1
    cluster.engines["embed-0"].drain(0.0)
    assert isinstance(await told(cluster, order(2)), ShuttingDown)


async def test_who_shows_no_proof_is_refused(cluster: TextCluster) -> None:
    [ref] = cluster.infos
    async with open_channel(trust_of_all()(ROUTER), ref.target, role="embed") as channel:
        stub: Any = EngineStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(order(2)).read()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert cluster.count("engine_refused_calls_total") == 1


async def test_an_embed_engine_generates_nothing(cluster: TextCluster) -> None:
    [session] = cluster.router.view.sessions()
    sampling = SamplingParams(max_tokens=1)
    request = GenerateRequest(key=TransferKey(bytes(16)), prompt=(1,), sampling=sampling)
    ended: asyncio.Future[Finish | DiptychError] = asyncio.get_running_loop().create_future()

    class Sink:
        def on_start(self) -> None: ...
        def on_token(self, index: int, token: int, logprobs: object = None) -> None: ...
        def on_prompt(self, piece: object) -> None: ...
        def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
            ended.set_result(outcome)

    session.submit(DecodeOrder(request=request, prefill=None), Sink())
    outcome = await asyncio.wait_for(ended, 10)
    assert isinstance(outcome, Finish)
    assert (outcome.error_code, "no decode" in outcome.error_message) == (EngineError.code, True)


async def test_an_engine_that_generates_embeds_nothing(tmp_path: Path) -> None:
    async with small_cluster(tmp_path, tmp_path) as made:
        ref = made.refs[Role.DECODE]
        session = made.router.view.session(ref)
        assert session is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session.embed(order(2)).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
