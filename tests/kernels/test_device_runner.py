"""The device runner's tokens are ModelRunner's and the oracle's, however steps are cut, padded and overlapped.

On a machine without a card its bookkeeping is what is tested, with the ops' references; graphs then only pad.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.graphs import StepShape, decode_shape, shapes_within
from diptych.kernels.device.plain import PlainDecoder
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.device.state import DeviceState
from diptych.kernels.device.testing import BLOCK, GREEDY, Storm, SumDecoder, make_runner, nothing_waits, oracle
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.runner import ModelRunner
from diptych.kernels.testing import ARCHITECTURES, make_tiny_checkpoint
from diptych.protos.errors import EngineFault, EngineLost
from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepResult, StepRow
from diptych.protos.types import TokenLogprobs

CPU = torch.device("cpu")
CARD = pytest.param("cuda", marks=pytest.mark.gpu)


def warm(runner: DeviceRunner) -> None:
    """With all graphs that it may have."""
    runner.rehearse()
    runner.capture()
    while runner.idle():
        pass


def run_storm(runner: DeviceRunner, seed: int, depth: int, requests: int = 24) -> Storm:
    storm = Storm(seed, depth=depth)
    while True:
        while requests and storm.has_slot and storm.rng.random() < 0.6:
            storm.add(storm.rng.randint(1, 90), storm.rng.randint(1, 30))
            requests -= 1
        if not storm.turn(runner.launch, runner.collect) and not requests:
            return storm


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_the_oracles_tokens(device: str, graphs: bool, depth: int, seed: int) -> None:
    runner, _ = make_runner(torch.device(device), graphs=graphs)
    warm(runner)
    assert bool(runner.graph_shapes) == graphs
    assert not runner.degraded
    storm = run_storm(runner, seed, depth)
    assert len(storm.finished) == 24
    for request in storm.finished:
        known = list(request.prompt)
        for token in request.tokens:
            assert token == oracle(known)
            known.append(token)


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_an_arena_that_comes_after_the_rehearsal_is_the_one_that_steps_compute_in(device: str) -> None:
    place = torch.device(device)
    runner, first = make_runner(place, blocks=0)
    runner.rehearse()
    keys, values = (torch.zeros(257, 1, BLOCK, 1, device=place) for _ in range(2))
    runner.use_arena([(keys, values)])
    runner.capture()
    rehearsed = first.clone()
    storm = run_storm(runner, 7, 2)
    assert all(request.tokens[0] == oracle(request.prompt) for request in storm.finished)
    assert torch.equal(first, rehearsed)


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_steps_touch_their_own_blocks_and_the_spare_one_only(device: str) -> None:
    """Padding rows compute and write, too: into the arena's last block."""
    runner, keys = make_runner(torch.device(device))
    warm(runner)
    keys[:-1].fill_(-5)
    rows = tuple(
        StepRow(slot=slot, num_tokens=1, tokens=(7,), start=0, blocks=[slot + 10], sample=GREEDY) for slot in range(5)
    )
    result = run(runner, *rows)
    assert result.tokens == (oracle([7]),) * 5
    assert keys[10:15, 0, 0, 0].tolist() == [8.0] * 5
    untouched = keys[:-1].clone()
    untouched[10:15, 0, 0] = -5
    assert bool((untouched == -5).all())


@pytest.mark.parametrize("device", ["cpu", CARD])
def test_the_first_graphs_are_there_at_once_and_the_rest_come_when_idle(device: str) -> None:
    runner, _ = make_runner(torch.device(device), slots=40)
    runner.rehearse()
    runner.capture()
    first = {decode_shape(rows) for rows in (1, 2, 4, 8, 16, 32, 40)} | {StepShape(0, 4, 64)}
    assert set(runner.graph_shapes) == first
    runner.launch(StepPlan(1, (row_of(0, (3, 4), 0),)))
    assert not runner.idle(), "a step is outstanding"
    runner.collect()
    while runner.idle():
        pass
    assert set(runner.graph_shapes) == first | {decode_shape(24), StepShape(8, 4, 64), StepShape(32, 4, 64)}
    storm = run_storm(runner, 5, 2)
    assert all(request.tokens[0] == oracle(request.prompt) for request in storm.finished)


