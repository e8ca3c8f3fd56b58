"""Embeddings and rerank over HTTP from tiny models: what clients send, what they get, and what goes wrong meanwhile.

Guards: a vector of another text; a truncated dimension that is not of length 1; NaN in JSON; a request that an engine's
death answers; one bad request that fails its neighbours; requests that are computed one by one.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from fences import URL, Example, of_kind
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from safetensors.torch import load_file, save_file
from text_cluster import TextCluster, make_decoder, make_encoder, make_ranker, text_cluster, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification

from diptych.cluster.config import LimitSettings, ModelSettings
from diptych.cluster.engine.embed_engine import EmbedEngine
from diptych.cluster.engine.embed_line import Slice
from diptych.cluster.router.rig import until
from diptych.protos.faults import Action, FaultRule, FaultSettings, Point
from diptych.protos.settings import EmbedPoolSettings

TEXTS = ["the cat sat on the mat", "a dog", "the sky is blue", "one two three four five", "was not"]
BAD_WORD = "ran"  # of which a vector is not a number, in a model that is well otherwise


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ranker(tmp_path_factory.mktemp("ranker"))


@pytest.fixture
async def cluster(encoder: Path, ranker: Path, tmp_path: Path) -> AsyncIterator[TextCluster]:
    async with text_cluster(tmp_path, {"encoder": encoder, "ranker": ranker}) as made:
        yield made


def reference(folder: Path, texts: list[str], *, is_bert: bool = True) -> np.ndarray[Any, Any]:
    """A plain forward of transformers for each text: mean of an encoder, last token of a decoder; length 1."""
    build: Any = AutoModel.from_pretrained
    model, tokenizer = build(folder, dtype=torch.float32).eval(), tiny_tokenizer(is_bert=is_bert)
    found = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            vector = hidden.mean(0) if is_bert else hidden[-1]
            found.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    return np.stack(found)


def vectors(reply: httpx2.Response) -> np.ndarray[Any, Any]:
    assert reply.status_code == 200, reply.text
    data = reply.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.asarray([entry["embedding"] for entry in data], dtype=np.float32)


def refusal(reply: httpx2.Response) -> tuple[str | None, str]:
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    return error["param"], error["message"]


# ---- what is asked for, and what it is ----


async def test_vectors_equal_a_plain_forward_in_the_order_of_the_texts(cluster: TextCluster, encoder: Path) -> None:
    reply = await cluster.post("/v1/embeddings", model="encoder", input=TEXTS)
    np.testing.assert_allclose(vectors(reply), reference(encoder, TEXTS), atol=1e-5)
    tokens = sum(len(tiny_tokenizer().encode(text).ids) for text in TEXTS)
    assert reply.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (reply.json()["object"], reply.json()["model"]) == ("list", "encoder")


async def test_a_decoder_gives_its_last_tokens_state(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "decoder")
    settings = ModelSettings(task="embed", embed=EmbedPoolSettings(threads=1))
    async with text_cluster(tmp_path, {"decoder": folder}, settings=settings) as made:
        found = vectors(await made.post("/v1/embeddings", model="decoder", input=TEXTS))
        np.testing.assert_allclose(found, reference(folder, TEXTS, is_bert=False), atol=1e-5)
        (card,) = (await made.get("/v1/models"))["data"]
        assert card["capabilities"]["pooling"] == "last"


async def test_both_openai_clients_read_the_same(cluster: TextCluster) -> None:
    url = f"{cluster.listener.url}/v1"
    with OpenAI(base_url=url, api_key="none") as client:
        one = await asyncio.to_thread(client.embeddings.create, model="encoder", input=TEXTS)
        plain = await asyncio.to_thread(
            client.embeddings.create, model="encoder", input=TEXTS, encoding_format="float", dimensions=8
        )
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        other = await client.embeddings.create(model="encoder", input=TEXTS)
        with pytest.raises(BadRequestError, match="dimensions"):
            await client.embeddings.create(model="encoder", input=TEXTS, dimensions=33)
        with pytest.raises(NotFoundError):
            await client.embeddings.create(model="nothing", input=TEXTS)
        with pytest.raises(BadRequestError, match="POST /v1/embeddings"):
            await client.chat.completions.create(model="encoder", messages=[{"role": "user", "content": "a"}])
    assert [entry.embedding for entry in one.data] == [entry.embedding for entry in other.data]
    assert len(plain.data[0].embedding) == 8


async def test_base64_is_little_endian_float32(cluster: TextCluster) -> None:
    plain = vectors(await cluster.post("/v1/embeddings", model="encoder", input="a cat"))
    packed = (await cluster.post("/v1/embeddings", model="encoder", input="a cat", encoding_format="base64")).json()
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4"), plain[0])


async def test_fewer_dimensions_are_the_first_ones_at_length_one(cluster: TextCluster) -> None:
    whole = vectors(await cluster.post("/v1/embeddings", model="encoder", input=TEXTS))
    cut = vectors(await cluster.post("/v1/embeddings", model="encoder", input=TEXTS, dimensions=5))
    wanted = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, wanted, atol=1e-5)


async def test_token_ids_are_taken_as_they_are(cluster: TextCluster) -> None:
    ids = [tiny_tokenizer().encode(text).ids for text in TEXTS]
    by_text = vectors(await cluster.post("/v1/embeddings", model="encoder", input=TEXTS))
    np.testing.assert_allclose(
        vectors(await cluster.post("/v1/embeddings", model="encoder", input=ids)), by_text, atol=1e-6
    )
    one = vectors(await cluster.post("/v1/embeddings", model="encoder", input=ids[1]))
    np.testing.assert_allclose(one[0], by_text[1], atol=1e-6)


async def test_long_texts_are_cut_where_that_is_asked_for(cluster: TextCluster) -> None:
    long = " ".join(["cat", *["dog"] * 30, "sky"])
    param, message = refusal(await cluster.post("/v1/embeddings", model="encoder", input=["a", long]))
    assert (param, "input[1]" in message, "truncate" in message) == ("input", True, True)
    for side, kept in (("end", ["cat", *["dog"] * 21]), ("start", [*["dog"] * 21, "sky"])):
        cut = vectors(await cluster.post("/v1/embeddings", model="encoder", input=long, truncate=side))
        same = vectors(await cluster.post("/v1/embeddings", model="encoder", input=" ".join(kept)))
        np.testing.assert_allclose(cut, same, atol=1e-6)


# ---- rerank ----


async def test_an_embedding_model_ranks_by_cosine(cluster: TextCluster, encoder: Path) -> None:
    reply = (await cluster.post("/v1/rerank", model="encoder", query="a cat", documents=TEXTS)).json()
    found = reference(encoder, ["a cat", *TEXTS])
    cosines = found[1:] @ found[0]
    assert [result["index"] for result in reply["results"]] == np.argsort(-cosines).tolist()
    for result in reply["results"]:
        assert result["relevance_score"] == pytest.approx(float(cosines[result["index"]]), abs=1e-5)
        assert "document" not in result


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
async def test_a_cross_encoder_scores_pairs(activation: str | None, tmp_path: Path) -> None:
    folder = make_ranker(tmp_path / "ranker", activation=activation)
    build: Any = AutoModelForSequenceClassification.from_pretrained
    model, scores = build(folder, dtype=torch.float32).eval(), []
    with torch.inference_mode():
        for text in TEXTS:
            pair = tiny_tokenizer().encode("a cat", text)
            inputs = {"input_ids": torch.tensor([pair.ids]), "token_type_ids": torch.tensor([pair.type_ids])}
            logit = model(**inputs).logits[0, 0]
            scores.append(float(logit.sigmoid() if activation is None else logit))
    async with text_cluster(tmp_path, {"ranker": folder}) as made:
        reply = await made.post(
            "/v2/rerank", model="ranker", query="a cat", documents=TEXTS, top_n=3, return_documents=True
        )
        answer = reply.json()
        assert [result["index"] for result in answer["results"]] == np.argsort(-np.asarray(scores)).tolist()[:3]
        for result in answer["results"]:
            assert result["relevance_score"] == pytest.approx(scores[result["index"]], abs=1e-4)
            assert result["document"] == {"text": TEXTS[result["index"]]}
        assert answer["meta"]["billed_units"] == {"search_units": 1}
        assert answer["usage"]["total_tokens"] == answer["meta"]["tokens"]["input_tokens"]
        assert refusal(await made.post("/v1/embeddings", model="ranker", input="a"))[0] == "model"
        assert "POST /v1/rerank" in refusal(await made.post("/v1/embeddings", model="ranker", input="a"))[1]


async def test_documents_lose_their_ends_and_a_query_must_fit(cluster: TextCluster) -> None:
    long = " ".join(["cat"] + ["dog"] * 100)
    for model in ("encoder", "ranker"):
        one = (await cluster.post("/v1/rerank", model=model, query="a", documents=[long])).json()
        cut = (await cluster.post("/v1/rerank", model=model, query="a", documents=[long], max_tokens_per_doc=1)).json()
        same = (await cluster.post("/v1/rerank", model=model, query="a", documents=["cat"])).json()
        assert one["results"][0]["relevance_score"] != same["results"][0]["relevance_score"]
        assert cut["results"] == same["results"]
        param, message = refusal(await cluster.post("/v1/rerank", model=model, query=long, documents=["a"]))
        assert (param, message.startswith("query has")) == ("query", True)


# ---- wrong uses ----

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [""]}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [[1], "a"]}, "input"),
    ({"input": [1, True]}, "input"),
    ({"input": [1, -1]}, "input"),
    ({"input": [1, 10**6]}, "input"),
    ({"input": [[1], [2**40]]}, "input"),
    ({"input": [[2] * 25]}, "input"),
    ({"input": None}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({}, "input"),
    ({"input": "a", "dimensions": 33}, "dimensions"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "truncate": "middle"}, "truncate"),
    ({"input": "a", "input_type": "novel"}, "input_type"),
    ({"input": "a", "input_type": "query", "task": "document"}, "task"),
    ({"input": "a", "stream": True}, "stream"),
    ({"input": ["a"] * 6}, "input"),
    ({"input": ["a b c d e f g h i j"] * 5}, "input"),
    ({"input": [[1] * 10] * 5}, "input"),
]


async def test_wrong_requests_are_told_their_field(encoder: Path, tmp_path: Path) -> None:
    limits = LimitSettings(embedding_inputs=5, rerank_documents=4, embedding_tokens=40)
    async with text_cluster(tmp_path, {"encoder": encoder}, limits=limits) as made:
        for body, field in WRONG:
            param, message = refusal(await made.post("/v1/embeddings", **({"model": "encoder"} | body)))
            assert (param, field in message) == (field, True), (body, message)
        for body, field in (
            ({"documents": ["a"]}, "query"),
            ({"query": "", "documents": ["a"]}, "query"),
            ({"query": "a", "documents": []}, "documents"),
            ({"query": "a", "documents": ["a"] * 5}, "documents"),
            ({"query": "a", "documents": ["a", ""]}, "documents[1]"),
            ({"query": "a", "documents": [{"text": "a", "id": 1}]}, "documents[0]"),
            ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
            ({"query": "a", "documents": ["a"], "rank_fields": ["body"]}, "rank_fields"),
            ({"query": "a", "documents": ["a"], "model_extra": 1}, "model_extra"),
        ):
            param, _ = refusal(await made.post("/v1/rerank", **({"model": "encoder"} | body)))
            assert param == field, body
        assert made.count("embed_requests_total") == 0


async def test_models_of_other_kinds_say_where_they_answer(cluster: TextCluster) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        param, message = refusal(await cluster.post(path, model="encoder", **body))
        assert (param, "POST /v1/embeddings" in message) == ("model", True)
    counted = await cluster.post("/v1/tokenize", model="encoder", prompt="a")
    assert (counted.status_code, counted.json()["count"]) == (200, len(counted.json()["tokens"]))
    unknown = await cluster.post("/v1/embeddings", model="nothing", input="a")
    assert (unknown.status_code, "encoder" in unknown.text) == (404, True)


async def test_the_profile_tells_what_a_model_makes_of_texts(cluster: TextCluster) -> None:
    cards = {card["id"]: card["capabilities"] for card in (await cluster.get("/v1/models"))["data"]}
    told = cards["encoder"]
    assert (told["task"], told["dimensions"]["max"], told["pooling"], told["max_tokens"]) == ("embed", 32, "mean", 24)
    assert told["endpoints"] == ["embeddings", "rerank"]
    assert (cards["ranker"]["task"], cards["ranker"]["endpoints"]) == ("rerank", ["rerank"])
    ready = await cluster.get("/ready")
    assert ready == {"ready": True, "models": {"encoder": {"embed": 1}, "ranker": {"embed": 1}}}
    assert (await cluster.get("/info"))["degraded"] == []


# ---- what goes wrong ----


async def test_many_requests_share_steps(cluster: TextCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    held = await held_until(64, cluster.engines["embed-0"], monkeypatch)
    replies = await asyncio.gather(
        *(cluster.post("/v1/embeddings", model="encoder", input=[TEXTS[i % 5], TEXTS[i % 3]]) for i in range(64))
    )
    whole = vectors(await cluster.post("/v1/embeddings", model="encoder", input=TEXTS))
    for number, reply in enumerate(replies):
        np.testing.assert_allclose(vectors(reply), whole[[number % 5, number % 3]], atol=1e-5)
    await until(lambda: cluster.count("embed_requests_total") == 65)  # an answer is out before it is counted
    assert held.is_set()
    assert cluster.count("embed_steps_total") < 10  # of one step each it would be 65


async def held_until(num: int, engine: EmbedEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The engine takes no step until `num` requests wait for it, however slowly they come; set once they did."""
    line, asked, full = engine._line, threading.Event(), threading.Event()
    take = line.take

    def held(timeout_s: float | None) -> list[Slice]:
        asked.set()
        if line.num_jobs < num and not full.is_set() and not line.is_closed:
            time.sleep(0.002)
            return []
        full.set()
        return take(timeout_s)

    monkeypatch.setattr(line, "take", held)
    await until(asked.is_set)  # the step thread is past the call of the real one
    return full


