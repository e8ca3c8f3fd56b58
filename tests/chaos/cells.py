"""The matrix as data: which fault, in which phase of a request, for which of the failure cases F1 to F50 and rows R.

Where a phase can be met from outside, a signal is sent when a client has seen so many tokens. Where it cannot, a fault
rule in the shipped binary fires at the n-th occasion of the edge that belongs to the phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PHASES = ("queued", "prefill", "transfer", "token0", "decode", "finish", "any")
Verb = Literal["kill", "term", "stop", "scale", "restart", "apply", "role"]
OF_A_MODEL = ("scale",)  # verbs whose first argument is the model


@dataclass(frozen=True, slots=True)
class Act:
    """What is done from outside. `after_tokens` of one stream at least; 0: with the first request sent."""

    verb: Verb
    target: str  # a process, or the arguments of a command
    after_tokens: int = 0
    for_s: float = 0.0  # of stop


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the matrix. `deaths` says how many engines end or stop by it (None: those that end are not
    counted), `may_break` whether streams may,
    with an error or a broken connection."""

    id: str
    covers: tuple[str, ...]
    phase: str
    what: str
    acts: tuple[Act, ...] = ()
    rules: tuple[dict[str, Any], ...] = ()
    deaths: int | None = 0
    may_break: bool = False
    leave: bool = False  # clients go away at random
    short: bool = False  # part of the short form
    over_s: float = 1.0  # the requests come within so long
    keep_on: bool = False  # more requests come until the acts are over
    at_least: int = 0  # so many of them in the long form
    rounds: int = 1  # in the long form: so often, each time with `each` requests
    each: int = 0


def rule(point: str, action: str, **more: Any) -> dict[str, Any]:
    """A fault rule."""
    return {"point": point, "action": action, **more}


def kill_at(point: str, engine: str, nth: int, message: str = "*") -> tuple[dict[str, Any], ...]:
    """The engine ends at the n-th occasion."""
    return (rule(point, "kill", engine=engine, nth=[nth], message=message, limit=1),)


def signal(verb: Verb, target: str, after_tokens: int = 0, for_s: float = 0.0) -> tuple[Act, ...]:
    """One act."""
    return (Act(verb, target, after_tokens, for_s),)


P, D = "prefill-0", "decode-0"
P1, D1 = "prefill-1", "decode-1"
OFTEN = 0.2  # of all occasions

DEATHS = (
    Cell(
        "kill-prefill-queued",
        ("F1", "R02"),
        "queued",
        "kill -9 prefill",
        signal("kill", P),
        deaths=1,
        over_s=0.2,
        rounds=20,
        each=8,
    ),
    Cell(
        "kill-prefill-step",
        ("F2", "R02"),
        "prefill",
        "kill -9 prefill in its 3rd step",
        rules=kill_at("engine.step", P, 3),
        deaths=1,
    ),
    Cell(
        "kill-prefill-publish",
        ("F2", "R02"),
        "transfer",
        "kill -9 prefill as it stages its 3rd chunk",
        rules=kill_at("hinge.publish", P, 3),
        deaths=1,
        short=True,
        rounds=20,
        each=16,
        over_s=0.2,  # or one engine takes them all
    ),
    Cell(
        "kill-prefill-finished",
        ("F3", "R02"),
        "token0",
        "kill -9 prefill before it tells that a prompt is done",
        rules=kill_at("hinge.out", P, 2, "finished"),
        deaths=1,
        short=True,
        rounds=20,
        each=16,
        over_s=0.2,  # or one engine takes them all
    ),
    Cell("kill-prefill-decode", ("R02", "F13"), "decode", "kill -9 prefill", signal("kill", P, 8), deaths=1),
    Cell("kill-decode-queued", ("F8",), "queued", "kill -9 decode", signal("kill", D), deaths=1, over_s=0.2),
    Cell(
        "kill-decode-fetch",
        ("F8",),
        "transfer",
        "kill -9 decode as it fetches its 3rd chunk",
        rules=kill_at("hinge.fetch", D, 3),
        deaths=1,
        short=True,
    ),
    Cell(
        "kill-decode-scatter",
        ("F8",),
        "transfer",
        "kill -9 decode as it places its 2nd chunk",
        rules=kill_at("hinge.scatter", D, 2),
        deaths=1,
    ),
    Cell("kill-decode-token0", ("F9", "R01"), "token0", "kill -9 decode", signal("kill", D, 1), deaths=1),
    Cell(
        "kill-decode-decode",
        ("F9", "F13", "R01"),
        "decode",
        "kill -9 decode",
        signal("kill", D, 8),
        deaths=1,
        short=True,
        rounds=10,
        each=20,
    ),
    Cell(
        "kill-decode-step",
        ("F9", "R01"),
        "decode",
        "kill -9 decode in its 20th step",
        rules=kill_at("engine.step", D, 20),
        deaths=1,
    ),
    Cell(
        "kill-decode-final-ack",
        ("F29",),
        "finish",
        "kill -9 decode as it confirms the last chunk",
        rules=kill_at("hinge.out", D, 2, "final_ack"),
        deaths=1,
    ),
    Cell(
        "kill-both-pools",
        ("F1", "F9"),
        "decode",
        "kill -9 one prefill and one decode engine at once",
        (Act("kill", P, 8), Act("kill", D, 8)),
        deaths=2,
    ),
)