@pytest.mark.parametrize("rows", [1, 3, 8, 48, 64, 512])
def test_graphs_hold_every_number_of_decoding_rows(rows: int) -> None:
    first, later = shapes_within(rows, 512)
    assert max(shape.singles for shape in first if not shape.prompts) == rows
    assert not set(first) & set(later)
    assert all(shape.singles <= rows for shape in (*first, *later))


def test_a_step_takes_the_smallest_shape_that_holds_it_padded() -> None:
    runner, _ = make_runner(CPU, slots=40, step_tokens=600, context=600)
    warm(runner)
    packer = runner._packer

    def shape_of(*lengths: int) -> StepShape | None:
        rows = [
            StepRow(slot=slot, num_tokens=num, tokens=(1,) * num, start=0, blocks=list(range(150)), sample=GREEDY)
            for slot, num in enumerate(lengths)
        ]
        layout = packer.lay_out(StepPlan(0, tuple(rows)))
        shape = runner._graphs.shape_for(layout)
        if shape is not None:
            padded = layout.padded(*shape, 40)
            nums, firsts, places = padded.rows[2::8], padded.rows[3::8], padded.rows[4::8]
            assert (len(nums), sum(nums)) == (shape.rows, shape.tokens)
            assert nums[: shape.singles] == [1] * shape.singles
            assert firsts == [sum(nums[:at]) for at in range(len(nums))]
            assert [place for place in places if place >= 0] == [one.place for one in padded.sampling]
            assert [padded.rows[8 * one.place] for one in padded.sampling] == [one.slot for one in padded.sampling]
        return shape

    assert shape_of(1, 1, 1) == decode_shape(4)
    assert shape_of(64) == StepShape(0, 4, 64)
    assert shape_of(65) == StepShape(0, 4, 128)
    assert shape_of(30, 1, 30) == StepShape(8, 4, 128)
    assert shape_of(*[1] * 9, 2, 2, 2) == StepShape(32, 4, 64)
    assert shape_of(2, 2, 2, 2) is None, "the last prompt row is the padding's"
    assert shape_of(513) is None


def run(runner: DeviceRunner | ModelRunner, *rows: StepRow) -> StepResult:
    runner.launch(StepPlan(0, rows))
    return runner.collect()


def row_of(
    slot: int,
    tokens: tuple[int, ...] | None,
    start: int,
    *,
    blocks: list[int] | None = None,
    sample: SampleSpec | None = GREEDY,
) -> StepRow:
    """Slot s has blocks 32 s ... if no others are given."""
    num = 1 if tokens is None else len(tokens)
    spec = None if sample is None else replace(sample, position=start + num)
    own = blocks if blocks is not None else list(range(32 * slot, 32 * slot + 32))
    return StepRow(slot=slot, num_tokens=num, tokens=tokens, start=start, blocks=own, sample=spec)


def test_a_decoding_row_tells_the_device_nothing_but_a_new_block() -> None:
    runner, _ = make_runner(CPU)
    counts: list[int] = []
    packer = runner._packer
    lay_out = packer.lay_out

    def spy(plan: StepPlan) -> object:
        layout = lay_out(plan)
        counts.append(layout.updates.count)
        return layout

    packer.lay_out = spy  # type: ignore[method-assign, assignment]
    blocks = [9, 4, 6]
    known = [1, 2, 3]
    known.append(run(runner, row_of(0, (1, 2, 3), 0, blocks=blocks)).tokens[0] or 0)
    for position in range(3, 3 * BLOCK):
        token = run(runner, row_of(0, None, position, blocks=blocks)).tokens[0]
        assert token == oracle(known)
        known.append(token or 0)
    first = 3 + 1 + 9  # ids, a block, what sampling needs
    assert counts == [first] + [int(position % BLOCK == 0) for position in range(3, 3 * BLOCK)]


def test_blocks_that_give_way_to_cached_ones_before_a_chunk_are_told_anew() -> None:
    """A table keeps its list when `extend_prefix` puts others' blocks in place of own ones not computed yet."""
    runner, _ = make_runner(CPU)
    ids = tuple(range(20, 36))
    run(runner, row_of(0, ids, 0, blocks=[50, 51, 52, 53]))
    blocks = [60, 61, 62, 63, 64]
    run(runner, row_of(1, ids[:5], 0, blocks=blocks, sample=None))
    run(runner, row_of(1, ids[5:8], 5, blocks=blocks, sample=None))
    blocks[2:4] = [52, 53]
    result = run(runner, row_of(1, (7,), 16, blocks=blocks))
    assert result.tokens == (oracle((*ids, 7)),)


