"""The runner of a device: launches steps whose inputs are made there, and reads their tokens one event later.

launch(N+1):  lay out, fill the wire | copy it, set the state, make inputs, compute, choose, publish, copy out, event
collect(N):   wait for N's event, which has passed long before N+1 has ended
Nothing in `launch` asks the device: a row whose token the host has not read takes it from its slot's state.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.protos.errors import DiptychError, EngineFault, EngineLost
from diptych.protos.ports import StepCost
from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepResult

from ..models import DeviceDecoder
from ..ops.logprobs.columns import Logprobs
from ..ops.logprobs.launch import logprobs
from ..ops.paged_attention.split import Splits, plan_splits
from ..ops.sampling.launch import choose_as_asked, choose_largest
from ..ops.sampling.space import Asking, SampleSpace
from ..ops.step_inputs.launch import apply_updates, build_inputs, publish
from .buffers import StepBuffers
from .cost import Timed, fit
from .graphs import PROMPT_ROWS, StepGraphs, StepShape, decode_shape, shapes_within
from .masks import MaskBuffers, accept_all
from .outcome import Outcome
from .state import DeviceState
from .step import StepTensors
from .wire import HEADER, NUM_UPDATES, UPDATES_AT, Layout, Packer, Sampling, Tail, Updates, Wire, wire_words

MAX_OUTSTANDING = 2
_SHORT_PROMPT = 128  # tokens: what it reads of itself hardly counts
_LONG_STEP = 2048  # tokens
_CHUNK = 1024  # tokens of a prompt, timed from position 0 on and behind others, up to position _BEHIND
_BEHIND = 8192
_COPIED_BYTES = 512 << 20  # more than any cache holds
_RUNS_BESIDE = 32  # decoding rows; with more a run saves less than the tokens of the larger graph cost
_TOLD_AT_ONCE = 64  # rows of logprobs: 33 MB of float32 at 128,256 tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """How steps run."""

    graphs: bool = True  # False: every step runs as it is, which is what graphs are compared with
    depth: int = 1  # of ports.Runner: 2 asks the caller to launch a step before it collects the one before


def max_step_rows(max_slots: int) -> int:
    """Rows of a step at most, padding included."""
    return max_slots + PROMPT_ROWS


class _Computing(NamedTuple):
    """A step that computes, and whose tokens are still to be chosen."""

    plan: StepPlan
    layout: Layout
    turn: int
    step: StepTensors
    logits_NV: Tensor
    tail: Tail
    tail_parts: tuple[Tensor, ...]  # on the device, but the last one


class DeviceRunner:
    """Implements ports.Runner over a decoder and an arena on one device. One thread uses it.

    `kv`: K and V of each layer, [blocks, kv_heads, block_tokens, head_dim]; the state's spare block is one of these
    that no sequence ever gets. On a CPU everything happens in `launch`.
    """

    def __init__(
        self,
        decoder: DeviceDecoder,
        kv: Sequence[tuple[Tensor, Tensor]],
        *,
        state: DeviceState,
        splits: Splits | None,
        max_step_tokens: int,
        vocab_size: int,
        options: DeviceOptions,
    ) -> None:
        device, max_rows = state.words.device, max_step_rows(state.max_slots)
        self.max_slots = state.max_slots
        self.max_step_tokens = max_step_tokens
        self.vocab_size = vocab_size
        self.depth = options.depth
        self.cost: StepCost | None = None  # of ports.Runner; there once it was measured
        self.degraded: list[str] = []  # what cannot be captured, for people; grows while graphs are made
        self._decoder = decoder
        self._kv = kv
        self._device = device
        self._on_card = device.type == "cuda"
        self._state = state
        self._packer = Packer(state)
        self._steps = StepBuffers(
            state,
            splits,
            max_rows=max_rows,
            max_tokens=max_step_tokens,
            vocab_size=vocab_size,
            dtype=kv[0][0].dtype,
        )
        self._space = SampleSpace(max_rows=max_rows, vocab=vocab_size, device=device)
        words = wire_words(max_rows=max_rows, max_step_tokens=max_step_tokens)
        self._wire = torch.zeros(words, dtype=torch.int32, device=device)
        self._sent = [self._host(words) for _ in range(MAX_OUTSTANDING)]
        self._wires = [Wire(sent.numpy()) for sent in self._sent]
        self._outs = [self._host(2 * max_rows).view(max_rows, 2) for _ in range(MAX_OUTSTANDING)]
        self._turn = 0
        self._outstanding: deque[Outcome | _Computing | DiptychError] = deque()
        self._masks = MaskBuffers(turns=MAX_OUTSTANDING, max_rows=max_rows, vocab=vocab_size, device=device)
        self._graphs = StepGraphs(self._compute, device=device)
        self._first: list[StepShape] = []  # graphs still to be captured
        self._later: list[StepShape] = []
        self._uses_graphs = options.graphs
        if options.graphs:
            longest = min(max_step_tokens, state.max_context_tokens)
            self._first, self._later = shapes_within(min(state.max_slots, max_step_tokens), longest)
        if self._on_card:
            torch.cuda.synchronize(device)  # all of this was made on another stream
            cuda: Any = torch.cuda  # whose constructors are not typed
            self._stream = cuda.Stream(device)
            self._events = [cuda.Event() for _ in range(MAX_OUTSTANDING)]

    def launch(self, plan: StepPlan) -> None:
        """See ports.Runner. A plan that breaks the Protocol's rules is an AssertionError here, not a failed step."""
        assert len(self._outstanding) < MAX_OUTSTANDING, "two steps are outstanding already"
        assert 0 < plan.num_tokens <= self.max_step_tokens, f"a step of {plan.num_tokens} tokens"
        try:
            layout = self._packer.lay_out(plan)
        except AssertionError:
            self._packer.forget(plan)  # rows before the wrong one count as told
            raise
        # A guide that is still to be told its last token is asked when that is known.
        must_wait = bool(layout.guided and self._outstanding)
        with self._at_work(), self._blaming(plan):
            step = self._start(plan, layout)
            self._outstanding.append(step if must_wait else self._choose(step))

    def collect(self) -> StepResult:
        """See ports.Runner and ModelRunner.collect: the same tokens, faults and logprobs.

        EngineLost: a kernel did what no process recovers from; every later step would end like this.
        """
        assert self._outstanding, "no step is outstanding"
        try:
            return self._read(self._outstanding.popleft())
        finally:  # guides know now what they will know, also where this step failed
            if self._outstanding and isinstance(following := self._outstanding[0], _Computing):
                self._outstanding[0] = self._choose_late(following)

    def max_runs(self, rows: int) -> int:
        """See ports.Runner: as many as the graphs of steps with prompts hold, where such a step is not much longer."""
        if not self._uses_graphs:
            return rows
        return PROMPT_ROWS - 1 if rows <= _RUNS_BESIDE else 0

    def use_arena(self, kv: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Compute in this arena from now on. Before any step that is not a rehearsal, and before graphs are there:
        an engine learns what its steps take on an arena of one block, and gives the rest to this one.
        """
        assert not self._outstanding
        assert not self._graphs.shapes
        self._kv = kv
        self._state.move_spare(kv[0][0].shape[0] - 1)
        if self._on_card:
            torch.cuda.synchronize(self._device)  # made on another stream

    def rehearse(self) -> None:
        """Run steps of all sizes, the largest first: kernels, workspaces and activations are there afterwards, so that
        no step compiles or is the first to take memory. Needs one block of KV.
        """
        state = self._state
        longest = min(self.max_step_tokens, state.max_context_tokens)
        with self._at_work():
            self._rehearse([longest] * max(1, min(self.max_step_tokens // longest, state.max_slots)))
            for size in reversed([1 << power for power in range(1, longest.bit_length())]):
                beside = [1] if size < self.max_step_tokens and state.max_slots > 1 else []
                self._rehearse([*beside, size])
            most = min(state.max_slots, self.max_step_tokens - 2)
            for rows in (1 << power for power in range(max(0, most).bit_length())):
                self._rehearse([1] * rows + [min(2, longest)])  # a library's product is another one for other rows
            self._rehearse([1])
            self._rehearse_choices()

    def capture(self) -> None:
        """Make the first graphs, the largest first. Once, before any step."""
        with self._at_work():
            while self._first:
                self._capture(self._first.pop())

    def measure(self) -> None:
        """Time steps of a few sizes, so that `cost` can tell what others take: half a second for 8 billion parameters.
        After `capture`, before any step that is not a rehearsal.
        """
        state = self._state
        longest = min(self.max_step_tokens, state.max_context_tokens)
        with self._at_work():
            sizes = {1 << power for power in range(0, self.max_step_tokens.bit_length(), 2)} | {self.max_step_tokens}
            steps = [self._time(self._alike(size)) for size in sorted(sizes)]
            parted = self._alike(longest, decoding=False)
            whole = self._time([sum(parted)])
            chunk = max(1, min(_CHUNK, longest // 4))
            behind = min(state.max_context_tokens, _BEHIND) - chunk
            near, far = self._time([chunk]), self._time([chunk], behind=behind)
            kv_token_s = self._read_s()
            self.cost = fit(steps, whole=whole, parted=self._time(parted), near=near, far=far, kv_token_s=kv_token_s)

    def idle(self) -> bool:
        """Make one more graph, if one is missing: tens of milliseconds. False: there was nothing to do."""
        if self._outstanding or not self._later:
            return False
        with self._at_work():
            self._capture(self._later.pop(0))
        return True

    @property
    def stream(self) -> Any:
        """The torch.cuda.Stream on which steps run, for whoever times them; None on a CPU."""
        return self._stream if self._on_card else None

    @property
    def graph_shapes(self) -> Collection[StepShape]:
        """Shapes of the steps that run as a graph."""
        return self._graphs.shapes

    @contextlib.contextmanager
    def _blaming(self, plan: StepPlan) -> Iterator[None]:
        """Whatever goes wrong is the plan's fault."""
        try:
            yield
        except Exception as exc:
            try:
                self._give_up(plan)
            except RuntimeError as lost:
                raise _lost(plan, lost) from lost
            raise _fault(plan, exc) from exc

    def _start(self, plan: StepPlan, layout: Layout) -> _Computing:
        turn = self._turn
        self._turn = (turn + 1) % MAX_OUTSTANDING
        shape = self._graphs.shape_for(layout)
        if shape is not None:
            layout = layout.padded(*shape, self._state.dummy)
        elif layout.is_decode:
            shape = decode_shape(layout.num_rows)
        words, tail, spilled = self._wires[turn].fill(layout)
        if spilled is not None:
            self._set_much(spilled)
        self._wire[:words].copy_(self._sent[turn][:words], non_blocking=True)
        if spilled is None:
            apply_updates(self._wire, self._state, layout.updates.count)
        steps = self._steps
        *tail_parts, kept_N = self._tail_of(words, tail)
        if shape is not None:
            logits_NV, step = steps.logits(shape.rows), steps.shaped_step(shape)
            if shape in self._graphs.shapes:
                self._graphs.replay(shape)
            else:
                self._compute(shape)
        else:
            logits_NV, step = steps.logits(len(layout.kept)), steps.mixed_step(layout)
            build_inputs(self._wire, self._state, step)
            step.kept_N.copy_(kept_N)
            self._forward(step, logits_NV)
            count = len(layout.sampling)
            self._choose_largest(logits_NV[:count])
        return _Computing(plan, layout, turn, step, logits_NV, tail, tuple(tail_parts))

    def _choose(self, computing: _Computing) -> Outcome:
        """The tokens of a step that has its largest logits. Guides know the tokens before."""
        plan, layout, turn, step, logits_NV, tail, (asked_A, masked_A, told_L, places_P, tokens_P) = computing
        steps = self._steps
        if asking := layout.asking:
            masks_MW = self._masks.put(turn, layout.guided)
            self._choose_as_asked(logits_NV, Asking(asking, self._wire, asked_A, masked_A, masks_MW))
        published = layout.num_rows + layout.gap
        out_R2 = steps.out_R2[:published]
        publish(self._wire, self._state, step.flags_R, steps.tokens_R, steps.token_flags_R, out_R2)
        told_R2 = self._outs[turn][:published]
        told_R2.copy_(out_R2, non_blocking=True)
        sampled = prompts = None
        if tail.told:
            most = max(one.spec.logprobs or 0 for one in layout.telling)
            sampled = _tell(logits_NV, told_L.long(), steps.tokens_R[told_L], most)
        if tail.prompts:
            most = max(prompt.top for prompt in layout.prompts)
            prompts = _tell(logits_NV, places_P.long(), tokens_P.long(), most)
        if self._on_card:
            self._events[turn].record()
        return Outcome(plan, layout, turn, told_R2, sampled, prompts)

    def _read(self, outcome: Outcome | _Computing | DiptychError) -> StepResult:
        """What came of a step, after its event. Guides are told."""
        if isinstance(outcome, DiptychError):
            raise outcome
        assert isinstance(outcome, Outcome), "its tokens were chosen when the step before was collected"
        try:
            self._wait(outcome.turn)
        except RuntimeError as exc:  # it shows where somebody waits for it
            raise _lost(outcome.plan, exc) from exc
        result, guided = outcome.result(), outcome.layout.guided
        return replace(result, forced=accept_all(guided, result.tokens)) if guided else result

    def _choose_late(self, computing: _Computing) -> Outcome | DiptychError:
        """The same, of a step that was launched ahead of what its guides had to know."""
        try:
            with self._at_work(), self._blaming(computing.plan):
                return self._choose(computing)
        except DiptychError as error:
            return error

    def _tail_of(self, words: int, tail: Tail) -> tuple[Tensor, ...]:
        """The wire's last lists, where they lie on the device."""
        sizes = [len(part) for part in tail]
        if not any(sizes):
            return (self._wire[:0],) * len(sizes)
        return torch.split(self._wire[words - sum(sizes) : words], sizes)

    def _compute(self, shape: StepShape) -> None:
        """A step from the wire to a greedy choice of every row: what a graph holds."""
        steps = self._steps
        step, logits_RV = steps.shaped_step(shape), steps.logits(shape.rows)
        build_inputs(self._wire, self._state, step)
        if shape.prompts:
            step.kept_N.copy_(step.query_start_R[1:])
            step.kept_N.sub_(1)
        self._forward(step, logits_RV)
        self._choose_largest(logits_RV)

    def _choose_largest(self, logits_NV: Tensor) -> None:
        steps, count = self._steps, len(logits_NV)
        choose_largest(logits_NV, self._space, steps.tokens_R[:count], steps.token_flags_R[:count])

    def _choose_as_asked(self, logits_NV: Tensor, asking: Asking) -> None:
        steps = self._steps
        choose_as_asked(logits_NV, asking, self._state, self._space, steps.tokens_R, steps.token_flags_R)

    def _forward(self, step: StepTensors, logits_NV: Tensor) -> None:
        plan_splits(step)
        self._decoder.forward(step, self._kv, logits_NV)

    def _set_much(self, updates: Updates) -> None:
        """Updates that the wire has no room for, by memory of their own."""
        count = updates.count
        sent = self._host(HEADER + 2 * count)
        memory = sent.numpy()
        memory[NUM_UPDATES], memory[UPDATES_AT] = count, HEADER
        updates.write(memory[HEADER : HEADER + count], memory[HEADER + count :])
        apply_updates(sent.to(self._device, non_blocking=True), self._state, count)

    def _give_up(self, plan: StepPlan) -> None:
        """Of a failed step: nobody knows what the device has of its slots, and none has a token to go on from."""
        self._packer.forget(plan)
        self._space.clear()
        for row in plan.rows:
            self._state.tokens_SC[row.slot, row.start + row.num_tokens].fill_(-1)
        self._finish()  # the wire that it may have been reading is written again

    def _rehearse(self, lengths: Sequence[int], behind: int = 0) -> None:
        """A step of rows of the dummy slot, all in the spare block; rows of one token first."""
        self._choose(self._start(StepPlan(0, ()), _dummies(lengths, self._state.dummy, behind)))
        self._finish()

    def _rehearse_choices(self) -> None:
        """All kernels of choosing run, over the last rehearsal's row, whose slot asks for nothing."""
        rules = LogitRules(num_prompt=0, repetition_penalty=2.0, presence_penalty=1.0)
        asking = Sampling(0, 0, 0, self._state.dummy, SampleSpec(1.0, 0.5, 1, 0, 1, min_p=0.5, rules=rules))
        logits_NV = self._steps.logits(1)
        none = self._steps.out_R2.new_zeros(1)
        self._choose_as_asked(logits_NV, Asking([asking], self._wire, none, none - 1, self._masks.put(0, [])))
        _tell(logits_NV, self._steps.tokens_R[:1] * 0, self._steps.tokens_R[:1], 1)
        self._finish()

    def _alike(self, tokens: int, *, decoding: bool = True) -> list[int]:
        """Rows of about so many tokens: of one token as far as there are slots, else prompts as short as may be."""
        if decoding and tokens <= self._state.max_slots:
            return [1] * tokens
        each = min(tokens, self._state.max_context_tokens, max(_SHORT_PROMPT, -(-tokens // self._state.max_slots)))
        return [each] * min(tokens // each, self._state.max_slots)

    def _time(self, lengths: Sequence[int], behind: int = 0) -> Timed:
        """Of the best of two rehearsals; a long step is timed once."""
        seconds = float("inf")
        for _ in range(2 if sum(lengths) <= _LONG_STEP else 1):
            began = time.perf_counter()
            self._rehearse(lengths, behind)
            seconds = min(seconds, time.perf_counter() - began)
        return Timed(sum(lengths), lengths[0], seconds, behind)

    def _read_s(self) -> float:
        """To read one position's keys and values of all layers, at the rate at which the arena can be copied."""
        keys = self._kv[0][0]
        half = min(keys.shape[0] // 2, max(1, _COPIED_BYTES // keys[:1].nbytes))
        position = sum(tensor[:1].nbytes for pair in self._kv for tensor in pair) / self._state.block_tokens
        if half == 0:
            return 0.0
        seconds = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            keys[:half].copy_(keys[half : 2 * half])
            self._finish()
            seconds = min(seconds, time.perf_counter() - began)
        return position * seconds / (2 * keys[:half].nbytes)

    def _capture(self, shape: StepShape) -> None:
        if self._on_card and not self._decoder.capturable:
            self._give_up_graphs("the model asks the device while it computes")
            return
        try:
            lengths = [1] if shape.singles else [2]
            dummies = _dummies(lengths, self._state.dummy).padded(*shape, self._state.dummy)
            words, _, _ = self._wires[0].fill(dummies)
            self._wire[:words].copy_(self._sent[0][:words], non_blocking=True)
            self._graphs.capture(shape)
            self._finish()
        except Exception as exc:  # Triton's are no RuntimeErrors
            self._give_up_graphs(f"{shape.rows} rows of {shape.tokens} tokens: {exc}")

    def _give_up_graphs(self, reason: str) -> None:
        self._first.clear()
        self._later.clear()
        self.degraded.append(f"steps run without CUDA graphs that are not there yet: {reason}")

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with torch.inference_mode():
            if self._on_card:
                with torch.cuda.stream(self._stream):
                    yield
            else:
                yield

    def _wait(self, turn: int) -> None:
        """Until the step that has this turn is over and copied out."""
        if self._on_card:
            self._events[turn].synchronize()

    def _finish(self) -> None:
        if self._on_card:
            self._stream.synchronize()

    def _host(self, words: int) -> Tensor:
        return torch.zeros(words, dtype=torch.int32, pin_memory=self._on_card)


def _fault(plan: StepPlan, exc: Exception) -> DiptychError:
    if isinstance(exc, DiptychError):
        return exc
    error = EngineFault("The model could not compute a step.", detail=f"step {plan.step_id}: {exc!r}")
    error.__cause__ = exc
    return error


def _lost(plan: StepPlan, exc: RuntimeError) -> EngineLost:
    error = EngineLost("The device failed.", detail=f"step {plan.step_id}: {exc!r}")
    error.__cause__ = exc
    return error


def _dummies(lengths: Sequence[int], dummy: int, behind: int = 0) -> Layout:
    """Rows of the dummy slot from position `behind` on."""
    ends = list(accumulate(lengths))
    words: list[int] = []
    for at, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        words += (dummy, behind, length, end - length, at, 0, 0, 0)  # samples, so that every kernel has run
    singles = sum(length == 1 for length in lengths)
    is_decode = singles == len(lengths)
    return Layout(
        order=range(len(lengths)),
        singles=singles,
        num_tokens=ends[-1],
        most_prompt=0 if is_decode else max(lengths),
        sampling=[],
        special=[],
        prompts=[],
        kept=[] if is_decode else [end - 1 for end in ends],
        rows=words,
        updates=Updates(),
    )


def _tell(logits_NV: Tensor, places: Tensor, tokens: Tensor, most: int) -> Logprobs:
    """Logprobs on their way to the host, into pinned memory where the device is not the host. In pieces: a prompt's
    rows in float32 are gigabytes.
    """
    pieces = zip(torch.split(places, _TOLD_AT_ONCE), torch.split(tokens, _TOLD_AT_ONCE), strict=True)
    found = [logprobs(logits_NV, rows, ids, most) for rows, ids in pieces]
    columns = zip(*((one.own_R, one.ranks_R, one.ids_RK, one.values_RK) for one in found), strict=True)
    return Logprobs(*(torch.cat(column).to("cpu", non_blocking=True) for column in columns))