async def test_numbers_that_are_none_are_an_error_of_their_request_alone(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    make_encoder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][tiny_tokenizer().token_to_id(BAD_WORD)] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    async with text_cluster(tmp_path, {"bad": folder}) as made:
        bad, *good = await asyncio.gather(
            made.post("/v1/embeddings", model="bad", input=["a cat", BAD_WORD]),
            *(made.post("/v1/embeddings", model="bad", input=TEXTS) for _ in range(8)),
        )
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "engine_fault")
        assert "text 1" in bad.json()["error"]["message"]
        for reply in good:
            assert np.isfinite(vectors(reply)).all()
        ranked = await made.post("/v1/rerank", model="bad", query="a", documents=[BAD_WORD])
        assert ranked.status_code == 500
        await until(lambda: made.count("embed_row_faults_total") == 2)


async def test_a_step_that_raises_fails_the_request_that_makes_it_raise(encoder: Path, tmp_path: Path) -> None:
    token = tiny_tokenizer().token_to_id(BAD_WORD)
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.RAISE, message=f"* {token} *", probability=1)
    async with text_cluster(tmp_path, {"encoder": encoder}, faults=FaultSettings(rules=(rule,))) as made:
        bad, *good = await asyncio.gather(
            made.post("/v1/embeddings", model="encoder", input=BAD_WORD),
            *(made.post("/v1/embeddings", model="encoder", input=TEXTS) for _ in range(8)),
        )
        assert bad.status_code == 500
        for reply in good:
            assert vectors(reply).shape == (5, 32)


