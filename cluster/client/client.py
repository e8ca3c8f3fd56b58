"""The client for plain Python; asynchronous.py is its twin."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import httpx2

from diptych.protos.errors import UnknownModel

from . import wire
from .answers import Answer, Delta, ModelCard, answer_of, cards_of
from .wire import Messages, Prompt


class Client:
    """One cluster over HTTP. A context manager; safe to share between threads. `key` where the cluster asks for one.

    Parameters of a call are the API's body fields: max_tokens=32, temperature=0, n=2, logprobs=True, explain=True, ...
    Every method raises the exceptions of diptych.protos.errors with the server's message, ServerUnreachable when there
    is no server, and DeadlineExceeded when it stays silent.
    """

    def __init__(
        self,
        url: str,
        *,
        tenant: str = "",
        key: str = "",
        timeout_s: float = 600.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = url = wire.base_of(url)
        with wire.translated(url):
            self._http = httpx2.Client(
                base_url=url, timeout=wire.timeouts(timeout_s), transport=transport, headers=wire.headers(tenant, key)
            )
        self._model: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections; running streams end."""
        self._http.close()

    def models(self) -> list[ModelCard]:
        """What the cluster serves."""
        with wire.translated(self.url):
            response = self._http.get(wire.MODELS)
        wire.raise_for(response.status_code, response.content, None)
        with wire.understood(self.url):
            return cards_of(response.json())

    def chat(self, messages: Messages, *, model: str | None = None, session: str = "", **params: object) -> Answer:
        """A whole answer to a conversation, or to one question as a string. `model` None: the first one served."""
        return self._whole(wire.CHAT, wire.chat_body(messages, params), model, session)

    def complete(self, prompt: Prompt, *, model: str | None = None, session: str = "", **params: object) -> Answer:
        """A whole continuation of a text or of token ids."""
        return self._whole(wire.COMPLETIONS, wire.completion_body(prompt, params), model, session)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, session: str = "", **params: object
    ) -> Generator[Delta, None, None]:
        """The answer as it comes; closing the iterator stops it, on the cluster too."""
        return self._stream(wire.CHAT, wire.chat_body(messages, params), model, session)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, session: str = "", **params: object
    ) -> Generator[Delta, None, None]:
        """The continuation as it comes; closing the iterator stops it, on the cluster too."""
        return self._stream(wire.COMPLETIONS, wire.completion_body(prompt, params), model, session)

    def _whole(self, path: str, body: dict[str, Any], model: str | None, session: str) -> Answer:
        body["model"] = model or self._first_model()
        with wire.translated(self.url):
            response = self._http.post(path, json=body, headers=wire.of_session(session))
        wire.raise_for(response.status_code, response.content, response.headers.get("retry-after"))
        with wire.understood(self.url):
            return answer_of(response.json())

    def _stream(self, path: str, body: dict[str, Any], model: str | None, session: str) -> Generator[Delta, None, None]:
        body["model"] = model or self._first_model()
        headers = wire.of_session(session)
        with (
            wire.translated(self.url),
            self._http.stream("POST", path, json=wire.streamed(body), headers=headers) as response,
        ):
            if response.status_code != 200:
                wire.raise_for(response.status_code, response.read(), response.headers.get("retry-after"))
            events = wire.Events(self.url)
            for data in response.iter_bytes():
                yield from events.feed(data)
            events.check_whole()

    def _first_model(self) -> str:
        if self._model is None:
            cards = self.models()
            if not cards:
                raise UnknownModel(f"the server at {self.url} serves no model")
            self._model = cards[0].name
        return self._model
