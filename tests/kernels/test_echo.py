"""The echo runner notices every bit: whatever is wrong with the KV that a row reads, the token is another one."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diptych.kernels.echo import hashing
from diptych.kernels.echo.runner import EchoRunner
from diptych.kernels.echo.testing import GREEDY, expected, expected_prompt_logprobs, expected_tokens
from diptych.protos.echo import BAD, END, NUM_WORDS, STOP, VOCAB_SIZE
from diptych.protos.lifecycle import logit_rules
from diptych.protos.step import SampleSpec, StepPlan, StepResult, StepRow
from diptych.protos.types import SamplingParams

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
PROMPT = (5, 31_999, 7, 7, 0, 12)


def kv(
    blocks: int = 12, size: int = 4, *, layers: int = 2, heads: int = 2, dims: int = 8, dtype: str = "float32"
) -> NDArray[np.uint8]:
    return np.zeros((layers, 2, blocks, heads, size, dims * ITEM_BYTES[dtype]), np.uint8)


class Site:
    """A runner, its memory, and a few ways to drive it."""

    def __init__(self, memory: NDArray[np.uint8] | None = None, **options: Any) -> None:
        self.memory = kv() if memory is None else memory
        self.runner = EchoRunner(self.memory, **({"max_slots": 8, "max_step_tokens": 256} | options))

    def step(self, *rows: StepRow) -> StepResult:
        self.runner.launch(StepPlan(1, rows))
        return self.runner.collect()

    def generate(
        self,
        prompt: tuple[int, ...],
        blocks: list[int],
        max_tokens: int,
        *,
        chunk: int = 256,
        sampling: SamplingParams = GREEDY,
        slot: int = 0,
    ) -> list[int]:
        """Chunks of the prompt, then one token at a time from the slot."""
        at, token = 0, None
        while at < len(prompt):
            part = prompt[at : at + chunk]
            last = at + len(part) == len(prompt)
            result = self.step(row(part, at, blocks, sampling if last else None, len(prompt), slot=slot))
            at, token = at + len(part), result.tokens[0]
        answer = [token]
        while len(answer) < max_tokens and token not in sampling.stop_token_ids:
            (token,) = self.step(row(None, at, blocks, sampling, len(prompt), slot=slot)).tokens
            answer.append(token)
            at += 1
        assert None not in answer
        return [token for token in answer if token is not None]


def row(
    tokens: tuple[int, ...] | None,
    start: int,
    blocks: list[int],
    sampling: SamplingParams | None = GREEDY,
    num_prompt: int = 0,
    *,
    slot: int = 0,
    **more: Any,
) -> StepRow:
    num = 1 if tokens is None else len(tokens)
    spec = None if sampling is None else spec_of(sampling, start + num, num_prompt)
    return StepRow(slot=slot, num_tokens=num, tokens=tokens, start=start, blocks=blocks, sample=spec, **more)


def spec_of(sampling: SamplingParams, position: int, num_prompt: int) -> SampleSpec:
    return SampleSpec(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        position=position,
        logprobs=sampling.logprobs,
        rules=logit_rules(sampling, num_prompt),
    )


# ---- what is answered ---------------------------------------------------------------------------


def test_the_arithmetic_of_arrays_is_that_of_integers() -> None:
    rng = random.Random(1)
    numbers = [0, 1, 2**64 - 1, *(rng.randrange(2**64) for _ in range(200))]
    array = np.array(numbers, np.uint64)
    assert hashing.mix_array(array).tolist() == [hashing.mix(number) for number in numbers]
    assert hashing.favourite_array(array).tolist() == [hashing.favourite(number) for number in numbers]
    tokens, places = array % np.uint64(VOCAB_SIZE), array % np.uint64(50_000)
    shares = [hashing.share(token, place) for token, place in zip(tokens.tolist(), places.tolist(), strict=True)]
    assert hashing.share_array(tokens, places).tolist() == shares


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape_block_size_and_chunking_gives_the_expected_tokens(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    shape = {"layers": data.draw(st.integers(1, 3)), "heads": data.draw(st.integers(1, 3))}
    memory = kv(
        80,
        size,
        dims=data.draw(st.sampled_from([4, 8, 12])),
        dtype=data.draw(st.sampled_from(sorted(ITEM_BYTES))),
        **shape,
    )
    memory[:] = data.draw(st.integers(0, 255))  # what earlier requests left there
    prompt = tuple(data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40)))
    blocks = random.Random(size).sample(range(80), 60)
    site = Site(memory)
    assert site.generate(prompt, blocks, 9, chunk=data.draw(st.integers(1, 41))) == expected_tokens(prompt, 9)


def test_tokens_do_not_depend_on_shape_dtype_or_company() -> None:
    prompts = [tuple((i * j) % 50 for i in range(1, 4 + j)) for j in range(5)]
    site = Site(kv(40, 4, dtype="bfloat16"))
    tables = [[7 * j + i for i in range(7)] for j in range(5)]
    rows = [row(prompt, 0, tables[j], slot=j) for j, prompt in enumerate(prompts)]
    answers = [[token] for token in site.step(*rows).tokens]
    for at in range(4):
        rows = [row(None, len(prompt) + at, tables[j], slot=j) for j, prompt in enumerate(prompts)]
        for answer, token in zip(answers, site.step(*rows).tokens, strict=True):
            answer.append(token)
    assert answers == [expected_tokens(prompt, 5) for prompt in prompts]


def test_answers_continue_wherever_they_were_cut() -> None:
    whole = expected_tokens(PROMPT, 12)
    for cut in range(13):
        assert expected_tokens(PROMPT, 12, generated=whole[:cut]) == whole[cut:]
        moved = Site().generate((*PROMPT, *whole[:cut]), list(range(5)), 12 - cut) if cut < 12 else []
        assert moved == whole[cut:]


def test_every_prompt_is_answered_in_its_own_way() -> None:
    rng = random.Random(3)
    prompts = {tuple(rng.randrange(NUM_WORDS) for _ in range(rng.randrange(1, 9))) for _ in range(3000)}
    answers = {tuple(expected_tokens(prompt, 3)) for prompt in prompts}
    assert len(answers) == len(prompts)
    assert expected_tokens((1, 2), 1) != expected_tokens((2, 1), 1)
    assert expected_tokens((1, 1), 1) != expected_tokens((1,), 1)


# ---- what is noticed ----------------------------------------------------------------------------


def filled(**shape: Any) -> tuple[Site, list[int]]:
    """A prompt's KV in blocks 3, 1 and 8, its last block not full; the next step computes position 10."""
    site = Site(kv(12, 4, **shape))
    blocks = [3, 1, 8]
    prompt = (*PROMPT, 9, 8, 11, 4)
    assert site.generate(prompt, blocks, 1) == expected_tokens(prompt, 1)
    return site, blocks


