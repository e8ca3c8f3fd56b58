"""How a routed request's time is told to the gateway. It guards against time that is counted twice, or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from diptych.cluster.api.chat import ChatEndpoint
from diptych.cluster.api.generation import Origin
from diptych.cluster.api.routed import RoutedAnswer, RoutedModels
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.protos.errors import DeadlineExceeded
from diptych.protos.openai import ChatRequest, read_chat


def asked(**limits: float) -> Any:
    """The request and the context that the gateway gets, of a request that arrived 4 s ago."""
    gateway = SimpleNamespace(settings=GatewaySettings())
    models = SimpleNamespace(gateway=gateway, router=SimpleNamespace(clock=lambda: 104.0))
    request: ChatRequest = read_chat({"model": "chat", "messages": [{"role": "user", "content": "hello"}], **limits})
    answer = RoutedAnswer(cast("RoutedModels", models), request, Origin(tenant="", arrived_at=100.0), ChatEndpoint())
    return answer._asked(answer.choices[0], stream=False)


def test_the_gateway_is_told_since_when_a_request_waits() -> None:
    """Without a limit of its own the time that the body took was nobody's: the route's limit began behind it."""
    _, context = asked()
    assert context.waited_s == 4.0
    request, context = asked(timeout_s=10, first_token_timeout_s=5)
    assert (request.timeout_s, request.first_token_timeout_s, context.waited_s) == (10, 5, 4.0)
    with pytest.raises(DeadlineExceeded, match="first_token_timeout_s was over before the request was read"):
        asked(timeout_s=10, first_token_timeout_s=4)
