"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.protos.openai import ChatRequest, GenerationRequest, parse_chat
from diptych.protos.openai_replies import JsonObject, chat_choice, completion

from .answer import Choice, Piece
from .generation import Answer, Whole
from .logprobs import Entry, chat_logprobs, prompt_logprobs
from .served import ServedModel
from .text import TokenTable


class ChatEndpoint:
    """Messages through the chat template."""

    is_chat = True
    id_prefix = "chatcmpl-"
    default_max_tokens: int | None = None

    def parse(self, body: bytes) -> ChatRequest:
        """The checked body."""
        return parse_chat(body)

    async def prompts(self, request: GenerationRequest, model: ServedModel, room: int) -> list[tuple[int, ...]]:
        """The rendered conversation, which is one; special tokens come from the template alone."""
        assert isinstance(request, ChatRequest)
        text = model.renderer.chat_text(request.messages)
        return [await model.renderer.encode(text, add_special=False, max_tokens=room, param="messages")]

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """Under either of its two names."""
        assert isinstance(request, ChatRequest)
        return request.wanted_tokens

    def logprobs(self, request: GenerationRequest) -> int | None:
        """`top_logprobs`, where `logprobs` is true."""
        assert isinstance(request, ChatRequest)
        return request.wanted_logprobs

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """As asked."""
        return request.prompt_logprobs

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """A conversation is not repeated."""
        return None

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """Token by token."""
        return chat_logprobs(entries, table)

    def answer(self, answer: Answer, choices: list[Whole]) -> JsonObject:
        """The whole answer; vLLM's prompt_logprobs stand at its top."""
        reply = completion(
            "chat.completion",
            id=answer.id,
            created=answer.created,
            model=answer.request.model,
            choices=[chat_choice(w.choice.index, w.text, w.choice.finish_reason, w.logprobs) for w in choices],
            use=answer.usage(),
        )
        first, num_top = choices[0].choice, answer.request.prompt_logprobs
        if num_top is not None and first.prompt_logprobs is not None:
            table = answer.model.renderer.table
            reply["prompt_logprobs"] = prompt_logprobs(first.call.prompt, first.prompt_logprobs, num_top, table)
        return reply