def next_token(site: Site, blocks: list[int], memory: NDArray[np.uint8]) -> int | None:
    """What a copy of the memory would answer next; the site stays as it is."""
    other = Site(memory.copy())
    return other.step(row((77,), 10, blocks)).tokens[0]


@pytest.mark.parametrize(
    "shape", [{}, {"dtype": "bfloat16"}, {"layers": 1, "heads": 1, "dims": 4, "dtype": "bfloat16"}]
)
def test_any_single_byte_that_is_read_changes_the_next_token(shape: dict[str, Any]) -> None:
    """All bytes, and all bits of each: the smallest shape too, where a slot is two words."""
    site, blocks = filled(**shape)
    right = next_token(site, blocks, site.memory)
    assert right == expected_tokens((*PROMPT, 9, 8, 11, 4, 77), 1)[0]
    layers, sides, _, heads, size, width = site.memory.shape
    noticed = 0
    for layer, side, head, at, byte in np.ndindex(layers, sides, heads, 10, width):
        place = layer, side, blocks[at // size], head, at % size, byte
        for bit in range(8) if byte % 8 in (0, 7) or len(shape) > 1 else [byte % 8]:
            site.memory[place] ^= 1 << bit
            assert next_token(site, blocks, site.memory) == BAD, (place, bit)
            site.memory[place] ^= 1 << bit
            noticed += 1
    assert noticed >= layers * sides * heads * 10 * width
    assert next_token(site, blocks, site.memory) == right


def test_bytes_that_nobody_reads_change_nothing() -> None:
    site, blocks = filled()
    right = next_token(site, blocks, site.memory)
    site.memory[:, :, [0, 2, 4, 5, 6, 7, 9]] = 255
    site.memory[:, :, 8, :, 3:] = 255  # position 11
    assert next_token(site, blocks, site.memory) == right


def test_swapped_blocks_layers_heads_and_sides_are_noticed() -> None:
    site, blocks = filled()
    assert next_token(site, [1, 3, 8], site.memory) == BAD
    for axis in (0, 1, 3):  # layers, K and V, heads
        assert next_token(site, blocks, np.flip(site.memory, axis)) == BAD
    moved = site.memory.copy()
    moved[:, :, 3, :, 1:] = site.memory[:, :, 3, :, :-1]
    assert next_token(site, blocks, moved) == BAD, "positions within a block"


def test_a_stale_block_of_another_request_is_noticed_wherever_it_lies() -> None:
    site, blocks = filled()
    stale = [5, 6, 7]
    site.generate((*PROMPT[:-1], 13, 9, 8, 11, 4), stale, 1)  # differs in one token, of block 1
    for at in range(3):
        wrong = [*blocks[:at], stale[at], *blocks[at + 1 :]]
        # The first blocks are equal: there it is the same KV in another place.
        assert (next_token(site, wrong, site.memory) == BAD) == (at > 0), at


def test_every_byte_of_a_slot_depends_on_every_token_of_the_prefix() -> None:
    """Over many prefixes that differ in one token each byte takes many values."""
    seen: list[NDArray[np.uint8]] = []
    for number in range(200):
        site = Site(kv(3, 4))
        site.generate((number, 7, 7, 7, 8), [2, 0], 1)
        seen.append(site.memory[:, :, 0, :, 0].copy())
    values = np.stack(seen).reshape(200, -1)
    assert min(len(set(column)) for column in values.T.tolist()) > 60
    assert len({row.tobytes() for row in values}) == 200


def test_the_whole_kv_of_another_prompt_gives_the_answer_of_that_prompt() -> None:
    """The one fault that cannot be told from the KV alone; it shows in the answer."""
    site, blocks = filled()
    other = tuple(range(40, 50))
    site.generate(other, [5, 6, 7], 1)
    assert next_token(site, [5, 6, 7], site.memory) == expected_tokens((*other, 77), 1)[0]
    assert next_token(site, [5, 6, 7], site.memory) != next_token(site, blocks, site.memory)


def test_equal_content_in_other_blocks_gives_the_same_token() -> None:
    site, blocks = filled()
    site.memory[:, :, [0, 10, 11]] = site.memory[:, :, blocks]
    assert next_token(site, [0, 10, 11], site.memory) == next_token(site, blocks, site.memory)


def test_a_wrong_length_or_start_is_noticed() -> None:
    site, blocks = filled()
    prompt = (*PROMPT, 9, 8, 11, 4)
    right = expected_tokens((*prompt, 77), 1)[0]
    for start in range(11):
        token = Site(site.memory.copy()).step(row((77,), start, blocks)).tokens[0]
        assert (token == right) == (start == 10), start
    assert Site(site.memory.copy()).step(row((77,), 11, blocks)).tokens == (BAD,), "position 10 was never computed"


def test_who_computed_on_wrong_kv_stays_wrong_when_the_kv_is_put_right() -> None:
    site, blocks = filled()
    kept = site.memory.copy()
    site.memory[0, 0, 3, 0, 0, 0] ^= 1
    site.step(row((77, 78), 10, blocks, None))  # a chunk that samples nothing
    site.memory[0, 0, 3, 0, 0, 0] ^= 1
    assert np.array_equal(site.memory[:, :, 3], kept[:, :, 3])
    assert site.step(row((79,), 12, [*blocks, 9])).tokens == (BAD,)


def test_two_rows_that_write_into_one_place_are_noticed() -> None:
    site = Site()
    first, second = site.step(row((1, 2, 3), 0, [4]), row((1, 2, 4), 0, [4], slot=1)).tokens
    assert BAD in (first, second)


def test_the_faulty_row_alone_is_wrong() -> None:
    site, blocks = filled()
    other = (3, 1, 4)
    site.memory[1, 1, 8, 1, 0, 5] ^= 16
    bad, good = site.step(row((77,), 10, blocks), row(other, 0, [0], slot=1)).tokens
    assert (bad, good) == (BAD, expected_tokens(other, 1)[0])


# ---- sampling -----------------------------------------------------------------------------------

SAMPLINGS = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.7, "seed": 6, "top_k": 3},
    {"temperature": 0.8, "seed": 7, "top_p": 0.6},
    {"temperature": 1.0, "seed": 8, "min_p": 0.3},
    {"allowed_token_ids": (4, 9, 30_000, VOCAB_SIZE + 4)},
    {"temperature": 1.0, "seed": 1, "allowed_token_ids": (4, 9, END), "min_tokens": 4, "stop_token_ids": {END}},
    {"logit_bias": ((17, 100.0), (18, 99.0))},
    {"logit_bias": ((17, 100.0),), "frequency_penalty": 2.0, "presence_penalty": 60.0},
    {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.4, "allowed_token_ids": tuple(range(6))},
    {"allowed_token_ids": (1, 2, 3), "bad_words": ((1,), (2, 3))},
]


