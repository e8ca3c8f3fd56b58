"""Greedy tokens of SmolLM2 (float32) through router, engines and hinge equal those of transformers' generate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import pytest
from pair import EnginePair, generate
from reference import Reference

from diptych.cluster.config import default_cache_dir
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.types import Role, SamplingParams

NUM_PROMPTS = 50
NUM_TOKENS = 16
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
Transport = Literal["auto", "shm", "grpc"]


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return resolve("smollm2-135m-instruct", default_cache_dir())


@pytest.fixture(scope="module")
def reference(folder: ModelFolder) -> Reference:
    return Reference(folder.path)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[tuple[list[int], list[int]]]:
    """(prompt, greedy tokens) of the reference."""
    return [(p, reference.generate(p, NUM_TOKENS)) for p in reference.prompts(NUM_PROMPTS, longest=200)]


@pytest.fixture
def pair(request: pytest.FixtureRequest, folder: ModelFolder) -> Iterator[EnginePair]:
    transport, step_tokens, block_tokens = request.param
    pair = EnginePair(folder, transport, step_tokens, block_tokens)
    pair.start()
    yield pair
    pair.stop()


MATRIX = [(transport, step, 16) for transport in ("auto", "shm", "grpc") for step in (16, 512)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [*MATRIX, ("shm", 17, 5)], indirect=True, ids=lambda p: "-".join(map(str, p)))
def test_every_prompt_alone_in_company_and_with_prefix_hits(
    pair: EnginePair, reference: Reference, expected: list[tuple[list[int], list[int]]]
) -> None:
    check_all(pair, reference, expected)
    print(f"{pair.transport} step {pair.step_tokens}: {len(reference.ties)} ties so far: {reference.ties}")


@pytest.mark.parametrize("pair", [("shm", 16, 16)], indirect=True)
def test_a_few_prompts_alone_in_company_and_with_prefix_hits(pair: EnginePair, reference: Reference) -> None:
    few = [(p, reference.generate(p, NUM_TOKENS)) for p in reference.prompts(9, longest=60)]
    check_all(pair, reference, few)


def check_all(pair: EnginePair, reference: Reference, expected: list[tuple[list[int], list[int]]]) -> None:
    name = {"auto": "local"}.get(pair.transport, pair.transport)
    multiple_blocks = [p for p, _ in expected if len(p) > pair.block_tokens]
    assert multiple_blocks

    async def run() -> None:
        async with pair.router() as router:
            crossed = 0
            for prompt, tokens in expected:
                got, how = await generate(router, prompt, GREEDY)
                reference.check(prompt, tokens, got)
                assert how.prefill_engine != how.decode_engine
                assert how.transport == name
                crossed += how.transfer_bytes
            assert crossed > 0

            answers = await asyncio.gather(*(generate(router, prompt, GREEDY) for prompt, _ in expected))
            hits = 0
            for (prompt, tokens), (got, how) in zip(expected, answers, strict=True):
                reference.check(prompt, tokens, got)
                hits += how.cached_tokens
            assert hits >= sum(len(p) // 2 for p in multiple_blocks) // 2

    asyncio.run(run())
    for role in Role:
        blocks = pair.engines[role].status().blocks
        assert blocks.used == 0
        assert blocks.free + blocks.cached == blocks.total