async def test_a_killed_engines_requests_are_answered_by_another(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.3, probability=1)
    async with text_cluster(tmp_path, {"encoder": encoder}, num=2, faults=FaultSettings(rules=(rule,))) as made:
        asked = [asyncio.create_task(made.post("/v1/embeddings", model="encoder", input=TEXTS)) for _ in range(8)]
        await until(lambda: all(engine.status().running for engine in made.engines.values()))
        await made.kill("embed-0")
        replies = await asyncio.gather(*asked)
        np.testing.assert_allclose(vectors(replies[0]), reference(encoder, TEXTS), atol=1e-5)
        assert all(reply.status_code == 200 for reply in replies)
        assert await metric(made, "diptych_retries_total") > 0


async def test_the_last_engines_death_is_an_error_within_its_time(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.5, probability=1)
    async with text_cluster(tmp_path, {"encoder": encoder}, faults=FaultSettings(rules=(rule,))) as made:
        asked = asyncio.create_task(made.post("/v1/embeddings", model="encoder", input=TEXTS))
        await until(lambda: bool(made.engines["embed-0"].status().running))
        await made.kill("embed-0")
        reply = await asked
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_lost")
        assert reply.headers["retry-after"]


async def test_a_client_that_leaves_frees_the_engine(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.2, probability=1)
    settings = ModelSettings(embed=EmbedPoolSettings(threads=1, step_tokens=16))
    async with text_cluster(
        tmp_path, {"encoder": encoder}, settings=settings, faults=FaultSettings(rules=(rule,))
    ) as made:
        engine = made.engines["embed-0"]
        asked = asyncio.create_task(made.post("/v1/embeddings", model="encoder", input=TEXTS * 20))
        await until(lambda: bool(engine.status().running))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: engine.status().running + engine.status().waiting == 0)
        assert made.count("embed_texts_total") < 100  # not all of it was computed


