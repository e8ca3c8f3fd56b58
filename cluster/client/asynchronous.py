"""The client for asyncio; client.py is its twin."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import httpx2

from diptych.protos.errors import UnknownModel

from . import wire
from .answers import Answer, Delta, ModelCard, answer_of, cards_of
from .wire import Messages, Prompt


class AsyncClient:
    """One cluster over HTTP, for one event loop. An async context manager. Otherwise like Client."""

    def __init__(
        self,
        url: str,
        *,
        tenant: str = "",
        key: str = "",
        timeout_s: float = 600.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url = wire.base_of(url)
        with wire.translated(url):
            self._http = httpx2.AsyncClient(
                base_url=url, timeout=wire.timeouts(timeout_s), transport=transport, headers=wire.headers(tenant, key)
            )
        self._model: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections; running streams end."""
        await self._http.aclose()

    async def models(self) -> list[ModelCard]:
        """What the cluster serves."""
        with wire.translated(self.url):
            response = await self._http.get(wire.MODELS)
        wire.raise_for(response.status_code, response.content, None)
        with wire.understood(self.url):
            return cards_of(response.json())

    async def chat(
        self, messages: Messages, *, model: str | None = None, session: str = "", **params: object
    ) -> Answer:
        """A whole answer to a conversation, or to one question as a string. `model` None: the first one served."""
        return await self._whole(wire.CHAT, wire.chat_body(messages, params), model, session)

    async def complete(
        self, prompt: Prompt, *, model: str | None = None, session: str = "", **params: object
    ) -> Answer:
        """A whole continuation of a text or of token ids."""
        return await self._whole(wire.COMPLETIONS, wire.completion_body(prompt, params), model, session)

    def stream_chat(
        self, messages: Messages, *, model: str | None = None, session: str = "", **params: object
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; closing the iterator stops it, on the cluster too."""
        return self._stream(wire.CHAT, wire.chat_body(messages, params), model, session)

    def stream_complete(
        self, prompt: Prompt, *, model: str | None = None, session: str = "", **params: object
    ) -> AsyncGenerator[Delta, None]:
        """The continuation as it comes; closing the iterator stops it, on the cluster too."""
        return self._stream(wire.COMPLETIONS, wire.completion_body(prompt, params), model, session)

    async def _whole(self, path: str, body: dict[str, Any], model: str | None, session: str) -> Answer:
        body["model"] = model or await self._first_model()
        with wire.translated(self.url):
            response = await self._http.post(path, json=body, headers=wire.of_session(session))
        wire.raise_for(response.status_code, response.content, response.headers.get("retry-after"))
        with wire.understood(self.url):
            return answer_of(response.json())

    async def _stream(
        self, path: str, body: dict[str, Any], model: str | None, session: str
    ) -> AsyncGenerator[Delta, None]:
        body["model"] = model or await self._first_model()
        headers = wire.of_session(session)
        with wire.translated(self.url):
            async with self._http.stream("POST", path, json=wire.streamed(body), headers=headers) as response:
                if response.status_code != 200:
                    wire.raise_for(response.status_code, await response.aread(), response.headers.get("retry-after"))
                events = wire.Events(self.url)
                async for data in response.aiter_bytes():
                    for delta in events.feed(data):
                        yield delta
                events.check_whole()

    async def _first_model(self) -> str:
        if self._model is None:
            cards = await self.models()
            if not cards:
                raise UnknownModel(f"the server at {self.url} serves no model")
            self._model = cards[0].name
        return self._model
