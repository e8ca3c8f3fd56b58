"""POST /v1/chat/completions."""

from __future__ import annotations

from diptych.protos.openai import ChatRequest, GenerationRequest, parse_chat
from diptych.protos.openai_replies import JsonObject, chat_completion

from .served import ServedModel


class ChatEndpoint:
    """Messages through the chat template."""

    is_chat = True
    id_prefix = "chatcmpl-"

    def parse(self, body: bytes) -> ChatRequest:
        """The checked body."""
        return parse_chat(body)

    async def prompt(self, request: GenerationRequest, model: ServedModel, room: int) -> tuple[int, ...]:
        """The rendered conversation; special tokens come from the template alone."""
        assert isinstance(request, ChatRequest)
        text = model.renderer.chat_text(request.messages)
        return await model.renderer.encode(text, add_special=False, max_tokens=room, param="messages")

    def max_tokens(self, request: GenerationRequest, default: int) -> int | None:
        """None when the client named none: the rest of the context, at most `default`."""
        assert isinstance(request, ChatRequest)
        return request.wanted_tokens

    def answer(
        self, *, id: str, created: int, model: str, text: str, finish_reason: str, use: JsonObject
    ) -> JsonObject:
        """The whole answer."""
        return chat_completion(id=id, created=created, model=model, text=text, finish_reason=finish_reason, use=use)