def test_a_sequence_in_a_slot_of_another_one_gets_nothing_of_it() -> None:
    runner, _ = make_runner(CPU)
    run(runner, row_of(0, tuple(range(30)), 0, blocks=list(range(10))))
    ids = (5, 6, 7, 8, 9)
    run(runner, row_of(1, ids[:4], 0, blocks=[40], sample=None))
    assert run(runner, row_of(0, ids[4:], 4, blocks=[40, 41])).tokens == (oracle(ids),)


def test_a_failed_step_leaves_no_token_to_go_on_from_and_no_false_memory() -> None:
    decoder = SumDecoder()
    runner, _ = make_runner(CPU, decoder)
    blocks, other = list(range(8)), list(range(8, 16))
    known = [1, 2, run(runner, row_of(0, (1, 2), 0, blocks=blocks), row_of(1, (3,), 0, blocks=other)).tokens[0] or 0]
    decoder.fail = True
    sampling = replace(GREEDY, temperature=0.5, seed=3)
    with pytest.raises(EngineFault):
        runner.launch(StepPlan(1, (row_of(0, None, 2, blocks=blocks, sample=sampling),)))
    decoder.fail = False
    runner.launch(StepPlan(2, (row_of(0, None, 3, blocks=blocks), row_of(1, None, 1, blocks=other))))
    result = runner.collect()
    assert result.faults == {0}
    assert result.tokens == (None, oracle((3, oracle((3,)))))
    again = row_of(0, (1, 2, known[2]), 0, blocks=blocks)
    assert run(runner, again).tokens == (oracle(known),)


def test_rows_laid_out_before_a_wrong_one_do_not_count_as_told() -> None:
    """Else the next request of the slot with the same wishes would send none."""
    runner, _ = make_runner(CPU)
    sampling = replace(GREEDY, temperature=0.5, seed=5)
    penalties = LogitRules(num_prompt=0, repetition_penalty=2.0)
    wrong = row_of(1, (4,), 3, blocks=[8], sample=replace(GREEDY, rules=penalties))
    with pytest.raises(AssertionError):
        runner.launch(StepPlan(0, (row_of(0, (1, 2), 0, sample=sampling), wrong)))
    run(runner, row_of(0, (1, 2), 0, sample=sampling))
    assert int(runner._state.seed_S[0]) == 5


def test_a_device_that_fails_ends_the_engine_not_only_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SumDecoder()
    runner, _ = make_runner(CPU, decoder)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner.launch(StepPlan(0, (row_of(0, (1, 2), 0),)))
    monkeypatch.setattr(runner, "_wait", fail)
    with pytest.raises(EngineLost):
        runner.collect()
    decoder.fail = True
    monkeypatch.setattr(runner, "_finish", fail)
    with pytest.raises(EngineLost):
        runner.launch(StepPlan(1, (row_of(1, (1, 2), 0),)))


def test_a_fault_is_its_rows_alone_and_goes_on_with_it() -> None:
    runner, keys = make_runner(CPU)
    run(runner, row_of(0, (1, 2, 3), 0), row_of(1, (4, 5), 0))
    keys[0, 0, 1] = torch.nan
    result = run(runner, row_of(0, None, 3), row_of(1, None, 2))
    assert (result.faults, result.ruled_out) == ({0}, frozenset())
    keys[0, 0, 1] = 3.0
    result = run(runner, row_of(1, None, 3), row_of(0, None, 4))
    assert result.faults == {1}, "the token to go on from was never sampled"
    assert result.tokens[0] is not None


def test_long_histories_reach_the_device_beside_the_wire() -> None:
    runner, _ = make_runner(CPU, slots=1, context=1024, step_tokens=8)
    ids = tuple(at % 7 for at in range(900))
    blocks = list(range(255))
    for start in range(0, 896, 8):
        run(runner, row_of(0, ids[start : start + 8], start, blocks=blocks, sample=None))
    wanted = oracle(ids)
    rules = LogitRules(num_prompt=900, bad_words=((ids[-2], ids[-1], wanted),))
    result = run(runner, row_of(0, ids[896:], 896, blocks=blocks, sample=replace(GREEDY, rules=rules, history=ids)))
    assert result.tokens == (int(wanted == 0),), "the forbidden one was chosen"
    assert runner._state.tokens_SC[0, :900].tolist() == list(ids)


