"""Requests as Python programs write them: OpenAI's fields as keyword arguments, messages as plain objects or canonical.

gateway.py reads with it. Errors name fields as the HTTP API's do, for the same reader finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Message
from diptych.protos.openai import ChatRequest, read_chat
from diptych.protos.openai_sampling import seed_of_choice

_SEEDS = 2**64
Messages = Sequence[Message] | Sequence[Mapping[str, Any]]


def read_request(model: str | ChatRequest, messages: Messages | None, params: Mapping[str, Any]) -> ChatRequest:
    """The request. A whole ChatRequest stands alone. Raises InvalidRequest that names the field."""
    if isinstance(model, ChatRequest):
        if messages is not None or params:
            given = "messages" if messages is not None else next(iter(params))
            raise InvalidRequest(f"{given} is part of the request that was given; make another request of it", given)
        return model
    if messages is None:
        raise InvalidRequest("messages is missing", "messages")
    fields: dict[str, Any] = {"model": model, "messages": _read(messages), **params}
    try:
        return read_chat(fields)
    except (TypeError, RecursionError) as exc:  # of writing a schema as JSON
        raise InvalidRequest(f"the request holds what JSON has not: {exc}") from exc


def of_one_choice(request: ChatRequest, index: int) -> ChatRequest:
    """What is asked for one of several answers: as an own model would, each with a seed of its own where there is one,
    and the prompt's logprobs with the first.
    """
    update: dict[str, object] = {"n": None}
    if index:
        update["prompt_logprobs"] = None
        if request.seed is not None:
            seed = seed_of_choice(request.seed % _SEEDS, index)
            update["seed"] = seed - _SEEDS if seed >= _SEEDS // 2 else seed  # OpenAI's have a sign
    return request.model_copy(update=update)


def _read(messages: object) -> object:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest("messages must be a list with at least one message", "messages")
    kinds = [isinstance(message, Message) for message in messages]
    if all(kinds):
        return tuple(messages)
    if any(kinds):
        i = kinds.index(not kinds[0])
        path = f"messages[{i}]"
        raise InvalidRequest(f"{path} is of another kind than those before it: either all are Message or none", path)
    return list(messages)
