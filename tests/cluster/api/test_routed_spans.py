"""A routed answer's trace through the front door: the caller's header, the route's spans, the own pool's engines.

Guards against spans that begin a trace of their own where the caller has one.
"""

from __future__ import annotations

from dataclasses import replace

import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from diptych.cluster.api.testing import MODEL, front_door
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.testing import ScriptedTarget, fails
from diptych.cluster.router.rig import until
from diptych.protos.failures import FailureKind


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_route_joins_the_callers_trace_and_the_engines_join_the_attempt(is_stream: bool) -> None:
    trace_id, span_id = "ab" * 16, "cd" * 8
    bad = ScriptedTarget("p/a", [[fails(FailureKind.OVERLOADED)]])
    targets = {"targets": ["p/a", f"pool/{MODEL}"], "strategy": "priority"}
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with (
        front_door(gateway=GatewaySettings.model_validate({"routes": {"chat": targets}}), targets=[bad]) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        assert door.routes is not None
        gateway = door.routes.gateway
        gateway.ports = replace(gateway.ports, tracer=provider.get_tracer("test"))
        reply = await http.post(
            "/v1/chat/completions",
            json={
                "model": "chat",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 3,
                "stream": is_stream,
            },
            headers={"traceparent": f"00-{trace_id}-{span_id}-01"},
        )
        assert reply.status_code == 200, reply.text
        await until(lambda: len(exporter.get_finished_spans()) == 3)
        asked = door.decode.orders[0].request.traceparent.split("-")
    spans = {str((span.attributes or {}).get("diptych.target")): span for span in exporter.get_finished_spans()}
    request = next(span for span in exporter.get_finished_spans() if span.name == "gateway")
    assert request.parent is not None
    assert (f"{request.parent.trace_id:032x}", f"{request.parent.span_id:016x}") == (trace_id, span_id)
    own = next(span for span in exporter.get_finished_spans() if span.name == f"chat {MODEL}")
    assert asked[1:3] == [trace_id, f"{own.context.span_id:016x}"]
    assert {"p/a", f"pool/{MODEL}"} <= spans.keys()
    assert (own.attributes or {})["gen_ai.usage.output_tokens"] == 3
