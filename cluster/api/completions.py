"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diptych.protos.openai import CompletionRequest, GenerationRequest, parse_completion
from diptych.protos.openai_replies import JsonObject, completion, text_choice, usage

from .answer import Choice, Piece
from .endpoint import AnswerView, Whole
from .logprobs import Entry, text_logprobs
from .prepared import Prepared, prepare_completion
from .sampling import check_token_ids
from .served import ServedModel
from .sse import OpenAIStream
from .text import TextStream, TokenTable


class CompletionEndpoint(OpenAIStream):
    """A text or token ids, as they are."""

    is_chat = False
    id_prefix = "cmpl-"
    relays = False
    default_max_tokens: int | None = 16  # OpenAI's documented default

    def parse(self, body: bytes) -> CompletionRequest:
        """The checked body."""
        return parse_completion(body)

    async def prepare(self, request: GenerationRequest, model: ServedModel, room: int) -> Prepared:
        """Token ids as given, or a text's, with what the tokenizer puts around a text."""
        assert isinstance(request, CompletionRequest)
        found = []
        for prompt in request.prompt:
            if isinstance(prompt, str):
                prompt = await model.renderer.encode(prompt, add_special=True, max_tokens=room, param="prompt")
            else:
                check_token_ids(prompt, model.vocab_size, "prompt")
            found.append(prompt)
        return await prepare_completion(request, model, found)

    def max_tokens(self, request: GenerationRequest) -> tuple[str, int] | None:
        """As asked."""
        assert isinstance(request, CompletionRequest)
        return request.wanted_tokens

    def logprobs(self, request: GenerationRequest) -> int | None:
        """As asked."""
        assert isinstance(request, CompletionRequest)
        return request.logprobs

    def prompt_logprobs(self, request: GenerationRequest) -> int | None:
        """As asked, or as many as an echo with logprobs shows."""
        assert isinstance(request, CompletionRequest)
        wanted = [request.prompt_logprobs, request.logprobs if request.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    def echo(self, request: GenerationRequest, choice: Choice, table: TokenTable) -> Piece | None:
        """The prompt; with logprobs also its tokens, and what follows counts its characters from here."""
        assert isinstance(request, CompletionRequest)
        if not request.echo:
            return None
        stream = TextStream(table, ())
        text, offsets = "", []
        for token in choice.call.prompt:
            offsets.append(stream.num_settled)
            text += stream.feed([token])
        text += stream.flush()
        given = request.prompt[choice.index // request.num_choices]
        if isinstance(given, str):
            text = given
        if request.logprobs is None:
            return Piece(text)
        told = [replace(own, top=own.top[: request.logprobs]) for own in choice.prompt_logprobs or ()]
        entries = zip(choice.call.prompt, [None, *told], offsets, strict=True)
        return Piece(text, [Entry(*entry) for entry in entries])

    def shape_logprobs(self, entries: Sequence[Entry], table: TokenTable) -> JsonObject:
        """In columns."""
        return text_logprobs(entries, table)

    def answer(self, answer: AnswerView, choices: list[Whole]) -> JsonObject:
        """The whole answer; vLLM's prompt_logprobs stand in each choice."""
        shaped = []
        for whole in choices:
            choice = whole.choice
            shaped.append(text_choice(choice.index, whole.text, choice.end_reason, whole.logprobs))
            if whole.faults:
                shaped[-1]["schema_errors"] = whole.faults
            if whole.prompt_logprobs is not None:
                shaped[-1] |= {"prompt_logprobs": whole.prompt_logprobs}
        return completion(
            "text_completion",
            id=answer.id,
            created=answer.created,
            model=answer.request.model,
            fingerprint=answer.fingerprint,
            choices=shaped,
            use=usage(answer.used()),
        )
