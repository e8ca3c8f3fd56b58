"""What decides the exit code, and that the page tells what was measured and what was missed."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import pytest
from cells import CELLS, PHASES
from chaos_report import page, remarks, terminal
from load import Answer, Ask
from oracle import Verdict
from rig import Process, Reading, Rig, merged
from soak import gaps
from tally import Matrix, Tally, p99, quantile
from watch import Watch

from diptych.protos.faults import FaultRule

EXPECTED = tuple(range(12))


def answer(tokens: tuple[int, ...] = EXPECTED, **fields: Any) -> Answer:
    is_whole = not fields.get("failure") and not fields.get("has_left")
    return Answer(Ask((1,), EXPECTED), 0.0, list(tokens), ended=1.0, is_whole=is_whole, **fields)


def matrix_of(*answers: Answer, **fields: Any) -> Matrix:
    line = Tally("step", **fields)
    line.add(answers)
    return Matrix([line])


def test_all_right_is_zero() -> None:
    assert matrix_of(answer(), answer(EXPECTED[:3], has_left=True)).exit_code() == 0


@pytest.mark.parametrize(
    "bad",
    [
        answer((*EXPECTED[:5], 99, *EXPECTED[6:])),
        answer((*EXPECTED[:5], *EXPECTED[4:])),
        answer(EXPECTED[:-1]),
        answer((0, 0), failure="engine_lost"),
        answer((0, 0), has_left=True),
    ],
)
def test_one_wrong_answer_among_thousands_is_one(bad: Answer) -> None:
    assert matrix_of(*[answer()] * 3000, bad).exit_code() == 1
    assert matrix_of(*[answer()] * 3000, bad, may_break=True).exit_code() == 1


def test_rounds_of_a_step_add_up_to_one_line() -> None:
    first, second = Tally("step", wanted_deaths=1, deaths=1, detection=[0.1]), Tally("step", wanted_deaths=1, deaths=0)
    first.add([answer()])
    second.add([answer((*EXPECTED[:5], 99, *EXPECTED[6:])), answer((0, 0), failure="engine_lost")])
    second.leaked, second.counters = ["decode-0: blocks_used 1"], {"faults": 2.0}
    first.absorb(second)
    assert (first.requests, first.whole, first.num_failed, first.deaths, first.counters) == (3, 2, 1, 1, {"faults": 2})
    assert first.is_broken
    assert first.missed() == ["1 engines ended instead of 2"]


def test_a_leak_is_one() -> None:
    assert matrix_of(answer(), leaked=["decode-0: blocks_used 1"]).exit_code() == 1


def test_failures_count_from_one_in_a_thousand_on() -> None:
    lost = answer(EXPECTED[:4], failure="engine_lost")
    assert matrix_of(*[answer()] * 999, lost).exit_code() == 0
    assert matrix_of(*[answer()] * 900, lost).exit_code() == 1
    assert matrix_of(*[answer()] * 9, lost, may_break=True).exit_code() == 0


def test_nothing_run_is_no_success() -> None:
    assert Matrix().exit_code() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"detection": [0.1, 1.6]},
        {"silence": [5.5]},
        {"undetected": 1},
        {"wanted_deaths": 1},
        {"problems": ["never came to kill"]},
        {"counters": {"kv_thread_faults_total": 1}},
    ],
)
def test_a_missed_promise_is_two_and_is_told(fields: dict[str, Any]) -> None:
    matrix = matrix_of(answer(), **fields)
    assert matrix.exit_code() == 2
    assert any(remark.startswith("MISSED") for remark in remarks(matrix.lines[0]))
    assert "MISSED" in terminal(matrix.lines[0])


def test_the_page_tells_numbers_misses_and_what_is_not_covered() -> None:
    matrix = matrix_of(answer(), answer((0, 0), failure="engine_lost"), detection=[0.25], deaths=1, what="a fault")
    text = page(matrix, title="Chaos", seed=3, run="Run.", took_s=60)
    assert "2 requests: 0 wrong tokens, 1 doubled" in text
    assert "| step |" in text
    assert "| 0.25 |" in text
    assert "WRONG" in text
    assert "engine_lost 1" in text
    assert "## Not covered" in text
    assert text.isascii()


def test_quantiles_are_of_what_was_measured() -> None:
    assert p99([]) is None
    assert p99([3.0]) == 3.0
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([2, 1], 0.5) == 1


def test_every_rule_of_the_matrix_is_one_that_the_product_accepts() -> None:
    for cell in CELLS:
        for rule in cell.rules:
            FaultRule.model_validate(rule)
        assert cell.phase in PHASES
        assert cell.acts or cell.rules or cell.leave
    assert len({cell.id for cell in CELLS}) == len(CELLS)
    assert sum(cell.short for cell in CELLS) >= 12


def test_gaps_are_those_of_streams_that_stayed() -> None:
    stayed = answer(times=[1.0, 1.5, 9.0])
    moved = answer(times=[1.0, 4.0], told={"migrations": 1})
    assert gaps([stayed, moved], deaths=[1.2]) == ([0.5], [7.5])


def test_what_is_held_is_told_by_engine_and_kind() -> None:
    before = Reading(files={5: 20, 6: 20}, threads={5: 3})
    now = Reading({"decode-0": {"blocks_used": 2}}, in_flight=1, files={5: 20 + 25, 7: 900}, threads={5: 4})
    leaks = now.leaks(before)
    assert leaks[0] == "decode-0: blocks_used 2"
    assert any("1 requests" in leak for leak in leaks)
    assert any("process 5: 45 open files" in leak for leak in leaks)
    assert len(leaks) == 3
    assert not Reading().leaks(before)


def test_settings_are_changed_group_by_group() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}}) == {
        "a": {"b": 5, "c": 2},
        "d": {"e": 1},
    }


class OneEngine(Rig):
    """A rig whose only engine is a process of the test's."""

    pids: list[int]
    told: list[dict[str, Any]]

    def engines(self) -> list[Process]:
        return [Process("decode-0", "decode", pid, at) for at, pid in enumerate(self.pids)]

    def get(self, path: str, timeout_s: float = 5.0) -> Any:
        return {"losses": self.told}


def test_a_death_is_seen_from_outside_and_compared_with_what_the_router_tells(tmp_path: Any) -> None:
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    rig = OneEngine("http://127.0.0.1:1", "echo", "echo", tmp_path, 1)
    rig.pids, rig.told = [process.pid for process in sleepers], []
    watch = Watch(rig)
    try:
        sleepers[0].kill()
        sleepers[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while len(watch.deaths) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        watch.close()
        for process in sleepers:
            process.kill()
            process.wait()
    assert {(death.process.epoch, death.was_stopped) for death in watch.deaths} == {(0, False), (1, True)}
    at = {death.process.epoch: death.at_unix for death in watch.deaths}
    told = [
        {"engine": "decode-0", "epoch": 0, "at_unix": at[0] + 0.5, "cause": "silent"},
        {"engine": "decode-0", "epoch": 7, "at_unix": at[0] + 1, "cause": "silent"},
    ]
    found, missing = watch.detection(told)
    assert found == [pytest.approx(0.5)]
    assert missing == ["decode-0 epoch 1"]
    assert watch.untrue(told) == ["decode-0 epoch 7: silent"]
    assert Verdict() + Verdict(1, 2, 3) == Verdict(1, 2, 3)
