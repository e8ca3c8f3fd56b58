"""A batch of embeddings: each line's vectors are those that the endpoint gives, and a ranker is no model for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
from text_cluster import WAIT_S, make_encoder, make_ranker, text_cluster

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["the cat sat on the mat", "a dog", "the sky is blue", "one two three"]


async def ended(http: httpx2.AsyncClient, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of these lines, once it is over."""
    data = "\n".join(map(json.dumps, lines)).encode()
    file = (await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", data)})).json()
    body = {"input_file_id": file["id"], "endpoint": EMBEDDINGS, "completion_window": "24h"}
    batch: dict[str, Any] = (await http.post("/v1/batches", json=body)).json()
    async with asyncio.timeout(WAIT_S):
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.05)
            batch = (await http.get(f"/v1/batches/{batch['id']}")).json()
    return batch


async def test_a_batch_of_embeddings_gives_the_vectors_of_the_endpoint(tmp_path: Path) -> None:
    folders = {"encoder": make_encoder(tmp_path / "encoder"), "ranker": make_ranker(tmp_path / "ranker")}
    (tmp_path / "run").mkdir()
    async with (
        text_cluster(tmp_path / "run", folders) as cluster,
        httpx2.AsyncClient(base_url=cluster.listener.url, timeout=WAIT_S) as http,
    ):
        bodies: list[dict[str, Any]] = [{"model": "encoder", "input": text} for text in TEXTS]
        bodies.append({"model": "encoder", "input": TEXTS, "dimensions": 8, "encoding_format": "base64"})
        bodies.append({"model": "encoder", "input": "the " * 100})
        lines = [
            {"custom_id": f"c{i}", "method": "POST", "url": EMBEDDINGS, "body": body} for i, body in enumerate(bodies)
        ]
        batch = await ended(http, lines)
        assert batch["status"] == "completed", batch
        assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
        results = (await http.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
        tokens = 0
        for body, line in zip(bodies, results, strict=False):
            told = json.loads(line)["response"]["body"]
            direct = (await http.post(EMBEDDINGS, json=body)).json()
            assert told["data"] == direct["data"]
            tokens += told["usage"]["prompt_tokens"]
        assert batch["usage"]["input_tokens"] == tokens
        (refused,) = (await http.get(f"/v1/files/{batch['error_file_id']}/content")).text.splitlines()
        assert json.loads(refused)["response"]["body"]["error"]["code"] == "context_length_exceeded"

        wrong = await ended(http, [{**lines[0], "body": {"model": "ranker", "input": "a"}}])
        assert wrong["status"] == "completed", wrong  # what only the model can tell is told by line
        assert wrong["request_counts"]["failed"] == 1
        unknown = await ended(http, [{**lines[0], "body": {"model": "else", "input": "a"}}])
        assert [error["code"] for error in unknown["errors"]["data"]] == ["model_not_found"]
