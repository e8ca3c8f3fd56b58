"""One cell of the matrix: a model in a situation, its tokens against the reference, and proof that it was in it."""

from __future__ import annotations

from dataclasses import dataclass

from reference import Reference
from situations import NEW_TOKENS, PREEMPTED_TOKENS, SHARED_TOKENS, Prompt, Situation, prompts_of
from stage import FINAL, PROBES, SENSITIVE, Stage, cached_tokens

from diptych.kernels.model import LoadedModel
from diptych.protos.types import TransferKey

MIN_PREEMPTIONS = 2
IN_COMPANY = {"company", "twice", "shared", "preempted"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cell of the table tells."""

    requests: int
    tokens: int
    ties: int


def run(model: LoadedModel, reference: Reference, situation: Situation, *, depth: int = 1) -> Outcome:
    """Raises AssertionError on a wrong token, on a leak, and when the situation did not arise."""
    stage = Stage(model, situation, depth=depth)
    prompts = prompts_of(situation, stage.max_context_tokens)
    ties = len(reference.ties)
    match situation.way:
        case "alone" | "layers" | "limit":
            for prompt in prompts:
                stage.submit(prompt, NEW_TOKENS)
                stage.settle()
        case "company":
            arrive(stage, prompts)
        case "twice":
            arrive(stage, prompts)
            # What ends with token 0 never comes to the decode engine: the longest prompt leaves no room for more.
            keys = [key for key in arrive(stage, prompts) if len(stage.answer(key)) > 1]
            check_hits(stage, keys, [len(stage.requests[key].prompt) // 2 for key in keys])
        case "shared":
            arrive(stage, prompts[:1])
            check_hits(stage, arrive(stage, prompts[1:]), [SHARED_TOKENS - max(situation.blocks)] * len(prompts[1:]))
        case "preempted":
            arrive(stage, prompts, PREEMPTED_TOKENS)
            told = [stage.decode.ledger.finishes[key].preemptions for key in stage.requests]
            assert sum(told) == stage.decode_worker.counters()["decode_preemptions_total"]
            assert sum(told) >= MIN_PREEMPTIONS, f"{told} preemptions"
    tokens = check_answers(stage, reference)
    check_way(stage, situation, prompts)
    stage.close()
    return Outcome(len(stage.requests), tokens, len(reference.ties) - ties)


def arrive(stage: Stage, prompts: list[Prompt], max_tokens: int = NEW_TOKENS) -> list[TransferKey]:
    """Two at once, then one every other turn; until all have ended."""
    keys = []
    for at, prompt in enumerate(prompts):
        keys.append(stage.submit(prompt, max_tokens))
        if at % 2:
            stage.turn()
    stage.settle()
    return keys


def check_answers(stage: Stage, reference: Reference) -> int:
    """Every request ended well, with the reference's tokens; the number of tokens."""
    total = 0
    for key, request in stage.requests.items():
        got = stage.answer(key)
        room = stage.max_context_tokens - len(request.prompt)
        assert stage.finish(key).reason in FINAL, stage.finish(key)
        assert len(got) == min(request.sampling.max_tokens, room)
        reference.check(request.prompt, got)
        total += len(got)
    return total


def check_hits(stage: Stage, keys: list[TransferKey], at_least: list[int]) -> None:
    """Every engine found the beginning of each prompt that is longer than its block in its prefix cache."""
    for engine, found in zip(stage.engines, cached_tokens(stage, keys), strict=True):
        size = engine.block_tokens
        for key, cached, wanted in zip(keys, found, at_least, strict=True):
            if len(stage.requests[key].prompt) > size:
                assert cached >= wanted // size * size, (key, cached, wanted)
                assert cached % size == 0
        assert sum(found) > 0


def check_way(stage: Stage, situation: Situation, prompts: list[Prompt]) -> None:
    """The path under test was taken."""
    first = stage.engines[0].runner
    assert first.most_tokens <= situation.chunk
    # Shared prompts are cached in part; who was preempted computes prompt and answer in one go.
    if situation.way not in {"shared", "preempted"}:
        assert first.longest_row == min(situation.chunk, max(map(len, prompts)))
    for engine in stage.engines:
        # A prefill engine that computes prompts whole reads no KV of an earlier step.
        assert engine.runner.read_tokens > 0 or (engine is stage.prefill and situation.chunk == 512)
        if situation.way == "layers":
            assert len(engine.runner.changes) == PROBES * 2 * engine.model.layers
            assert min(engine.runner.changes) > SENSITIVE, engine.runner.changes
        elif situation.way in IN_COMPANY and situation.chunk > 1:
            assert engine.runner.most_rows > 1, "nobody was in company"
    if stage.hinge is not None:
        assert stage.hinge.compared_tokens > 0