@pytest.mark.parametrize("wish", SAMPLINGS, ids=str)
def test_sampling_follows_rules_seed_and_position_as_expected(wish: dict[str, Any]) -> None:
    fields = {"temperature": 0.0, "max_tokens": 14} | wish
    fields["stop_token_ids"] = frozenset(fields.get("stop_token_ids", ()))
    sampling = SamplingParams(**fields)
    wanted = expected_tokens(PROMPT, 14, sampling)
    assert Site().generate(PROMPT, list(range(6)), 14, sampling=sampling) == wanted
    assert expected_tokens(PROMPT, 14, sampling, generated=wanted[:3]) == wanted[3:]
    if "allowed_token_ids" in wish:
        assert set(wanted) <= set(wish["allowed_token_ids"])
    if "bad_words" in wish:
        assert 1 not in wanted
        assert (2, 3) not in set(itertools.pairwise(wanted))
    if "min_tokens" in wish:
        assert END not in wanted[:4]


def test_other_seeds_give_other_answers_and_the_same_seed_the_same() -> None:
    answers = [
        tuple(expected_tokens(PROMPT, 8, SamplingParams(max_tokens=8, temperature=1.0, seed=seed)))
        for seed in range(50)
    ]
    assert len(set(answers)) == 50
    one = SamplingParams(max_tokens=8, temperature=1.0, top_k=1, seed=3)
    assert expected_tokens(PROMPT, 8, one) == expected_tokens(PROMPT, 8), "the most likely token alone"


