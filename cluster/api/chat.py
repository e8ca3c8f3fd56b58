"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.protos.openai import ChatRequest, GenerationRequest, parse_chat
from diptych.protos.openai_replies import JsonObject, chat_choice, completion, usage

from .answer import Choice, Piece
from .endpoint import AnswerView, Whole
from .logprobs import Entry, chat_logprobs
from .prepared import Prepared, prepare_chat
from .said import is_legacy, message_of
from .served import ServedModel
from .sse import OpenAIStream
from .text import TokenTable


class ChatEndpoint(OpenAIStream):
    """Messages through the chat template."""

    is_chat = True
    id_prefix = "chatcmpl-"
    relays = True
    default_max_tokens: int | None = None

    def parse(self, body: bytes) -> ChatRequest:
        """The checked body."""
        return parse_chat(body)

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """The rendered conversation, which is one; special tokens come from the template alone."""
        assert isinstance(request, ChatRequest)
        return await prepare_chat(request, model, room)

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

    def answer(self, answer: AnswerView, choices: list[Whole]) -> JsonObject:
        """The whole answer; vLLM's prompt_logprobs stand at its top."""
        legacy = is_legacy(answer.request)
        reply = completion(
            "chat.completion",
            id=answer.id,
            created=answer.created,
            model=answer.request.model,
            fingerprint=answer.fingerprint,
            choices=[_shaped(whole, is_legacy=legacy) for whole in choices],
            use=usage(answer.used()),
        )
        if choices[0].prompt_logprobs is not None:
            reply["prompt_logprobs"] = choices[0].prompt_logprobs
        return reply


def _shaped(whole: Whole, *, is_legacy: bool) -> JsonObject:
    choice, message = whole.choice, message_of(whole.said, is_legacy=is_legacy)
    if (carried := choice.carried) is not None:
        message["provider_specific_fields"] = carried
    shaped = chat_choice(choice.index, message, choice.end_reason, whole.logprobs)
    if whole.faults:
        shaped["schema_errors"] = whole.faults
    return shaped
