"""Families of models in both layouts through `diptych serve`, Ray and HTTP: the reference's tokens, six models at once.

The checkpoints' tokenizer writes token 17 as t17, so that an answer's text tells its tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from reference import Reference
from serving import Cluster, alive, start_cluster, stop_cluster
from situations import SERVED, Prompt, random_prompt
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from diptych.kernels.testing import ARCHITECTURES

pytestmark = [pytest.mark.slow, pytest.mark.ray]

LAYOUTS = ("disaggregated", "colocated")
NUM_TOKENS = 10
LENGTHS = (1, 15, 16, 17, 40, 77, 150)


@dataclass(frozen=True, slots=True)
class Served:
    """A cluster with every family in every layout, and the reference of each family."""

    cluster: Cluster
    references: dict[str, Reference]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("families")
    models: dict[str, object] = {}
    references = {}
    for family in SERVED:
        folder = ARCHITECTURES[family].make(root / family)
        write_tokenizer(folder)
        references[family] = Reference(folder)
        for layout in LAYOUTS:
            models[f"{family}-{layout}"] = {
                "source": str(folder),
                "dtype": "float32",
                "layout": layout,
                "kv": {"memory_mib": 16},
                "decode": {"step_tokens": 17 if layout == "colocated" else 512, "max_running": 8},
            } | (
                {"prefill": {"step_tokens": 17, "kv": {"memory_mib": 16, "block_tokens": 5}}}
                if layout == "disaggregated"
                else {}
            )
    config = root / "diptych.yaml"
    config.write_text(yaml.safe_dump({"models": models}))
    cluster = start_cluster(root / "cluster", "--config", str(config))
    yield Served(cluster, references)
    code = stop_cluster(cluster)
    left = alive(cluster.tree)
    assert code == 0, cluster.printed()
    assert not left, f"processes left behind: {left}"


def write_tokenizer(folder: Path) -> None:
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def complete(cluster: Cluster, model: str, prompt: Prompt) -> list[int]:
    body = {"model": model, "prompt": list(prompt), "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    text = cluster.post("/v1/completions", body)["choices"][0]["text"]
    return [int(word.removeprefix("t")) for word in text.split()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", SERVED)
def test_tokens_are_those_of_the_reference_alone_in_company_and_with_prefix_hits(
    served: Served, family: str, layout: str
) -> None:
    reference, model = served.references[family], f"{family}-{layout}"
    prompts = [random_prompt(length) for length in LENGTHS]
    before = steps_by_role(served.cluster, model)
    for prompt in prompts[:3]:
        got = complete(served.cluster, model, prompt)
        assert len(got) == NUM_TOKENS
        reference.check(prompt, got)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(served.cluster, model, prompt), prompts))
    for prompt, got in zip(prompts, answers, strict=True):
        assert len(got) == NUM_TOKENS
        reference.check(prompt, got)
    roles = {"prefill", "decode"} if layout == "disaggregated" else {"decode"}
    deadline = time.monotonic() + NEWS_S
    while True:
        after = steps_by_role(served.cluster, model)
        assert after.keys() == roles
        if all(after[role] > before[role] for role in roles):
            break
        assert time.monotonic() < deadline, f"an engine of the layout did nothing: {before}, {after}"
        time.sleep(0.1)
    print(f"{model}: ties so far {reference.ties}")


NEWS_S = 10.0  # routers hear of an engine's counts a moment after its answers


def steps_by_role(cluster: Cluster, model: str) -> dict[str, int]:
    engines = [engine for engine in cluster.get("/info")["engines"] if engine["model"] == model]
    return {role: engine["steps"] for engine in engines for role in engine["roles"]}
