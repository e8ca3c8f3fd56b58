"""The vectors and scores that are served equal those of sentence-transformers for the same folder, within 1e-5.

Guards: another pooling, normalisation, truncation or set of special tokens than the model was trained with. The library
runs in a process of its own: what it imports warns, and here warnings are errors.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_cluster import make_decoder, make_encoder, make_ranker, sentence_files, text_cluster

from diptych.cluster.config import ModelSettings
from diptych.cluster.models import resolve
from diptych.protos.errors import StartupError
from diptych.protos.settings import EmbedPoolSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sentence_transformers") is None, reason="see CLIENTS in the Makefile"),
]
NAME = "all-minilm-l6-v2"
TOLERANCE = 1e-5
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40
TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  spaces   around  ",
    "Stra\xdfe, na\xefve, \u6771\u4eac, \u0395\u03bb\u03bb\u03ac\u03b4\u03b1, \U0001f642 and\ttabs\nand lines",
    "unbelievably-hyphenated supercalifragilisticexpialidocious" * 3,
    "the [MASK] of a [SEP] token",
    LONG,
    LONG[:900],
]
REFERENCE = """
import json, sys
from sentence_transformers import CrossEncoder, SentenceTransformer
ask = json.load(sys.stdin)
if "query" in ask:
    scores = CrossEncoder(ask["folder"], device="cpu").predict([(ask["query"], text) for text in ask["texts"]])
    print(json.dumps(scores.tolist()))
else:
    print(json.dumps(SentenceTransformer(ask["folder"], device="cpu").encode(ask["texts"]).tolist()))
"""


def reference(**ask: object) -> np.ndarray[Any, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFERENCE],
        input=json.dumps(ask),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.asarray(json.loads(done.stdout.splitlines()[-1]))


async def served(
    folder: Path, run_dir: Path, texts: list[str], settings: ModelSettings | None = None
) -> np.ndarray[Any, Any]:
    async with text_cluster(run_dir, {"m": folder}, settings=settings) as made:
        reply = await made.post("/v1/embeddings", model="m", input=texts, truncate="end")
        assert reply.status_code == 200, reply.text
        return np.asarray([entry["embedding"] for entry in reply.json()["data"]])


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return resolve(NAME, tmp_path_factory.mktemp("cache")).path
    except StartupError as exc:
        pytest.skip(str(exc))


async def test_the_test_model(minilm: Path, tmp_path: Path) -> None:
    expected = await asyncio.to_thread(reference, folder=str(minilm), texts=TEXTS)
    np.testing.assert_allclose(await served(minilm, tmp_path, TEXTS), expected, atol=TOLERANCE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
async def test_every_pooling(pooling: str, normalize: bool, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder", pooling=pooling, normalize=normalize)
    texts = ["the cat sat on the mat", "a dog", " ".join(["blue"] * 60)]
    expected = await asyncio.to_thread(reference, folder=str(folder), texts=texts)
    np.testing.assert_allclose(await served(folder, tmp_path, texts), expected, atol=TOLERANCE)


async def test_a_decoder(tmp_path: Path) -> None:
    folder = sentence_files(make_decoder(tmp_path / "decoder"), "lasttoken", normalize=True)
    texts = ["the cat sat on the mat", "a dog", "one two three four"]
    expected = await asyncio.to_thread(reference, folder=str(folder), texts=texts)
    settings = ModelSettings(embed=EmbedPoolSettings(threads=1))
    np.testing.assert_allclose(await served(folder, tmp_path, texts, settings), expected, atol=TOLERANCE)


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
async def test_a_cross_encoder(activation: str | None, tmp_path: Path) -> None:
    folder = make_ranker(tmp_path / "ranker", activation=activation)
    texts = ["the sky is blue", "a cat sat", " ".join(["dog", *["mat"] * 60])]
    expected = await asyncio.to_thread(reference, folder=str(folder), texts=texts, query="a cat")
    async with text_cluster(tmp_path, {"m": folder}) as made:
        answer = (await made.post("/v1/rerank", model="m", query="a cat", documents=texts)).json()
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    np.testing.assert_allclose([scores[number] for number in range(3)], expected, atol=TOLERANCE, rtol=TOLERANCE)
