"""Greedy tokens of SmolLM2 (float32) through router, engines and hinge equal those of transformers' generate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import pytest
from pair import EnginePair, generate
from reference import TextReference
from rest import at_rest

from diptych.cluster.models import ModelFolder
from diptych.protos.types import SamplingParams

NUM_PROMPTS = 24
NUM_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
Transport = Literal["auto", "shm", "grpc"]
# Architectures, chunks and layouts are tests/conformance's; here are the transports, threads and sockets.
PAIRS: tuple[tuple[Transport, int, int], ...] = (("auto", 512, 16), ("shm", 16, 16), ("grpc", 17, 5))


@pytest.fixture(scope="module")
def reference(default_model: ModelFolder) -> TextReference:
    return TextReference(default_model.path)


@pytest.fixture
def pair(request: pytest.FixtureRequest, default_model: ModelFolder) -> Iterator[EnginePair]:
    transport, step_tokens, block_tokens = request.param
    pair = EnginePair(default_model, transport, step_tokens, block_tokens)
    pair.start()
    yield pair
    pair.stop()


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids=lambda p: "-".join(map(str, p)))
def test_every_prompt_alone_in_company_and_with_prefix_hits(pair: EnginePair, reference: TextReference) -> None:
    check_all(pair, reference, reference.prompts(NUM_PROMPTS, longest=120))
    print(f"{pair.transport} step {pair.step_tokens}: {len(reference.ties)} ties so far: {reference.ties}")


@pytest.mark.parametrize("pair", [("shm", 16, 16)], indirect=True)
def test_a_few_prompts_alone_in_company_and_with_prefix_hits(pair: EnginePair, reference: TextReference) -> None:
    check_all(pair, reference, reference.prompts(9, longest=60))


def check_all(pair: EnginePair, reference: TextReference, prompts: list[list[int]]) -> None:
    name = {"auto": "local"}.get(pair.transport, pair.transport)
    multiple_blocks = [p for p in prompts if len(p) > pair.block_tokens]
    assert multiple_blocks

    async def run() -> None:
        async with pair.router() as router:
            crossed = 0
            for prompt in prompts:
                got, how = await generate(router, prompt, GREEDY)
                assert len(got) == NUM_TOKENS
                await asyncio.to_thread(reference.check, prompt, got)  # engines hear of their router meanwhile
                assert how.prefill_engine != how.decode_engine
                assert how.transport == name
                crossed += how.transfer_bytes
            assert crossed > 0

            answers = await asyncio.gather(*(generate(router, prompt, GREEDY) for prompt in prompts))
            hits = 0
            for prompt, (got, how) in zip(prompts, answers, strict=True):
                assert len(got) == NUM_TOKENS
                await asyncio.to_thread(reference.check, prompt, got)  # engines hear of their router meanwhile
                hits += how.cached_tokens
            assert hits >= sum(len(p) // 2 for p in multiple_blocks) // 2

        for reading in await at_rest(pair.engines.values()):
            assert reading.blocks.free + reading.blocks.cached == reading.blocks.total

    asyncio.run(run())