STOPS = (
    Cell(
        "stop-prefill", ("F4",), "prefill", "SIGSTOP prefill for 60 s", signal("stop", P, 1, 60.0), deaths=1, short=True
    ),
    Cell(
        "stop-decode",
        ("F4", "F10"),
        "decode",
        "SIGSTOP decode for 60 s",
        signal("stop", D, 8, 60.0),
        deaths=1,
        short=True,
    ),
    Cell(
        "pause-prefill",
        ("F4",),
        "transfer",
        "SIGSTOP prefill for 1.3 s, then it goes on",
        rules=(rule("hinge.publish", "stop", engine=P, nth=[3], for_s=1.3, limit=1),),
        deaths=1,
    ),
    Cell(
        "pause-decode",
        ("F4",),
        "decode",
        "SIGSTOP decode for 1.3 s, then it goes on",
        signal("stop", D, 8, 1.3),
        deaths=1,
    ),
)

HINGE = (
    Cell(
        "flip-chunk",
        ("F14", "R09"),
        "transfer",
        "1 bit of a staged chunk is turned, in 20 %",
        rules=(rule("hinge.publish", "corrupt", probability=OFTEN),),
        short=True,
    ),
    Cell(
        "cut-chunk",
        ("F15", "R09"),
        "transfer",
        "a staged chunk's end is spoilt, in 20 %",
        rules=(rule("hinge.publish", "truncate", probability=OFTEN),),
    ),
    Cell(
        "flip-fetched",
        ("F14", "R09"),
        "transfer",
        "1 bit of a fetched chunk is turned, in 20 %",
        rules=(rule("hinge.fetch", "corrupt", probability=OFTEN),),
    ),
    Cell(
        "slow-fetch",
        ("F19", "F22"),
        "transfer",
        "fetches take 0.3 s longer, in 20 %",
        rules=(rule("hinge.fetch", "delay", probability=OFTEN, delay_s=0.3),),
    ),
    *(
        Cell(
            f"{action}-message",
            ("F16", "R08", "R09"),
            "transfer",
            f"{action} the hinge's control messages, 5 % in each direction",
            rules=(
                rule("hinge.out", action, probability=0.05, delay_s=0.2),
                rule("hinge.in", action, probability=0.05, delay_s=0.2),
            ),
            short=action in ("drop", "duplicate"),
        )
        for action in ("drop", "duplicate", "reorder", "delay")
    ),
    Cell(
        "scatter-fails",
        ("F7",),
        "transfer",
        "placing a chunk fails, in 10 %",
        rules=(rule("hinge.scatter", "raise", probability=0.1),),
    ),
)

