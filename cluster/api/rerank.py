"""POST /v1/rerank and /v2/rerank: documents by what they have to do with a query; a cross-encoder's own scores, or the
cosine of an embedding model's vectors.
"""

from __future__ import annotations

import json
import math
from array import array

from diptych.cluster.config import LimitSettings
from diptych.protos.embedding import EmbedKind
from diptych.protos.errors import ContextTooLong, InvalidRequest
from diptych.protos.rerank import DEFAULT_TOKENS_PER_DOC, RerankRequest, parse_rerank, rerank_answer

from .text_model import DOCUMENT, QUERY, TextModel
from .texts import Texts


class RerankEndpoint:
    """A TextEndpoint."""

    id_prefix = "rank-"
    wanted = "rank"
    texts_field = "documents"

    def parse(self, body: bytes, limits: LimitSettings) -> RerankRequest:
        """The checked body."""
        return parse_rerank(body, most_documents=limits.rerank_documents)

    async def prepare(self, request: RerankRequest, model: TextModel) -> Texts:
        """Pairs, or the query and then the documents. Documents lose their ends, the query must fit."""
        most = request.max_tokens_per_doc or DEFAULT_TOKENS_PER_DOC
        if model.is_ranker:
            rows = await model.encode_pairs(request.query, request.documents, tokens_per_doc=most)
            return Texts(EmbedKind.SCORES, rows)
        asked, read = (model.prompt(("", kind)) for kind in (QUERY, DOCUMENT))
        if not model.facts.pools_prompt and (asked or read):
            raise InvalidRequest(
                f"the model {request.model} leaves its prompts out of its vectors and is for POST /v1/embeddings alone",
                "model",
            )
        try:
            query = await model.encode([request.query], prompt=asked, truncate="none")
        except (InvalidRequest, ContextTooLong) as exc:
            raise type(exc)(exc.message.replace("input[0]", "query", 1), "query") from None
        documents = await model.shortened(request.documents, tokens_per_doc=most)
        rows = query + await model.encode(documents, prompt=read, truncate="end")
        return Texts(EmbedKind.SIMILARITIES, rows)

    def answer(
        self, request: RerankRequest, model: TextModel, texts: Texts, values: list[array[float]], id: str
    ) -> bytes:
        """The shape that Cohere's and Jina's clients read."""
        scores = [row[0] for row in values]
        if model.is_ranker and model.facts.activation == "sigmoid":
            scores = [_sigmoid(score) for score in scores]
        told = rerank_answer(request, scores, id=id, num_tokens=texts.num_tokens)
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def _sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number)) if number >= 0 else math.exp(number) / (1 + math.exp(number))