async def test_a_request_can_be_cancelled_by_its_id_and_by_its_deadline(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.3, probability=1)
    settings = ModelSettings(embed=EmbedPoolSettings(threads=1, step_tokens=16))
    async with text_cluster(
        tmp_path, {"encoder": encoder}, settings=settings, faults=FaultSettings(rules=(rule,))
    ) as made:
        asked = asyncio.create_task(made.post("/v1/embeddings", model="encoder", input=TEXTS * 20))
        await until(lambda: bool(made.engines["embed-0"].status().running))
        (entry,) = (await made.get("/v1/requests"))["data"]
        await made.post(f"/v1/requests/{entry['id']}/cancel")
        assert (await asked).status_code == 499
        late = await made.post("/v1/embeddings", model="encoder", input=TEXTS * 20, timeout_s=0.5)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        await until(lambda: made.engines["embed-0"].status().running == 0)


async def test_an_engine_that_is_full_says_so(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.5, probability=1)
    settings = ModelSettings(embed=EmbedPoolSettings(threads=1, max_waiting=2))
    async with text_cluster(
        tmp_path, {"encoder": encoder}, settings=settings, faults=FaultSettings(rules=(rule,))
    ) as made:
        replies = await asyncio.gather(*(made.post("/v1/embeddings", model="encoder", input="a cat") for _ in range(6)))
        codes = sorted(reply.status_code for reply in replies)
        assert codes[:2] == [200, 200]
        assert set(codes) == {200, 503}
        assert all(reply.headers["retry-after"] for reply in replies if reply.status_code == 503)