ENGINES = (
    Cell(
        "step-fails-prefill",
        ("F7",),
        "prefill",
        "the 3rd prefill step raises",
        rules=(rule("engine.step", "raise", engine=P, nth=[3], limit=1),),
    ),
    Cell(
        "step-fails-decode",
        ("F7",),
        "decode",
        "the 20th decode step raises",
        rules=(rule("engine.step", "raise", engine=D, nth=[20], limit=1),),
    ),
    Cell(
        "submit-twice",
        ("R08",),
        "queued",
        "orders to engines arrive twice, in 20 %",
        rules=(rule("session.submit", "duplicate", probability=OFTEN),),
        short=True,
    ),
    Cell(
        "status-lost",
        ("F40",),
        "any",
        "half of the engines' status frames are lost",
        rules=(rule("session.status", "drop", probability=0.5),),
    ),
    Cell("cancel-everywhere", ("F26", "F27", "R10"), "any", "clients leave at random", leave=True),
    Cell(
        "cancel-twice",
        ("F26", "F29"),
        "any",
        "clients leave, cancels arrive twice or late",
        rules=(
            rule("session.cancel", "duplicate", probability=0.3),
            rule("session.cancel", "delay", probability=0.3, delay_s=0.2),
        ),
        leave=True,
    ),
)

CONTROL = (
    Cell("kill-manager", ("F33",), "any", "kill -9 the pool manager", signal("kill", "manager", 1), short=True),
    Cell("kill-controller", ("F32",), "any", "kill -9 Ray Serve's controller", signal("kill", "controller", 1)),
    Cell("kill-proxy", ("F32",), "any", "kill -9 Ray Serve's proxy", signal("kill", "proxy", 1)),
    Cell("kill-router", ("F31",), "any", "kill -9 the router", signal("kill", "router-0", 8), may_break=True),
    Cell(
        "term-router",
        ("R17", "F31"),
        "decode",
        "SIGTERM the router; requests go on coming for 12 s",
        signal("term", "router-0", 4),
        short=True,
        over_s=12.0,
    ),
    Cell(
        "restart-router",
        ("R17", "R18"),
        "any",
        "the router is replaced",
        signal("restart", "--router", 4),
        keep_on=True,
    ),
    Cell("term-prefill", ("R17",), "decode", "SIGTERM prefill", signal("term", P, 4), deaths=None),
    Cell("term-decode", ("R17",), "decode", "SIGTERM decode", signal("term", D, 4), deaths=None, short=True),
    Cell(
        "scale-down",
        ("F36",),
        "any",
        "both pools from 2 to 1 and back",
        (Act("scale", "--prefill 1 --decode 1", 4), Act("scale", "--prefill 2 --decode 2", 4)),
        deaths=None,
        keep_on=True,
    ),
    Cell(
        "rolling-restart",
        ("F35", "R18"),
        "any",
        "every engine is replaced, one by one, then the router",
        signal("restart", "", 4),
        deaths=None,
        keep_on=True,
    ),
    Cell(
        "other-kv-layout",
        ("F35", "R18"),
        "any",
        "every engine is replaced by one with another layout and block size of KV, and back",
        (
            Act("apply", "--set models.echo.echo.kv_heads=4 --set models.echo.kv.block_tokens=8", 4),
            Act("apply", "--set models.echo.echo.kv_heads=2 --set models.echo.kv.block_tokens=16", 4),
        ),
        deaths=None,
        keep_on=True,
        at_least=1_200,
    ),
    Cell(
        "role-change",
        ("F37",),
        "any",
        "one prefill engine becomes a decode engine and back, then one decode engine a prefill engine and back",
        (
            Act("role", f"{P1} decode", 4),
            Act("role", f"{P1} prefill", 4),
            Act("role", f"{D1} prefill", 4),
            Act("role", f"{D1} decode", 4),
        ),
        deaths=None,
        keep_on=True,
    ),
)

CELLS = (*DEATHS, *STOPS, *HINGE, *ENGINES, *CONTROL)

NOT_COVERED = {
    "F5": "unit tests of placement and refusal; simulation",
    "F6": "each relaunch here has the same name and a new epoch; a fixed TCP port is tested without processes",
    "F11, F12, F17, F18, F23, F24, F25, F28 beyond the storm here, F38, F39": "simulation and tests of the hinge",
    "F20": "no tensor parallelism in the project",
    "F21": "needs NCCL on GPUs",
    "F30, F41 to F47": "tests of the engines and the conformance matrix",
    "F34, R26": "Ray's GCS without an external store cannot restart in place; the death of the head ends a private Ray",
    "F48, F49": "an hour idle and a day of soak: not run",
    "F50": "clock jumps: tests of the proof windows only",
    "R05, R06": "cut links and packet loss are tests of their own, in network namespaces (tests/netns)",
    "GPU": "no case ran on a GPU",
}
"""Failure cases that this matrix says nothing about, and who does."""
