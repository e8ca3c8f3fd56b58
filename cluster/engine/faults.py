"""Where an engine does what its fault plan says: steps, frames to routers, news of transfers. Unused without a plan."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from diptych.protos import engine_pb2 as pb
from diptych.protos.faults import Action, Fault, FaultPlan, Point, injected
from diptych.protos.ports import Runner
from diptych.protos.step import StepPlan, StepResult

_ItemT = TypeVar("_ItemT")
_FRAMES = {"tokens": Point.SESSION_TOKENS, "status": Point.SESSION_STATUS}


def pass_point(plan: FaultPlan, point: Point, *, message: str = "") -> None:
    """What can go wrong at a moment of a thread that may sleep: it takes longer, or raises `injected(point)`."""
    fault = plan.at(point, message=message)
    if fault is not None and fault.action is Action.DELAY:
        time.sleep(fault.delay_s)
    elif fault is not None:
        raise injected(point)


class FaultyRunner:
    """A runner whose steps fail as planned. `message` of a step: the prompt tokens in it, with a space around each."""

    def __init__(self, runner: Runner, plan: FaultPlan) -> None:
        self._runner = runner
        self._plan = plan
        self.max_slots = runner.max_slots
        self.max_step_tokens = runner.max_step_tokens
        self.vocab_size = runner.vocab_size
        self.depth, self.cost = runner.depth, runner.cost

    def launch(self, plan: StepPlan) -> None:
        """See Runner.launch."""
        prompts = [str(token) for row in plan.rows for token in row.tokens or ()]
        pass_point(self._plan, Point.ENGINE_STEP, message=f" {' '.join(prompts)} ")
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        """See Runner.collect."""
        return self._runner.collect()

    def max_runs(self, rows: int) -> int:
        """See Runner.max_runs."""
        return self._runner.max_runs(rows)

    def idle(self) -> bool:
        """See Runner.idle."""
        return self._runner.idle()


class FaultyLine(Generic[_ItemT]):
    """Hands items on in order, but for those that a fault meets. Safe from any thread; `hand_on` must not block."""

    def __init__(self, hand_on: Callable[[_ItemT], None], later: Callable[[float, Callable[[], None]], object]) -> None:
        self._hand_on = hand_on
        self._later = later  # (seconds, action)
        self._lock = threading.RLock()
        self._delays = 0
        self._held: deque[_ItemT] = deque()  # behind a delayed one: what is late holds up what follows
        self._aside: list[_ItemT] = []  # to be handed on after the next one

    def put(self, item: _ItemT, fault: Fault | None = None) -> None:
        """Drop, delay, duplicate or reorder `item`; without a fault hand it on."""
        action = None if fault is None else fault.action
        with self._lock:
            if fault is not None and action is Action.DELAY:
                self._delays += 1
                self._held.append(item)
                self._later(fault.delay_s, self._release)
            elif fault is not None and action is Action.REORDER:
                self._aside.append(item)
                self._later(fault.delay_s, self._come_forward)
            elif action is not Action.DROP:
                self._pass([item] * (2 if action is Action.DUPLICATE else 1))
                self._come_forward()

    def _pass(self, items: list[_ItemT]) -> None:
        if self._delays:
            self._held.extend(items)
            return
        for item in items:
            self._hand_on(item)

    def _come_forward(self) -> None:
        with self._lock:
            items, self._aside = self._aside, []
            self._pass(items)

    def _release(self) -> None:
        with self._lock:
            self._delays -= 1
            if not self._delays:
                items = list(self._held)
                self._held.clear()
                self._pass(items)


class FaultyFrames:
    """A session's `send` in which frames of tokens and of status fail as planned."""

    def __init__(
        self,
        plan: FaultPlan,
        *,
        router: str,
        line: FaultyLine[pb.EngineFrame],
        fail: Callable[[], None],  # ends the session
    ) -> None:
        self._plan = plan
        self._router = router
        self._line = line
        self._fail = fail

    def __call__(self, frame: pb.EngineFrame) -> None:
        """Send `frame`, or not."""
        point = _FRAMES.get(frame.WhichOneof("frame") or "")
        fault = None if point is None else self._plan.at(point, self._router)
        if fault is not None and fault.action is Action.RAISE:
            self._fail()
        elif fault is not None and fault.action is Action.TRUNCATE:
            broken = pb.EngineFrame()
            broken.CopyFrom(frame)
            broken.tokens.index.append(0)  # columns of unequal length: no step says that
            self._line.put(broken)
        else:
            self._line.put(frame, fault)


def faulty_delivery(plan: FaultPlan, deliver: Callable[[_ItemT], None]) -> Callable[[_ItemT], None]:
    """`deliver` of a transfer driver, with news that come late as planned. `message`: the kind, such as committed."""
    line = FaultyLine(deliver, _after)

    def put(event: _ItemT) -> None:
        line.put(event, plan.at(Point.HINGE_DELIVER, message=type(event).__name__.lower()))

    return put


def _after(seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
