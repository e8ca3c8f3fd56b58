"""Arithmetic of a trace."""

from __future__ import annotations

import pytest

from diptych.cluster.bench.profile import profile_lines, summary


def test_a_trace_is_summed_by_name_a_step_and_idle_is_where_nothing_ran() -> None:
    pieces = [
        ("gemm", 100.0, 140.0, 40.0),
        ("norm", 140.0, 150.0, 10.0),
        ("gemm", 160.0, 200.0, 40.0),
        ("norm", 190.0, 200.0, 10.0),  # beside the other
    ]
    found = summary(pieces, 2)
    assert (found["steps"], found["step_us"]) == (2, 50.0)
    assert found["idle_share"] == pytest.approx(0.1)
    assert found["kernels"] == [
        {"name": "gemm", "count": 1.0, "us": 40.0, "share": 0.8},
        {"name": "norm", "count": 1.0, "us": 10.0, "share": 0.2},
    ]


def test_a_piece_within_another_is_busy_time_once() -> None:
    found = summary([("outer", 0.0, 10.0, 4.0), ("inner", 2.0, 8.0, 6.0), ("late", 18.0, 20.0, 2.0)], 1)
    assert found["idle_share"] == pytest.approx(0.4)
    assert [kernel["name"] for kernel in found["kernels"]] == ["inner", "outer", "late"]


def test_nothing_traced_is_said() -> None:
    found = {"first_step": 4} | summary([], 3)
    assert found["kernels"] == []
    assert list(profile_lines("w", found)) == ["profile of w: no step was traced"]


def test_the_table_keeps_the_longest_and_adds_up_the_rest() -> None:
    pieces = [(f"kernel {at} " + "x" * 200, 10.0 * at, 10.0 * at + 5, 5.0 + at / 100) for at in range(40)]
    lines = list(profile_lines("w", {"first_step": 0} | summary(pieces, 1)))
    assert lines[0].startswith("profile of w: 1 steps from number 0 on, 395.0 us each, idle 49.4%")
    assert "kernel 39" in lines[2]
    assert "16 others" in lines[-1]
    assert all(len(line) < 120 for line in lines)
