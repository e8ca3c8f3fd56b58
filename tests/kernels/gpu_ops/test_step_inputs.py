"""Making a step's inputs and publishing its tokens, against the definition and against a plan read by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diptych.kernels.device.buffers import StepBuffers
from diptych.kernels.device.graphs import decode_shape
from diptych.kernels.device.state import DeviceState
from diptych.kernels.device.step import KV_NOT_FINITE, LOGITS_NOT_FINITE, RULED_OUT, TOKEN_MISSING, StepTensors
from diptych.kernels.device.wire import Layout, Packer, Wire, wire_words
from diptych.kernels.ops.step_inputs import cuda, launch, reference
from diptych.protos.step import SampleSpec, StepPlan, StepRow

PAGE = 4
SLOTS = 200
CONTEXT = 1300
MAX_TOKENS = 4096
SPEC = SampleSpec(0.7, 0.9, 5, 2**63 + 5, 0, min_p=0.25)
NAMES = ("ids_T", "positions_T", "slot_mapping_T", "row_T", "query_start_R", "seq_len_R", "slot_R", "flags_R")


def make_state(place: torch.device) -> DeviceState:
    return DeviceState(max_slots=SLOTS, max_context_tokens=CONTEXT, block_tokens=PAGE, spare_block=70_000, device=place)


def make_plan(lengths: list[int], seed: int) -> StepPlan:
    rng = random.Random(seed)
    slots = rng.sample(range(SLOTS), len(lengths))
    rows = []
    for slot, length in zip(slots, lengths, strict=True):
        start = rng.randint(0, CONTEXT - length)
        blocks = [rng.randrange(70_000) for _ in range(-(-CONTEXT // PAGE))]
        from_slot = length == 1 and rng.random() < 0.5
        tokens = None if from_slot else tuple(rng.randrange(200_000) for _ in range(length))
        spec = replace(SPEC, position=start + length, seed=rng.randrange(2**64)) if rng.random() < 0.7 else None
        rows.append(StepRow(slot=slot, num_tokens=length, tokens=tokens, start=start, blocks=blocks, sample=spec))
    return StepPlan(1, tuple(rows))


class Made:
    """A plan's wire, applied to a fresh state and built into a step by one implementation."""

    def __init__(self, plan: StepPlan, place: torch.device, how: object, padded: int | None = None) -> None:
        self.state = make_state(place)
        self.state.tokens_SC.copy_(torch.arange(self.state.tokens_SC.numel()).view_as(self.state.tokens_SC) % 7 - 1)
        layout = Packer(self.state).lay_out(plan)
        self.layout: Layout = layout
        memory = torch.zeros(wire_words(max_rows=SLOTS, max_step_tokens=MAX_TOKENS), dtype=torch.int32)
        filled = layout.padded(padded, 0, padded, self.state.dummy) if padded else layout
        words, _, spilled = Wire(memory.numpy()).fill(filled)
        assert spilled is None
        self.wire: Tensor = memory[:words].to(place)
        buffers = StepBuffers(
            self.state, None, max_rows=SLOTS, max_tokens=MAX_TOKENS, vocab_size=1, dtype=torch.float32
        )
        self.step: StepTensors = buffers.shaped_step(decode_shape(padded)) if padded else buffers.mixed_step(layout)
        for name in NAMES:
            getattr(self.step, name).fill_(-9)
        how.apply_updates(self.wire, self.state, layout.updates.count)  # type: ignore[attr-defined]
        how.build_inputs(self.wire, self.state, self.step)  # type: ignore[attr-defined]


