"""The fault plan: what is asked for happens, at its occasion, at its place, and never without being asked for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diptych.protos.errors import EngineFault, EngineLost, TransferError
from diptych.protos.faults import (
    POSSIBLE,
    Action,
    Fault,
    FaultPlan,
    FaultRule,
    FaultSettings,
    Point,
    injected,
    mutated,
    plan_of,
)


def rule(point: str = "hinge.out", action: str = "drop", **more: object) -> FaultRule:
    given = more if "probability" in more else {"nth": (1,), **more}
    return FaultRule.model_validate({"point": point, "action": action, **given})


def plan(*rules: FaultRule, me: str = "prefill-0", seed: int = 0, acts: list[Fault] | None = None) -> FaultPlan:
    acted = acts if acts is not None else []
    return FaultPlan(FaultSettings(rules=rules, seed=seed), me=me, act=acted.append)


def fires(plan: FaultPlan, times: int, point: Point = Point.HINGE_OUT, **about: str) -> list[int]:
    return [occasion for occasion in range(1, times + 1) if plan.at(point, **about) is not None]


def test_without_rules_there_is_no_plan() -> None:
    assert plan_of(FaultSettings(), "prefill-0") is None
    assert plan_of(FaultSettings(rules=(rule(),)), "prefill-0") is not None


def test_the_named_occasions_fail_and_no_others() -> None:
    assert fires(plan(rule(nth=(2, 5))), 10) == [2, 5]


def test_a_rule_counts_only_occasions_that_it_is_about() -> None:
    made = plan(rule(nth=(2,), peer="decode-*", message="ready"))
    assert made.at(Point.HINGE_OUT, "decode-0", "ready") is None
    assert made.at(Point.HINGE_OUT, "prefill-1", "ready") is None
    assert made.at(Point.HINGE_OUT, "decode-0", "abort") is None
    assert made.at(Point.HINGE_IN, "decode-0", "ready") is None
    assert made.at(Point.HINGE_OUT, "decode-1", "ready") == Fault(Action.DROP, draw=pytest.approx(0.5, abs=0.5))


def test_a_rule_for_another_process_does_nothing_here() -> None:
    assert fires(plan(rule(engine="decode-*")), 3) == []
    assert fires(plan(rule(engine="decode-*"), me="decode-3"), 3) == [1]


def test_a_limit_bounds_a_probability() -> None:
    assert len(fires(plan(rule(probability=1.0, limit=3)), 50)) == 3


def test_equal_seeds_give_equal_runs_and_other_rules_do_not_move_them() -> None:
    one, other = rule(probability=0.3), rule("hinge.in", probability=0.5)
    alone = fires(plan(one, seed=7), 200)
    both = plan(one, other, seed=7)
    beside = [n for n in range(1, 201) if (both.at(Point.HINGE_IN), both.at(Point.HINGE_OUT))[1] is not None]
    assert alone == beside
    assert alone != fires(plan(one, seed=8), 200)
    assert 30 < len(alone) < 90


def test_the_first_rule_wins_and_all_count() -> None:
    made = plan(rule(action="delay", nth=(1,)), rule(action="drop", nth=(1, 2)))
    actions = [fault.action if (fault := made.at(Point.HINGE_OUT)) else None for _ in range(3)]
    assert actions == [Action.DELAY, Action.DROP, None]
    assert made.counts == {"hinge.out/delay": 1, "hinge.out/drop": 1}
    assert made.counters() == {"fault_hinge_out_total": 2.0}


@pytest.mark.parametrize("action", ["stop", "kill"])
def test_stop_and_kill_happen_here_and_are_not_told(action: str) -> None:
    acts: list[Fault] = []
    for_s = 2.0 if action == "stop" else 0.0
    made = plan(rule("engine.step", action, for_s=for_s), acts=acts)
    assert made.at(Point.ENGINE_STEP) is None
    assert [(fault.action, fault.for_s) for fault in acts] == [(action, for_s)]
    assert made.counters() == {"fault_engine_step_total": 1.0}


def test_a_plan_can_be_asked_from_many_threads() -> None:
    made = plan(rule(nth=tuple(range(2, 4001, 2))))
    fired = Counter[int]()

    def ask(me: int) -> None:
        fired[me] = len(fires(made, 1000))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fired.total() == 2000
    assert made.counts["hinge.out/drop"] == 2000


@pytest.mark.parametrize("point", Point)
def test_every_point_refuses_what_cannot_happen_there(point: Point) -> None:
    for action in Action:
        if action in POSSIBLE[point]:
            rule(point, action)
        else:
            with pytest.raises(ValidationError, match="cannot happen"):
                rule(point, action)


def test_a_rule_that_never_fires_is_refused() -> None:
    with pytest.raises(ValidationError, match="nth or a probability"):
        rule(nth=())
    with pytest.raises(ValidationError, match="nth or a probability"):
        rule(nth=(1,), probability=0.5)


@pytest.mark.parametrize(
    ("point", "more", "why"),
    [
        ("engine.step", {"peer": "decode-0"}, "knows no peer"),
        ("hinge.gather", {"peer": "decode-*"}, "knows no peer"),
        ("session.status", {"message": "status"}, "knows no kinds"),
        ("hinge.publish", {"message": "chunk"}, "knows no kinds"),
        ("session.submit", {"engine": "decode-0"}, "process named router"),
        ("manager.report", {"engine": "prefill-*"}, "process named manager"),
        ("engine.start", {"engine": "router"}, "is in engines"),
        ("engine.step", {"for_s": 1.0}, "of stop alone"),
        ("engine.step", {"nth": (), "probability": math.nan}, "finite"),
        ("engine.step", {"action": "stop", "for_s": math.inf}, "finite"),
    ],
)
def test_a_rule_that_no_occasion_can_meet_is_refused(point: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        rule(point, **{"action": "raise"} | more)


def test_a_raise_looks_like_a_failure_of_its_place() -> None:
    assert isinstance(injected(Point.HINGE_FETCH), TransferError)
    assert isinstance(injected(Point.ENGINE_STEP), EngineFault)
    assert isinstance(injected(Point.SESSION_OPEN), EngineLost)


def test_a_file_replaces_the_rules_whenever_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "faults.json"
    made = FaultPlan(FaultSettings(rules=(rule(),), file=file), me="decode-0")
    written = 0

    def write(text: str) -> None:
        nonlocal written
        written += 1
        file.write_text(text)
        os.utime(file, ns=(written, written))  # two writes within one tick of the file system's clock differ, too
        made.reload()

    try:
        assert fires(made, 2) == [1], "without a file the configured rules hold"
        write(json.dumps({"rules": [{"point": "hinge.in", "action": "drop", "nth": [1]}]}))
        assert fires(made, 2) == []
        assert fires(made, 2, Point.HINGE_IN) == [1]
        write("{")
        write(json.dumps({"rules": [], "file": str(file)}))
        write('{"rules": [{"point": "nowhere"}]}')
        assert "is not taken" in caplog.text
        assert "names no other file" in caplog.text
        assert fires(made, 2, Point.HINGE_IN) == [], "the counts go on, and the rules stay"
        write('{"rules": [{"point": "hinge.in", "action": "drop", "nth": [1]}]}')
        assert fires(made, 2, Point.HINGE_IN) == [1], "a new file counts from one"
        write('{"rules": []}')
        assert fires(made, 2, Point.HINGE_IN) == []
        assert made.counts == {"hinge.out/drop": 1, "hinge.in/drop": 2}
    finally:
        made.close()


def test_whoever_replaces_a_dead_process_does_not_die_of_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    step = {"point": "engine.step", "nth": [1]}
    file.write_text(json.dumps({"rules": [step | {"action": "kill"}, step | {"action": "delay"}]}))
    acts: list[Fault] = []
    made = FaultPlan(FaultSettings(file=file), me="decode-0", act=acts.append)
    try:
        fault = made.at(Point.ENGINE_STEP)
        assert fault is not None
        assert fault.action is Action.DELAY
        os.utime(file, ns=(1, 1))
        made.reload()
        made.at(Point.ENGINE_STEP)
        assert [fault.action for fault in acts] == [Action.KILL], "written anew it is meant for who lives"
    finally:
        made.close()


@given(st.binary(min_size=1), st.floats(0, 1, exclude_max=True), st.sampled_from([Action.CORRUPT, Action.TRUNCATE]))
def test_altered_bytes_always_differ(data: bytes, draw: float, action: Action) -> None:
    fault = Fault(action, draw=draw)
    altered = mutated(data, fault)
    assert altered != data
    assert data.startswith(altered) if action is Action.TRUNCATE else len(altered) == len(data)
    buffer = bytearray(data)
    mutated(memoryview(buffer), fault)
    assert buffer != data
    assert len(buffer) == len(data)


def test_nothing_can_be_altered_where_nothing_is() -> None:
    assert mutated(b"", Fault(Action.CORRUPT)) == b""
    mutated(bytearray(), Fault(Action.TRUNCATE))


def test_a_stopped_process_goes_on_and_a_killed_one_does_not() -> None:
    code = (
        "from diptych.protos.faults import *\n"
        "rules = [FaultRule(point='engine.step', action='stop', nth=(1,), for_s=0.2),"
        " FaultRule(point='engine.start', action='kill', nth=(1,))]\n"
        "plan = plan_of(FaultSettings(rules=tuple(rules)), 'decode-0')\n"
        "plan.at(Point.ENGINE_STEP)\n"
        "print('went on', flush=True)\n"
        "plan.at(Point.ENGINE_START)\n"
        "print('survived')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "went on\n"
    assert done.returncode == -9
