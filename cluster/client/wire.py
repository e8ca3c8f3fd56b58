"""What both clients share: request bodies, events of a stream, and errors as the exceptions of protos/errors.py. Pure,
but for `locate`, which looks for a running cluster on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from diptych.protos.errors import (
    CapacityError,
    DeadlineExceeded,
    DiptychError,
    EngineLost,
    InvalidRequest,
    RequestError,
    StartupError,
    error_from_code,
)

from .answers import Delta, JsonObject, deltas_of

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
CONNECT_TIMEOUT_S = 5.0

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]


class ServerUnreachable(EngineLost):
    """No server answers, or the connection to it broke; a stream may have given a part of its answer."""

    code = "server_unreachable"


def base_of(url: str) -> str:
    """Without the trailing /v1 that other clients want."""
    return url.rstrip("/").removesuffix("/v1")


def locate(url: str | None) -> str:
    """`url`; None: that of the cluster started last on this machine. Raises StartupError without one."""
    if url is not None:
        return url
    from diptych.cluster.config import default_run_dir
    from diptych.cluster.control.state import find_cluster

    state = find_cluster(default_run_dir(), None)
    if state is None:
        raise StartupError("no cluster of yours runs on this machine; start `diptych serve`, or give a url")
    return state.url


def timeouts(read_s: float) -> httpx2.Timeout:
    """`read_s` bounds the wait for each piece of an answer."""
    return httpx2.Timeout(read_s, connect=CONNECT_TIMEOUT_S)


def chat_body(messages: Messages, params: Mapping[str, object]) -> JsonObject:
    """Of a chat request; a plain string is one turn of the user."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _body({"messages": turns}, params)


def completion_body(prompt: Prompt, params: Mapping[str, object]) -> JsonObject:
    """Of a text completion."""
    return _body({"prompt": prompt if isinstance(prompt, str) else list(prompt)}, params)


def _body(fields: JsonObject, params: Mapping[str, object]) -> JsonObject:
    if not params.keys().isdisjoint({"stream", "stream_options"}):
        raise InvalidRequest("streaming is chosen by the method: stream_chat or stream_complete", "stream")
    return {**fields, **params}


def streamed(body: JsonObject) -> JsonObject:
    """The same as a stream that ends with the token counts."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def headers(tenant: str, key: str) -> dict[str, str]:
    """Those of every request: whose it is."""
    named = {"x-tenant": tenant, "authorization": f"Bearer {key}" if key else ""}
    return {name: value for name, value in named.items() if value}


def of_session(session: str) -> dict[str, str]:
    """Those of one request."""
    return {"x-session-id": session} if session else {}


def raise_for(status: int, body: bytes, retry_after: str | None) -> None:
    """Raises what an answer with an error status means; returns when it is none."""
    if status == 200:
        return
    try:
        error = json.loads(body)["error"]
        message, code, param = str(error["message"]), str(error.get("code")), error.get("param")
    except (ValueError, KeyError, TypeError):
        raise ServerUnreachable(f"the server answered with status {status} and no error of this API") from None
    raise error_of(status, code, message, param, retry_after)


def error_of(status: int, code: str, message: str, param: str | None, retry_after: str | None = None) -> DiptychError:
    """The exception of the tree that the server raised, as far as its code and status tell."""
    error = error_from_code(code, message)
    if isinstance(error, CapacityError) and retry_after is not None and retry_after.isdecimal():
        return type(error)(message, float(retry_after))
    if isinstance(error, RequestError):
        cls = InvalidRequest if type(error) is RequestError else type(error)
        return cls(message, param)
    return InvalidRequest(message, param) if 400 <= status < 500 and error.code != code else error


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Failures of the way to the server, in the words of our tree."""
    try:
        yield
    except httpx2.ConnectError as exc:
        raise ServerUnreachable(f"no server answers at {url}; start one with `diptych serve`, or name another") from exc
    except httpx2.ReadTimeout as exc:
        raise DeadlineExceeded("the server sent nothing for as long as the client's timeout_s") from exc
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as exc:
        raise ServerUnreachable(f"{url} is not a server's address; write one such as http://127.0.0.1:8000") from exc
    except httpx2.HTTPError as exc:
        raise ServerUnreachable(f"the connection to {url} broke: {exc or type(exc).__name__}") from exc


@contextmanager
def understood(url: str) -> Iterator[None]:
    """Around the reading of an answer: one in another shape is another server's."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ServerUnreachable(f"{url} is not a server of this API: its answer has another shape") from exc


class Events:
    """A stream of server-sent events, fed as it comes. `is_over` after [DONE]; one that ends before that is broken.

    Lines end with a line feed alone: a text may hold any other character that Python's splitlines would split at.
    """

    def __init__(self, url: str) -> None:
        self.is_over = False
        self._url = url
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Delta]:
        """What the whole lines of it hold. Raises the error that the server ended the stream with."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line == b"data: [DONE]":
                self.is_over = True
            elif line.startswith(b"data: ") and not self.is_over:
                yield from self._event(line[6:])

    def _event(self, data: bytes) -> list[Delta]:
        with understood(self._url):
            event = json.loads(data)
            if "error" in event:
                error = event["error"]
                raise error_of(500, str(error.get("code")), str(error["message"]), error.get("param"))
            return deltas_of(event)

    def check_whole(self) -> None:
        """Raises ServerUnreachable when the end was not seen."""
        if not self.is_over:
            raise ServerUnreachable("the answer broke off")