@pytest.mark.parametrize(
    "row",
    [
        StepRow(slot=8, num_tokens=1, tokens=(1,), start=0, blocks=[0], sample=GREEDY),
        StepRow(slot=0, num_tokens=2, tokens=None, start=0, blocks=[0], sample=GREEDY),
        StepRow(slot=0, num_tokens=2, tokens=(1,), start=0, blocks=[0], sample=GREEDY),
        StepRow(slot=0, num_tokens=1, tokens=(1,), start=128, blocks=list(range(99)), sample=GREEDY),
        StepRow(slot=0, num_tokens=1, tokens=(1,), start=BLOCK, blocks=[0], sample=GREEDY),
    ],
)
def test_a_plan_that_breaks_the_protocol_is_refused(row: StepRow) -> None:
    runner, _ = make_runner(CPU)
    with pytest.raises(AssertionError):
        runner.launch(StepPlan(0, (row,)))


@pytest.mark.parametrize("device", ["cpu", CARD])
@pytest.mark.parametrize(("slots", "context", "step_tokens"), [(8, 128, 64), (1, 40, 64), (40, 600, 600), (3, 5, 2)])
def test_what_a_step_costs_is_measured_for_engines_of_any_size(
    device: str, slots: int, context: int, step_tokens: int
) -> None:
    runner, _ = make_runner(torch.device(device), slots=slots, context=context, step_tokens=step_tokens)
    assert runner.cost is None
    runner.rehearse()
    runner.capture()
    runner.measure()
    cost = runner.cost
    assert cost is not None
    one = cost.seconds(decode_rows=1, prompt_tokens=0, kv_tokens=1, prompt_kv=0)
    assert one > 0
    assert one <= cost.seconds(decode_rows=slots, prompt_tokens=step_tokens, kv_tokens=500, prompt_kv=9)
    ids = tuple(range(min(context - 1, step_tokens)))
    assert run(runner, row_of(0, ids, 0, blocks=list(range(150)))).tokens == (oracle(ids),)


def test_a_third_step_is_not_taken() -> None:
    runner, _ = make_runner(CPU)
    for step in range(2):
        runner.launch(StepPlan(step, (row_of(step, (1, 2), 0),)))
    with pytest.raises(AssertionError):
        runner.launch(StepPlan(3, (row_of(3, (1, 2), 0),)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama")
    return load_model(folder, dtype="float32")


def make_both(model: LoadedModel, *, graphs: bool) -> tuple[DeviceRunner, ModelRunner]:
    shape = (257, model.kv_heads, BLOCK, model.head_dim)

    def kv() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.layers)]

    state = DeviceState(
        max_slots=8,
        max_context_tokens=640,
        block_tokens=BLOCK,
        spare_block=256,
        device=CPU,
        vocab_size=model.vocab_size,
    )
    mine = DeviceRunner(
        PlainDecoder(model),
        kv(),
        state=state,
        splits=None,
        max_step_tokens=64,
        vocab_size=model.vocab_size,
        options=DeviceOptions(graphs=graphs),
    )
    warm(mine)
    return mine, ModelRunner(model, kv(), block_tokens=BLOCK, max_slots=8, max_step_tokens=64)


def close(mine: TokenLogprobs, theirs: TokenLogprobs) -> bool:
    ids, values = zip(*mine.top, strict=True) if mine.top else ((), ())
    wanted_ids, wanted = zip(*theirs.top, strict=True) if theirs.top else ((), ())
    return (
        mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        and mine.rank == theirs.rank
        and ids == wanted_ids
        and values == pytest.approx(wanted, abs=1e-4)
    )


def check_same(mine: StepResult, theirs: StepResult) -> None:
    assert mine.tokens == theirs.tokens
    assert (mine.step_id, mine.faults, mine.ruled_out) == (theirs.step_id, theirs.faults, theirs.ruled_out)
    assert mine.logprobs.keys() == theirs.logprobs.keys()
    assert all(close(told, theirs.logprobs[row]) for row, told in mine.logprobs.items())
    assert mine.prompt_logprobs.keys() == theirs.prompt_logprobs.keys()
    for row, told in mine.prompt_logprobs.items():
        assert len(told) == len(theirs.prompt_logprobs[row])
        assert all(map(close, told, theirs.prompt_logprobs[row]))


