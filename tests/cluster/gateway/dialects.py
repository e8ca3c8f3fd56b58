"""Five wire formats as a provider writes them, by hand from their public descriptions: what scripted.py sends.

A frame is one event of a stream, complete. Nothing here is ours: no codec is used, so that a mistake in one is seen.
"""

from __future__ import annotations

import binascii
import json
import struct
from abc import ABC, abstractmethod
from typing import Any

USAGE = (7, 3)  # input and output tokens of every answer
STATUS_WORDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}


def sse(data: Any, event: str = "") -> bytes:
    """One event of text/event-stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return ((f"event: {event}\n" if event else "") + f"data: {text}\n\n").encode()


class Dialect(ABC):
    """One format. `codec` is the name that a configuration gives it."""

    codec: str
    stream_type = "text/event-stream"

    @abstractmethod
    def opening(self) -> list[bytes]:
        """What comes before any content."""

    @abstractmethod
    def piece(self, text: str) -> bytes:
        """A piece of the text."""

    @abstractmethod
    def closing(self, finish: str = "stop") -> list[bytes]:
        """The end: finish is stop, length, tool_calls, content_filter or a word that nobody knows."""

    @abstractmethod
    def call(self, pieces: list[str]) -> list[bytes]:
        """A call of `lookup` whose arguments come in these pieces."""

    @abstractmethod
    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def whole_call(self, arguments: str) -> dict[str, Any]:
        """A whole answer that is a call; the formats whose arguments are an object take no others."""

    @abstractmethod
    def error(self, kind: str, message: str) -> dict[str, Any]:
        """The body of an error: its kind is server, overloaded, rate_limit, quota, context, policy, auth, bad."""

    def error_frame(self, kind: str) -> bytes:
        """An error that comes as an event."""
        return sse(self.error(kind, "as told"), "error")

    def odd_frame(self) -> bytes:
        """An event of a kind that no client knows."""
        return sse({"type": "made.up", "made_up": True}, "made_up")

    def bad_frame(self) -> bytes:
        """An event whose data are no JSON."""
        return sse('{"half": ')

    def stream(self, *texts: str) -> list[bytes]:
        """A whole stream."""
        return [*self.opening(), *(self.piece(text) for text in texts), *self.closing()]


class OpenAIChat(Dialect):
    codec = "openai.chat"

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return sse({"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more})

    def opening(self) -> list[bytes]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def closing(self, finish: str = "stop") -> list[bytes]:
        usage = sse({"id": "c1", "choices": [], "usage": _openai_usage()})
        return [self._chunk({}, finish), usage, sse("[DONE]")]

    def call(self, pieces: list[str]) -> list[bytes]:
        head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": ""}}
        rest = [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
        return [self._chunk({"tool_calls": [head]}), *(self._chunk(delta) for delta in rest)]

    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        return self._body({"role": "assistant", "content": text}, finish)

    def whole_call(self, arguments: str) -> dict[str, Any]:
        call = {"id": "call_1", "type": "function", "function": {"name": "lookup", "arguments": arguments}}
        return self._body({"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls")

    def _body(self, message: dict[str, Any], finish: str) -> dict[str, Any]:
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return {
            "id": "c1",
            "object": "chat.completion",
            "model": "m",
            "choices": [choice],
            "usage": _openai_usage(),
        }

    def error(self, kind: str, message: str) -> dict[str, Any]:
        return _openai_error(kind, message)


class OpenAIResponses(Dialect):
    codec = "openai.responses"

    def _event(self, kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)

    def _response(self, status: str, output: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": "r1", "object": "response", "model": "m", "status": status, "output": output, **more}

    def _message(self, text: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": text, "annotations": []}
        return {"id": "m1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}

    def opening(self) -> list[bytes]:
        item = {"id": "m1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        return [
            self._event("response.created", response=self._response("in_progress", [])),
            self._event("response.in_progress", response=self._response("in_progress", [])),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", output_index=0, content_index=0, item_id="m1", part=part),
        ]

    def piece(self, text: str) -> bytes:
        return self._event("response.output_text.delta", output_index=0, content_index=0, item_id="m1", delta=text)

    def closing(self, finish: str = "stop") -> list[bytes]:
        return [self._end(finish, [])]

    def _end(self, finish: str, output: list[Any]) -> bytes:
        status, more = _responses_end(finish)
        response = self._response(status, output, usage=_responses_usage(), **more)
        return self._event(f"response.{status}", response=response)

    def call(self, pieces: list[str]) -> list[bytes]:
        head = {"id": "f1", "type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": ""}
        deltas = [
            self._event("response.function_call_arguments.delta", output_index=1, item_id="f1", delta=piece)
            for piece in pieces
        ]
        done = {**head, "arguments": "".join(pieces), "status": "completed"}
        return [
            self._event("response.output_item.added", output_index=1, item=head),
            *deltas,
            self._event("response.output_item.done", output_index=1, item=done),
        ]

    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        status, more = _responses_end(finish)
        return self._response(status, [self._message(text)] if text else [], usage=_responses_usage(), **more)

    def whole_call(self, arguments: str) -> dict[str, Any]:
        call = {"id": "f1", "type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": arguments}
        return self._response("completed", [call], usage=_responses_usage())

    def error(self, kind: str, message: str) -> dict[str, Any]:
        return _openai_error(kind, message)

    def error_frame(self, kind: str) -> bytes:
        told = _openai_error(kind, "as told")["error"]
        return self._event("error", code=told["code"] or told["type"], message=told["message"], param=None)


class Anthropic(Dialect):
    codec = "anthropic.messages"

    def _event(self, kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)

    def opening(self) -> list[bytes]:
        message = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": []}
        message |= {"stop_reason": None, "usage": {"input_tokens": USAGE[0], "output_tokens": 1}}
        block = {"type": "text", "text": ""}
        return [
            self._event("message_start", message=message),
            self._event("ping"),
            self._event("content_block_start", index=0, content_block=block),
        ]

    def piece(self, text: str) -> bytes:
        return self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def closing(self, finish: str = "stop") -> list[bytes]:
        delta = {"stop_reason": _anthropic_end(finish), "stop_sequence": None}
        return [
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta=delta, usage={"output_tokens": USAGE[1]}),
            self._event("message_stop"),
        ]

    def call(self, pieces: list[str]) -> list[bytes]:
        block = {"type": "tool_use", "id": "toolu_1", "name": "lookup", "input": {}}
        deltas = [
            self._event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": piece})
            for piece in pieces
        ]
        return [
            self._event("content_block_stop", index=0),
            self._event("content_block_start", index=1, content_block=block),
            *deltas,
        ]

    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        return self._body([{"type": "text", "text": text}] if text else [], _anthropic_end(finish))

    def whole_call(self, arguments: str) -> dict[str, Any]:
        block = {"type": "tool_use", "id": "toolu_1", "name": "lookup", "input": json.loads(arguments)}
        return self._body([block], "tool_use")

    def _body(self, content: list[Any], reason: str) -> dict[str, Any]:
        usage = {"input_tokens": USAGE[0], "output_tokens": USAGE[1]}
        head = {"id": "m1", "type": "message", "role": "assistant", "model": "m"}
        return head | {"content": content, "stop_reason": reason, "stop_sequence": None, "usage": usage}

    def error(self, kind: str, message: str) -> dict[str, Any]:
        words = {
            "overloaded": ("overloaded_error", message),
            "rate_limit": ("rate_limit_error", message),
            "auth": ("authentication_error", "invalid x-api-key"),
            "quota": ("billing_error", "your credit balance is too low to access the API"),
            "context": ("invalid_request_error", "prompt is too long: 200001 tokens > 200000 maximum"),
            "policy": ("invalid_request_error", "Output blocked by content filtering policy"),
            "bad": ("invalid_request_error", message),
            "missing": ("not_found_error", "model: m"),
        }
        name, told = words.get(kind, ("api_error", message))
        return {"type": "error", "error": {"type": name, "message": told}}


class Gemini(Dialect):
    codec = "gemini.generate"

    def _chunk(self, parts: list[Any] | None, finish: str | None = None) -> dict[str, Any]:
        candidate: dict[str, Any] = {"index": 0}
        if parts is not None:
            candidate["content"] = {"role": "model", "parts": parts}
        if finish is not None:
            candidate["finishReason"] = _gemini_end(finish)
        usage = {"promptTokenCount": USAGE[0], "candidatesTokenCount": USAGE[1], "totalTokenCount": sum(USAGE)}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m", "responseId": "g1"}

    def opening(self) -> list[bytes]:
        return [sse(self._chunk([{"text": ""}]))]

    def piece(self, text: str) -> bytes:
        return sse(self._chunk([{"text": text}]))

    def closing(self, finish: str = "stop") -> list[bytes]:
        return [sse(self._chunk(None, finish))]

    def call(self, pieces: list[str]) -> list[bytes]:
        part = {"functionCall": {"name": "lookup", "args": json.loads("".join(pieces))}}
        return [sse(self._chunk([part]))]

    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        return self._chunk([{"text": text}] if text else None, finish)

    def whole_call(self, arguments: str) -> dict[str, Any]:
        return self._chunk([{"functionCall": {"name": "lookup", "args": json.loads(arguments)}}], "stop")

    def error(self, kind: str, message: str) -> dict[str, Any]:
        words = {
            "overloaded": (503, "UNAVAILABLE", message),
            "rate_limit": (429, "RESOURCE_EXHAUSTED", message),
            "auth": (401, "UNAUTHENTICATED", "API key not valid. Please pass a valid API key."),
            "quota": (429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan."),
            "context": (400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens (8)."),
            "policy": (400, "INVALID_ARGUMENT", "The request was blocked by our safety policy: prohibited content"),
            "bad": (400, "INVALID_ARGUMENT", message),
            "missing": (404, "NOT_FOUND", "models/m is not found for API version v1beta"),
        }
        code, status, told = words.get(kind, (500, "INTERNAL", message))
        return {"error": {"code": code, "message": told, "status": status}}


class Bedrock(Dialect):
    codec = "bedrock.converse"
    stream_type = "application/vnd.amazon.eventstream"

    def _event(self, kind: str, payload: dict[str, Any]) -> bytes:
        return aws_frame({":event-type": kind, ":message-type": "event"}, json.dumps(payload).encode())

    def opening(self) -> list[bytes]:
        return [self._event("messageStart", {"role": "assistant"})]

    def piece(self, text: str) -> bytes:
        return self._event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": text}})

    def closing(self, finish: str = "stop") -> list[bytes]:
        usage = {"inputTokens": USAGE[0], "outputTokens": USAGE[1], "totalTokens": sum(USAGE)}
        return [
            self._event("contentBlockStop", {"contentBlockIndex": 0}),
            self._event("messageStop", {"stopReason": _bedrock_end(finish)}),
            self._event("metadata", {"usage": usage, "metrics": {"latencyMs": 5}}),
        ]

    def call(self, pieces: list[str]) -> list[bytes]:
        start = {"toolUse": {"toolUseId": "t1", "name": "lookup"}}
        deltas = [
            self._event("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"toolUse": {"input": piece}}})
            for piece in pieces
        ]
        return [
            self._event("contentBlockStop", {"contentBlockIndex": 0}),
            self._event("contentBlockStart", {"contentBlockIndex": 1, "start": start}),
            *deltas,
            self._event("contentBlockStop", {"contentBlockIndex": 1}),
        ]

    def whole(self, text: str, finish: str = "stop") -> dict[str, Any]:
        return self._body([{"text": text}] if text else [], _bedrock_end(finish))

    def whole_call(self, arguments: str) -> dict[str, Any]:
        use = {"toolUse": {"toolUseId": "t1", "name": "lookup", "input": json.loads(arguments)}}
        return self._body([use], "tool_use")

    def _body(self, content: list[Any], reason: str) -> dict[str, Any]:
        usage = {"inputTokens": USAGE[0], "outputTokens": USAGE[1], "totalTokens": sum(USAGE)}
        return {
            "output": {"message": {"role": "assistant", "content": content}},
            "stopReason": reason,
            "usage": usage,
            "metrics": {"latencyMs": 5},
        }

    def error(self, kind: str, message: str) -> dict[str, Any]:
        name, told = _bedrock_error(kind, message)
        return {"__type": name, "message": told}

    def error_frame(self, kind: str) -> bytes:
        name, told = _bedrock_error(kind, "as told")
        headers = {":exception-type": name[0].lower() + name[1:], ":message-type": "exception"}
        return aws_frame(headers, json.dumps({"message": told}).encode())

    def odd_frame(self) -> bytes:
        return self._event("madeUp", {"made_up": True})

    def bad_frame(self) -> bytes:
        return aws_frame({":event-type": "contentBlockDelta", ":message-type": "event"}, b'{"half": ')


DIALECTS: tuple[Dialect, ...] = (OpenAIChat(), OpenAIResponses(), Anthropic(), Gemini(), Bedrock())


def aws_frame(headers: dict[str, str], payload: bytes) -> bytes:
    """A message of Amazon's event stream: lengths, checksum, headers of type string, payload, checksum."""
    told = b""
    for name, value in headers.items():
        told += bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
    prelude = struct.pack(">II", 16 + len(told) + len(payload), len(told))
    message = prelude + struct.pack(">I", binascii.crc32(prelude)) + told + payload
    return message + struct.pack(">I", binascii.crc32(message))