async def test_a_draining_engine_gives_its_requests_away(encoder: Path, tmp_path: Path) -> None:
    rule = FaultRule(point=Point.ENGINE_STEP, action=Action.DELAY, delay_s=0.2, probability=1)
    async with text_cluster(tmp_path, {"encoder": encoder}, num=2, faults=FaultSettings(rules=(rule,))) as made:
        asked = [asyncio.create_task(made.post("/v1/embeddings", model="encoder", input=TEXTS)) for _ in range(6)]
        await until(lambda: all(engine.status().running for engine in made.engines.values()))
        await asyncio.to_thread(made.engines["embed-0"].drain, 0.0)
        for reply in await asyncio.gather(*asked):
            assert vectors(reply).shape == (5, 32)


async def metric(made: TextCluster, name: str) -> float:
    async with httpx2.AsyncClient() as client:
        page = (await client.get(f"{made.listener.url}/metrics")).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name}{{"))


async def test_metrics_and_lives_tell_of_embeddings(cluster: TextCluster) -> None:
    await cluster.post("/v1/embeddings", model="encoder", input=TEXTS)
    assert await metric(cluster, "diptych_requests_total") == 1
    await until(
        lambda: all(
            session.status.steps for session in cluster.router.view.sessions() if session.info.model == "encoder"
        )
    )
    assert await metric(cluster, "diptych_engine_embed_texts_total") == 5
    (entry,) = (await cluster.get("/v1/requests"))["data"]
    assert (entry["state"], entry["endpoint"]) == ("finished", "/v1/embeddings")


# ---- the documentation ----


@pytest.mark.parametrize("example", of_kind("python embeddings"), ids=str)
async def test_an_example_of_the_documentation_runs(example: Example, tmp_path: Path) -> None:
    folders = {"all-minilm-l6-v2": make_encoder(tmp_path / "e"), "ms-marco-minilm-l6-v2": make_ranker(tmp_path / "r")}
    async with text_cluster(tmp_path, folders) as made:
        command = [sys.executable, "-c", example.code.replace(URL, made.listener.url)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example that shows nothing"
