"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.protos.openai import ChatRequest, GenerationRequest, parse_chat
from diptych.protos.openai_replies import JsonObject, chat_choice, chat_message, completion

from .answer import Choice, Piece
from .generation import Answer, Whole
from .logprobs import Entry, chat_logprobs, prompt_logprobs
from .prepared import Prepared, prepare_chat
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

    def answer(self, answer: Answer, choices: list[Whole]) -> JsonObject:
        """The whole answer; vLLM's prompt_logprobs stand at its top."""
        reply = completion(
            "chat.completion",
            id=answer.id,
            created=answer.created,
            model=answer.request.model,
            fingerprint=answer.model.fingerprint,
            choices=[_shaped(whole) for whole in choices],
            use=answer.usage(),
        )
        first, num_top = choices[0].choice, answer.request.prompt_logprobs
        if num_top is not None and first.prompt_logprobs is not None:
            table = answer.model.renderer.table
            reply["prompt_logprobs"] = prompt_logprobs(first.call.prompt, first.prompt_logprobs, num_top, table)
        return reply


def _shaped(whole: Whole) -> JsonObject:
    reader, reason = whole.choice.reader, whole.choice.finish_reason
    if reader is None:
        shaped = chat_choice(whole.choice.index, chat_message(whole.text), reason, whole.logprobs)
    else:
        shaped = chat_choice(whole.choice.index, reader.message(), reader.finish_reason(reason), whole.logprobs)
    if whole.faults:
        shaped["schema_errors"] = whole.faults
    return shaped
