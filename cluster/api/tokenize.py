"""POST /v1/tokenize and /v1/detokenize: the tokens of a text or of a conversation, and the text of tokens.

A conversation has the tokens that /v1/chat/completions would compute for it, a text for a model of texts those of its
own without a prompt. No engine is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diptych.cluster.router.router import Router
from diptych.protos.errors import InvalidRequest, RequestTooLarge, UnknownModel
from diptych.protos.openai_replies import JsonObject
from diptych.protos.strict_json import printable
from diptych.protos.tokenize import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenized,
    parse_detokenize,
    parse_tokenize,
    tokenized,
)

from .body import read_body, refuse_body
from .errors import BodyTimeout
from .prepared import check_readable
from .sampling import check_token_ids
from .served import ServedModel
from .text_model import TextModel

if TYPE_CHECKING:
    from .routed import RoutedModels

INLINE_BYTES = 8 << 10  # of bodies and of texts; longer ones are worked on in a thread

Answering = Callable[[bytes], Awaitable[JsonObject]]
RequestT = TypeVar("RequestT")


class BodyApp:
    """The ASGI application of an endpoint that answers one JSON body with another. `answer` raises DiptychError."""

    def __init__(self, router: Router, answer: Answering) -> None:
        self._router = router
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            body = await read_body(scope, receive, self._router.settings.limits)
        except (RequestTooLarge, BodyTimeout) as exc:
            await refuse_body(exc, scope, receive, send)
            return
        except ClientDisconnect:
            return
        data = json.dumps(await self._answer(body), ensure_ascii=False, separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})


class TokenPages:
    """The two endpoints, for all served models; `texts`: those that embed or rank."""

    def __init__(
        self,
        router: Router,
        models: Mapping[str, ServedModel],
        texts: Mapping[str, TextModel],
        routes: RoutedModels | None = None,
    ) -> None:
        self._router = router
        self._routes = routes
        self._models: dict[str, ServedModel | TextModel] = {**models, **texts}

    async def tokenize(self, body: bytes) -> JsonObject:
        """Raises InvalidRequest naming the field, UnknownModel."""
        request = await _parsed(parse_tokenize, body)
        model = self._model(request.model)
        if isinstance(model, TextModel):
            if request.prompt is None:
                raise InvalidRequest(
                    f"messages: the model {printable(model.name)} reads texts: send prompt", "messages"
                )
            tokens = await model.tokens(request.prompt, add_special=request.add_special_tokens)
            room, names = model.facts.max_tokens, model.tokenizer
        else:
            tokens = await self._tokens(request, model)
            room, names = model.max_context_tokens, model.renderer.tokenizer
            room = min(room, self._router.view.capacity_tokens(model.name) or room)
        words = [names.id_to_token(token) or "" for token in tokens] if request.return_token_strs else None
        return tokenized(tokens, room, words)

    async def _tokens(self, request: TokenizeRequest, model: ServedModel) -> tuple[int, ...]:
        text = request.prompt
        if text is None:
            check_readable(request.messages, model)
            text = model.renderer.chat_text(request.messages, tools=request.tools, options=request.template)
        # Counting is for texts that may be too long as well: no text has more tokens than twice its bytes.
        most = 2 * len(text.encode()) + 1
        return await model.renderer.encode(
            text, add_special=request.add_special_tokens, max_tokens=most, param="prompt"
        )

    async def detokenize(self, body: bytes) -> JsonObject:
        """Raises InvalidRequest naming the field, UnknownModel. Special tokens are written out."""
        request: DetokenizeRequest = await _parsed(parse_detokenize, body)
        model = self._model(request.model)
        check_token_ids(request.tokens, model.vocab_size, "tokens")
        if isinstance(model, TextModel):
            return detokenized(await model.text(request.tokens))
        batch = [list(request.tokens)]
        if len(body) <= INLINE_BYTES:
            return detokenized(model.renderer.tokenizer.decode(batch[0], skip_special_tokens=False))
        texts = await asyncio.to_thread(model.renderer.tokenizer.decode_batch, batch, skip_special_tokens=False)
        return detokenized(texts[0])

    def _model(self, name: str | None) -> ServedModel | TextModel:
        known = ", ".join(sorted(self._models))
        if name is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise InvalidRequest(f"model is missing: more than one is served here: {known}", "model")
        if name not in self._models:
            if self._routes is not None and self._routes.takes(name, self._models):
                raise self._routes.unknown(name, self._models, is_chat=False)
            raise UnknownModel(f"the model {printable(name)} is not served; there is: {known}", "model")
        return self._models[name]


async def _parsed(parse: Callable[[bytes], RequestT], body: bytes) -> RequestT:
    return parse(body) if len(body) <= INLINE_BYTES else await asyncio.to_thread(parse, body)