def _openai_usage() -> dict[str, int]:
    return {"prompt_tokens": USAGE[0], "completion_tokens": USAGE[1], "total_tokens": sum(USAGE)}


def _responses_usage() -> dict[str, int]:
    return {"input_tokens": USAGE[0], "output_tokens": USAGE[1], "total_tokens": sum(USAGE)}


def _responses_end(finish: str) -> tuple[str, dict[str, Any]]:
    if finish in ("length", "content_filter"):
        reason = "max_output_tokens" if finish == "length" else finish
        return "incomplete", {"incomplete_details": {"reason": reason}}
    return "completed", {}


def _anthropic_end(finish: str) -> str:
    known = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
    return known.get(finish, finish)


def _gemini_end(finish: str) -> str:
    known = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"}
    return known.get(finish, finish.upper())


def _bedrock_end(finish: str) -> str:
    known = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "content_filtered"}
    return known.get(finish, finish)


def _openai_error(kind: str, message: str) -> dict[str, Any]:
    words = {
        "overloaded": ("server_error", "overloaded", "The engine is currently overloaded, please try again later"),
        "rate_limit": ("requests", "rate_limit_exceeded", "Rate limit reached for m"),
        "quota": ("insufficient_quota", "insufficient_quota", "You exceeded your current quota, check your plan"),
        "auth": ("invalid_request_error", "invalid_api_key", "Incorrect API key provided: sk-...abcd"),
        "context": (
            "invalid_request_error",
            "context_length_exceeded",
            "This model's maximum context length is 8 tokens, however your messages resulted in 9 tokens.",
        ),
        "policy": ("invalid_request_error", "content_policy_violation", "rejected as a result of our safety system"),
        "bad": ("invalid_request_error", None, message),
        "missing": ("invalid_request_error", "model_not_found", "The model m does not exist"),
    }
    kind_of, code, told = words.get(kind, ("server_error", None, message))
    return {"error": {"message": told, "type": kind_of, "param": None, "code": code}}


def _bedrock_error(kind: str, message: str) -> tuple[str, str]:
    words = {
        "overloaded": ("ServiceUnavailableException", message),
        "rate_limit": ("ThrottlingException", "Too many requests, please wait before trying again."),
        "auth": ("UnrecognizedClientException", "The security token included in the request is invalid."),
        "quota": ("ServiceQuotaExceededException", "Your account has used up its quota"),
        "context": ("ValidationException", "Input is too long for requested model."),
        "policy": ("ValidationException", "The request was blocked by content filtering policy"),
        "bad": ("ValidationException", message),
        "missing": ("ResourceNotFoundException", "Could not resolve the foundation model m"),
    }
    return words.get(kind, ("InternalServerException", message))