def test_draws_have_the_probabilities_that_are_told() -> None:
    told = expected(PROMPT, 1)[0].guess
    draws = [
        expected_tokens(PROMPT, 1, SamplingParams(max_tokens=1, temperature=1.0, seed=seed))[0] for seed in range(4000)
    ]
    for rank in range(4):
        assert abs(draws.count(told.token(rank)) / 4000 - 2.0 ** -(rank + 1)) < 0.03


def test_rules_that_leave_no_token_are_a_fault_of_that_row() -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=(5,), bad_words=((5,),))
    result = Site().step(row((1, 2), 0, [0], sampling, 2), row((3,), 0, [1], slot=1))
    assert result.faults == result.ruled_out == {0}
    assert result.tokens == (None, expected_tokens((3,), 1)[0])
    with pytest.raises(ValueError, match="no token"):
        expected_tokens((1, 2), 1, sampling)


def test_logprobs_are_those_of_the_model_and_of_the_prompt() -> None:
    sampling = SamplingParams(max_tokens=1, temperature=1.0, seed=9, logprobs=3)
    site = Site()
    (answer,) = expected(PROMPT, 1, sampling)
    site.step(row(PROMPT[:2], 0, [0, 1], None, prompt_logprobs=2, next_token=PROMPT[2]))
    early = Site().step(row(PROMPT[:2], 0, [0, 1], None, prompt_logprobs=2, next_token=PROMPT[2])).prompt_logprobs[0]
    late = site.step(row(PROMPT[2:], 2, [0, 1], sampling, len(PROMPT), prompt_logprobs=2))
    assert late.logprobs[0] == answer.logprobs(3)
    assert [*early, *late.prompt_logprobs[0]] == expected_prompt_logprobs(PROMPT, 2)
    assert sum(2.0 ** -answer.guess.told(t, 0).rank for t in range(200)) <= 1


def test_an_end_comes_where_the_prompt_asks_for_it_and_nowhere_else() -> None:
    prompt = (8, STOP, 5, 6, 7)  # five positions after `STOP t5`, of which two are the prompt's own
    stop = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=frozenset({END}))
    answer = expected_tokens(prompt, 20, stop)
    assert len(answer) == 4
    assert answer.index(END) == 3
    assert Site().generate(prompt, list(range(7)), 20, sampling=stop) == answer
    later = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=frozenset({END}), min_tokens=6)
    assert expected_tokens(prompt, 20, later).index(END) == 6
    assert END not in expected_tokens((8, 5, 6, 7), 2000)


# ---- the runner's contract ----------------------------------------------------------------------


def test_a_slot_without_a_token_is_a_fault() -> None:
    site, blocks = filled()
    assert site.step(row(None, 10, blocks, slot=5)).faults == {0}


def test_steps_take_the_time_that_they_are_told_to() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    site = Site(step_s=0.5, token_s=0.25, clock=lambda: now[0], sleep=sleep)
    site.runner.launch(StepPlan(1, (row((1, 2), 0, [0]),)))
    site.runner.launch(StepPlan(2, (row((1, 2), 0, [1]),)))
    now[0] += 0.75
    assert site.runner.collect().step_id == 1
    assert site.runner.collect().step_id == 2
    assert slept == [0.25, 1.0], "one after another, each from when the one before is done"


def test_a_third_outstanding_step_and_rows_beyond_their_blocks_are_refused() -> None:
    site = Site()
    with pytest.raises(AssertionError):
        site.step(row((1, 2, 3, 4, 5), 0, [0]))
    for step in range(2):
        site.runner.launch(StepPlan(step, (row((1,), 0, [0]),)))
    with pytest.raises(AssertionError):
        site.runner.launch(StepPlan(3, (row((1,), 0, [0]),)))


def test_memory_that_is_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="words of 8 bytes"):
        Site(kv(dims=6, dtype="bfloat16"))


def test_neither_runner_nor_oracle_loads_torch() -> None:
    code = (
        "import sys, diptych.kernels.echo.runner, diptych.kernels.echo.testing; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