SPECS: list[Callable[[int], SampleSpec]] = [
    lambda length: GREEDY,
    lambda length: SampleSpec(1.3, 1.0, 0, 2**63 + 11, 0),
    lambda length: SampleSpec(0.9, 0.8, 20, 5, 0, min_p=0.01, logprobs=2),
    lambda length: replace(GREEDY, logprobs=0, rules=LogitRules(num_prompt=length, repetition_penalty=1.7)),
    lambda length: replace(GREEDY, rules=LogitRules(num_prompt=length, allowed_token_ids=(4, 9, 77), min_tokens=3)),
]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_each_step_comes_back_as_from_model_runner(model: LoadedModel, depth: int, graphs: bool) -> None:
    """Samplers, rules with a history, logprobs of answers and prompts, in the same random steps."""
    mine, theirs = make_both(model, graphs=graphs)
    storm = Storm(depth, vocab=model.vocab_size, depth=depth)
    requests = 16

    def launch(plan: StepPlan) -> None:
        mine.launch(plan)
        theirs.launch(plan)

    def collect() -> StepResult:
        result = mine.collect()
        check_same(result, theirs.collect())
        return result

    while True:
        while requests and storm.has_slot and storm.rng.random() < 0.6:
            length = storm.rng.randint(1, 90)
            spec = SPECS[requests % len(SPECS)](length)
            storm.add(length, storm.rng.randint(1, 12), spec, storm.rng.choice([None, None, 0, 3]))
            requests -= 1
        if not storm.turn(launch, collect) and not requests:
            break
    assert len(storm.finished) == 16


def test_rules_that_leave_no_token_are_told_as_model_runner_does(model: LoadedModel) -> None:
    mine, theirs = make_both(model, graphs=False)
    ruled = replace(GREEDY, rules=LogitRules(num_prompt=2, allowed_token_ids=(4,), bad_words=((4,),)))
    plan = StepPlan(0, (row_of(0, (5, 6), 0, sample=ruled), row_of(1, (7, 8), 0)))
    mine.launch(plan)
    theirs.launch(plan)
    result = mine.collect()
    assert result.ruled_out == {0}
    check_same(result, theirs.collect())


@pytest.mark.gpu
def test_no_launch_waits_for_the_card() -> None:
    """Mixed steps, decode graphs and what is told anew; collect alone may wait."""
    runner, _ = make_runner(torch.device("cuda"))
    warm(runner)
    storm = Storm(3, depth=2)

    def launch(plan: StepPlan) -> None:
        with nothing_waits():
            runner.launch(plan)

    for _ in range(8):
        storm.add(storm.rng.randint(1, 90), 20)
    while storm.turn(launch, runner.collect):
        pass
    assert len(storm.finished) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe", "mistral", "gemma2"])
def test_a_model_on_the_card_gives_the_tokens_of_the_cpu(tmp_path: Path, family: str, graphs: bool) -> None:
    """In float32, greedy: hand-written decoders and the generic one, whole and in graphs."""
    folder = ARCHITECTURES[family].make(tmp_path / family)
    on_card = load_model(folder, dtype="float32", device="cuda:0")
    model = load_model(folder, dtype="float32")
    shape = (257, model.kv_heads, 16, model.head_dim)

    def kv(device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(model.layers)]

    limits = StepLimits(max_slots=8, max_step_tokens=64, max_context_tokens=640, block_tokens=16)
    mine = build_runner(on_card, kv("cuda:0"), limits, DeviceOptions(graphs=graphs))
    warm(mine)
    theirs = ModelRunner(model, kv("cpu"), block_tokens=16, max_slots=8, max_step_tokens=64)
    storm = Storm(1, vocab=model.vocab_size, depth=2)
    for _ in range(8):
        storm.add(storm.rng.randint(1, 90), 12)

    def launch(plan: StepPlan) -> None:
        mine.launch(plan)
        theirs.launch(plan)

    def collect() -> StepResult:
        result = mine.collect()
        check_same(result, theirs.collect())
        return result

    while storm.turn(launch, collect):
        pass
    assert len(storm.finished) == 8
