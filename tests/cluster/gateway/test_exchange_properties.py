"""Whatever targets do, in any order: one end, no words of two attempts mixed, nothing late, nothing left behind."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from journeys import gateway, read, run, text_of

from diptych.cluster.gateway.public import AnswerBroken
from diptych.cluster.gateway.signals import Continued, Restarted
from diptych.cluster.gateway.testing import HANG, Script, ScriptedTarget, Wait, fails
from diptych.protos.deltas import CallArguments, CallBegin, CallEnd, Content, Reasoning
from diptych.protos.errors import DiptychError, FirstTokenTimeout
from diptych.protos.failures import FailureKind
from diptych.protos.replies import Began, Ended, Usage

DEADLINE_S = 60.0
WAITS = st.sampled_from([0.01, 1.0, 7.0, 12.0, 25.0, HANG]).map(Wait)
FAILURES = st.builds(fails, st.sampled_from(FailureKind), retry_after_s=st.sampled_from([None, 0.5, 20.0, 900.0]))
CALL = [CallBegin(0, "f"), CallArguments(0, "{}"), CallEnd(0)]
ENDS = st.sampled_from([[Usage(output_tokens=3), Ended("stop")], [Ended("length")], [], [KeyError("defect")]])


@st.composite
def scripts(draw: st.DrawFn, letter: str) -> Script:
    """Of a target whose words are all its own letter."""
    says = st.sampled_from(
        [Content(letter), Content(letter * 2), Content(letter + " "), Content(""), Usage(), Reasoning(letter)]
    )
    middle: list[Any] = draw(st.lists(st.one_of(says, says, says, WAITS), max_size=5))
    end = draw(st.one_of(ENDS, FAILURES.map(lambda failure: [failure])))
    begin = draw(st.sampled_from([[Began(letter)], []]))
    return [*begin, *middle, *draw(st.sampled_from([[], [], CALL])), *end]


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """Targets with their scripts, and a route over some of them."""
    names = {f"p/{letter}": draw(st.lists(scripts(letter), min_size=1, max_size=3)) for letter in "abcd"}
    hedge = draw(st.sampled_from([None, None, {"after": 2, "max_fraction": 0.5}]))
    route = {
        "targets": ["p/a", "p/b"],
        "fallback": draw(st.sampled_from([[], ["p/c"], ["p/c", "p/d"]])),
        "context_fallback": draw(st.sampled_from([[], ["p/d"]])),
        "strategy": draw(st.sampled_from(["priority", "p2c", "weighted", "sticky"])),
        "midstream": draw(st.sampled_from(["auto", "error", "continue"])),
        "retries": draw(st.integers(0, 3)),
        "hedge": hedge,
    }
    continues = draw(st.sampled_from(["no", "prefill"]))
    return {"scripts": names, "route": route, "continues": continues, "restarts": draw(st.booleans())}


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_every_story_has_one_honest_end(world: dict[str, Any]) -> None:
    """The bugs that nobody thought of."""

    async def job() -> None:
        targets = [
            ScriptedTarget(name, scripts, continues=world["continues"]) for name, scripts in world["scripts"].items()
        ]
        gate = gateway(*targets, **world["route"])
        loop = asyncio.get_running_loop()
        for _ in range(3):
            began = loop.time()
            items, exc, record = await read(gate, restarts=world["restarts"], timeout_s=DEADLINE_S)
            assert loop.time() - began <= DEADLINE_S + 1.1  # a second for what comes behind the end
            check(items, exc, record, world)
        assert [target.open for target in targets] == [0] * 4
        groups = [
            gate._shared.routes.of("chat"),
            *gate._shared.routes.behind(gate._shared.routes.of("chat"), "general"),
        ]
        assert {member.load.in_flight for group in groups for member in group.members} == {0}

    run(job())


def check(items: list[Any], exc: Exception | None, record: Any, world: dict[str, Any]) -> None:
    restarted = [i for i, item in enumerate(items) if isinstance(item, Restarted)]
    last = items[restarted[-1] + 1 :] if restarted else items
    assert not restarted or world["restarts"]
    if items:
        assert isinstance(items[0], Began)
        assert isinstance(last[0], Began)
    assert sum(isinstance(item, Began) for item in last) <= 1
    ends = [i for i, item in enumerate(items) if isinstance(item, Ended)]
    assert ends == ([len(items) - 1] if exc is None else [])
    if exc is not None:
        assert isinstance(exc, DiptychError)
        has_content = any(isinstance(item, Content | Reasoning | CallBegin) and item != Content("") for item in last)
        assert not has_content or isinstance(exc, AnswerBroken) or exc.code in ("deadline_exceeded", "cancelled")
        assert not isinstance(exc, AnswerBroken) or has_content
        assert not (has_content and isinstance(exc, FirstTokenTimeout))
    letters = set(text_of(last).replace(" ", ""))
    assert len(letters) <= 1 + sum(isinstance(item, Continued) for item in last)
    fallbacks = len(world["route"]["fallback"]) + len(world["route"]["context_fallback"])
    sent = [entry for entry in record.attempts if entry.cause != "hedge" and told_kind(entry) != "unsupported"]
    assert len(sent) <= 1 + world["route"]["retries"] + fallbacks
    assert all(entry.outcome != "running" and entry.ended_ms is not None for entry in record.attempts)
    assert record.outcome not in ("running", "cancelled") or isinstance(exc, DiptychError)


def told_kind(entry: Any) -> str:
    return "" if entry.failure is None else str(entry.failure.kind.value)
