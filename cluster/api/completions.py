"""POST /v1/completions."""

from __future__ import annotations

from diptych.protos.openai import CompletionRequest, GenerationRequest, parse_completion
from diptych.protos.openai_replies import JsonObject, text_completion

from .generation import check_token_ids
from .served import ServedModel


class CompletionEndpoint:
    """A text or token ids, as they are."""

    is_chat = False
    id_prefix = "cmpl-"

    def parse(self, body: bytes) -> CompletionRequest:
        """The checked body."""
        return parse_completion(body)

    async def prompt(self, request: GenerationRequest, model: ServedModel, room: int) -> tuple[int, ...]:
        """Token ids as given, or the text's, with what the tokenizer puts around a text."""
        assert isinstance(request, CompletionRequest)
        if isinstance(request.prompt, str):
            return await model.renderer.encode(request.prompt, add_special=True, max_tokens=room, param="prompt")
        check_token_ids(request.prompt, model.vocab_size)
        return request.prompt

    def max_tokens(self, request: GenerationRequest, default: int) -> int | None:
        """OpenAI's 16 when the client named none."""
        assert isinstance(request, CompletionRequest)
        return request.wanted_tokens

    def answer(
        self, *, id: str, created: int, model: str, text: str, finish_reason: str, use: JsonObject
    ) -> JsonObject:
        """The whole answer."""
        return text_completion(id=id, created=created, model=model, text=text, finish_reason=finish_reason, use=use)
