"""POST /v1/embeddings: texts, or token ids as they are, to vectors."""

from __future__ import annotations

import asyncio
from array import array

from pydantic_core import to_json

from diptych.cluster.config import LimitSettings
from diptych.protos.embedding import EmbedKind, TextRow
from diptych.protos.errors import ContextTooLong, InvalidRequest
from diptych.protos.openai_embeddings import (
    EmbeddingRequest,
    embedding_entries,
    embeddings_head,
    parse_embeddings,
    text_usage,
)

from .sampling import check_token_ids
from .text_model import TextModel
from .texts import Texts, check_number


class EmbeddingsEndpoint:
    """A TextEndpoint."""

    id_prefix = "embd-"
    wanted = "embed"
    texts_field = "input"

    def parse(self, body: bytes, limits: LimitSettings) -> EmbeddingRequest:
        """The checked body; of token ids their number is bounded before they are looked at."""
        request = parse_embeddings(body, most_inputs=limits.embedding_inputs)
        check_number(sum(len(text) for text in request.input if not isinstance(text, str)), self.texts_field, limits)
        return request

    async def prepare(self, request: EmbeddingRequest, model: TextModel) -> Texts:
        """Tokenised with the model's prompt before each text; token ids as given."""
        if model.is_ranker:
            raise model.refusal("embed")
        facts = model.facts
        if request.dimensions is not None and request.dimensions > facts.dimensions:
            raise InvalidRequest(
                f"dimensions is {request.dimensions}, and this model's vectors have {facts.dimensions}", "dimensions"
            )
        prompt = model.prompt(request.kind)
        skip = await model.prompt_tokens(prompt)
        texts = [text for text in request.input if isinstance(text, str)]
        if len(texts) == len(request.input):
            rows = await model.encode(texts, prompt=prompt, truncate=request.truncate)
        else:
            if request.kind is not None and prompt:
                raise InvalidRequest(
                    f"{request.kind[0]} puts a prompt before a text, and token ids are taken as they are: send texts",
                    request.kind[0],
                )
            skip, rows = 0, await asyncio.to_thread(self._all_given, request, model)
        return Texts(EmbedKind.VECTORS, rows, skip, request.dimensions or 0)

    def answer(
        self, request: EmbeddingRequest, model: TextModel, texts: Texts, values: list[array[float]], id: str
    ) -> bytes:
        """OpenAI's shape."""
        # Piece by piece: a large answer as one would hold the interpreter from all streams until it is written.
        entries = [to_json(entry) for entry in embedding_entries(values, request.encoding_format)]
        head = to_json(embeddings_head(request.model) | {"usage": text_usage(texts.num_tokens)})
        return b"".join((head[:-1], b',"data":[', b",".join(entries), b"]}"))

    def _all_given(self, request: EmbeddingRequest, model: TextModel) -> list[TextRow]:
        return [self._given(at, text, request, model) for at, text in enumerate(request.input)]

    def _given(self, at: int, text: str | tuple[int, ...], request: EmbeddingRequest, model: TextModel) -> TextRow:
        if isinstance(text, str):
            raise InvalidRequest(f"input[{at}] is a text beside lists of token ids; send one kind", "input")
        check_token_ids(text, model.vocab_size, "input")
        longest, cut = model.facts.max_tokens, request.truncate or model.truncate
        if len(text) > longest and cut == "none":
            raise ContextTooLong(
                f"input[{at}] has {len(text)} tokens, and this model reads {longest}; send fewer, or "
                '"truncate": "end" (or "start") to have it cut there',
                "input",
            )
        return TextRow(text[-longest:] if cut == "start" else text[:longest])