LENGTHS = {
    "one row": [1],
    "decoding": [1] * 129,
    "a prompt": [1300],
    "mixed": [1, 7, 1, 513, 2, 1, 1, 600, 1],
    "prompts": [512, 511, 2],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_the_kernels_make_what_the_definition_makes(name: str, place: torch.device) -> None:
    for seed in range(3):
        plan = make_plan(LENGTHS[name], seed)
        mine, wanted = Made(plan, place, cuda), Made(plan, place, reference)
        assert torch.equal(mine.state.words, wanted.state.words)
        for field in NAMES:
            assert torch.equal(getattr(mine.step, field), getattr(wanted.step, field)), field


def test_a_step_says_what_its_plan_says(place: torch.device) -> None:
    plan = make_plan(LENGTHS["mixed"], 1)
    made = Made(plan, place, cuda)
    state, step = made.state, made.step
    starts = step.query_start_R.tolist()
    for at, index in enumerate(made.layout.order):
        row = plan.rows[index]
        end = row.start + row.num_tokens
        here = slice(starts[at], starts[at + 1])
        assert step.slot_R[at] == row.slot
        assert step.seq_len_R[at] == end
        assert step.row_T[here].tolist() == [at] * row.num_tokens
        assert step.positions_T[here].tolist() == list(range(row.start, end))
        known = (row.slot * state.tokens_stride + row.start) % 7 - 1  # what the state held
        assert step.ids_T[here].tolist() == list(row.tokens or (max(known, 0),))
        assert step.flags_R[at] == (TOKEN_MISSING if row.tokens is None and known < 0 else 0)
        assert step.slot_mapping_T[here].tolist() == [
            row.blocks[p // PAGE] * PAGE + p % PAGE for p in range(row.start, end)
        ]
        if row.sample is not None:
            assert state.seed_S[row.slot].item() % 2**64 == row.sample.seed
            floats = (state.temperature_S, state.top_p_S, state.min_p_S)
            assert [value[row.slot].item() for value in floats] == pytest.approx([0.7, 0.9, 0.25])
            assert (state.top_k_S[row.slot], state.kind_S[row.slot]) == (5, 2)
    assert made.layout.kept == [starts[at + 1] - 1 for at, i in enumerate(made.layout.order) if plan.rows[i].sample]


@pytest.mark.parametrize("padded", [129, 130, 200])
def test_padding_rows_are_the_dummys_first_token_in_the_spare_block(padded: int, place: torch.device) -> None:
    plan = make_plan(LENGTHS["decoding"], 4)
    mine, wanted = Made(plan, place, cuda, padded), Made(plan, place, reference, padded)
    for field in NAMES:
        assert torch.equal(getattr(mine.step, field), getattr(wanted.step, field)), field
    rest = slice(129, None)
    assert set(mine.step.slot_R[rest].tolist()) <= {SLOTS}
    assert set(mine.step.slot_mapping_T[rest].tolist()) <= {70_000 * PAGE}
    assert set(mine.step.seq_len_R[rest].tolist()) <= {1}


def test_publishing_takes_sound_tokens_into_the_state_and_tells_all_flags(place: torch.device) -> None:
    plan = make_plan(LENGTHS["decoding"], 2)
    told = []
    for how in (cuda, reference):
        made = Made(plan, place, how, 200)
        generator = torch.Generator().manual_seed(1)
        tokens_N = torch.randint(0, 200_000, (200,), generator=generator).to(place)
        flags_N = torch.zeros(200, dtype=torch.int32, device=place)
        flags_N[3], flags_N[50] = LOGITS_NOT_FINITE, RULED_OUT
        made.step.flags_R.zero_()
        made.step.flags_R[50], made.step.flags_R[128] = KV_NOT_FINITE, KV_NOT_FINITE
        out_R2 = torch.full((129, 2), -7, dtype=torch.int32, device=place)
        dummy = made.state.tokens_SC[SLOTS].clone()
        how.publish(made.wire, made.state, made.step.flags_R, tokens_N, flags_N, out_R2)
        assert torch.equal(made.state.tokens_SC[SLOTS], dummy), "padding rows publish nothing"
        told.append((out_R2, made.state.words))
        for row, (token, flags) in enumerate(out_R2.tolist()):
            source = plan.rows[row]
            samples = source.sample is not None
            wanted = (flags_N[row].item() if samples else 0) | made.step.flags_R[row].item()
            assert flags == wanted
            assert token == (tokens_N[row].item() if samples and not wanted else -1)
            assert made.state.tokens_SC[source.slot, source.start + 1] == token
    assert torch.equal(told[0][0], told[1][0])
    assert torch.equal(told[0][1], told[1][1])


def test_wrong_shapes_are_refused(place: torch.device) -> None:
    made = Made(make_plan([1, 1], 0), place, reference)
    step = replace(made.step, decode_rows=3)
    with pytest.raises(ValueError, match="rows"):
        launch.build_inputs(made.wire, made.state, step)
    with pytest.raises(ValueError, match="updates"):
        launch.apply_updates(made.wire, made.state, 10_000)
    flags, out = made.step.flags_R, torch.zeros(2, 2, dtype=torch.int32, device=place)
    with pytest.raises(ValueError, match="tokens of"):
        launch.publish(made.wire, made.state, flags, flags, flags, out)
