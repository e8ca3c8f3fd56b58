"""The measurement that kills engines under streams: its judge in small, and ten kills of a whole cluster.

Guards against a judge that lets a repeated, missing or foreign piece pass, or an answer without an end, and against a
router or a gateway that shows its clients the death of an engine.
"""

from __future__ import annotations

import json
import math
from types import ModuleType
from typing import Any

import pytest

TEXT = "one two three"


def stream(kills: ModuleType, *pieces: str, finish: str | None = "length", tokens: int = 3, end: str = "[DONE]") -> Any:
    made = kills.Stream(kills.Question({"temperature": 0}, TEXT, 3))
    for text in pieces:
        made.read(json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": None}]}))
    made.read(json.dumps({"choices": [{"delta": {}, "finish_reason": finish}]}))
    made.read(json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}))
    if end:
        made.read(end)
    return made


def test_the_judge_sees_what_a_client_would(kills: ModuleType) -> None:
    good = ["one ", "two ", "three"]
    assert stream(kills, *good).judge() == ""
    assert "differs from character 9" in stream(kills, "one ", "two ", "two ", "three").judge()
    assert "differs from character 5" in stream(kills, "one ", "three").judge()
    assert "differs" in stream(kills, "one ", "two ").judge()
    assert "no end" in stream(kills, *good, end="").judge()
    assert "no end" in stream(kills, *good, finish=None).judge()
    assert "4 tokens are told" in stream(kills, *good, tokens=4).judge()
    late = stream(kills, *good)
    late.read(json.dumps({"choices": [{"delta": {"content": "!"}, "finish_reason": None}]}))
    assert "behind the finish" in late.judge()
    broken = stream(kills, *good)
    broken.read(json.dumps({"error": {"message": "gone"}}))
    assert "gone" in broken.judge()


def test_explanations_of_both_roads_are_read(kills: ModuleType) -> None:
    """A move that nobody counts would make a run without any broken stream a success."""
    own, routed = stream(kills, TEXT), stream(kills, TEXT)
    own.read(json.dumps({"choices": [], "diptych": {"choices": [{"migrations": 1, "attempts": 2}]}}))
    told = {"attempts": [{"target": "pool/x", "explanation": {"migrations": 1, "attempts": 2}}]}
    routed.read(json.dumps({"choices": [], "diptych": {"choices": [told]}}))
    assert [(one.moves, one.placements) for one in (own, routed)] == [(1, 2)] * 2
    assert routed.attempts == 1
    told["attempts"] *= 2
    routed.read(json.dumps({"choices": [], "diptych": {"choices": [told]}}))
    assert routed.judge() == "2 attempts of the gateway"
    run = kills.Run(streams=[own, routed, stream(kills, TEXT)])
    assert (kills.figures(run)["streams_moved"], kills.figures(run)["wrong"]) == (2, 1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("model", [[], ["--echo"]], ids=["checkpoint", "echo"])
def test_ten_kills_show_no_client_anything(kills: ModuleType, model: list[str]) -> None:
    size = ["--decode", "3", "--streams", "4", "--questions", "8", "--tokens", "320"]
    assert kills.main(["--kills", "10", *size, *model]) == 0


def entry(*top: tuple[str, float], chosen: str) -> dict[str, Any]:
    told = [{"bytes": list(text.encode()), "logprob": logprob} for text, logprob in top]
    return {"bytes": list(chosen.encode()), "top_logprobs": told}


def test_a_margin_is_the_distance_to_the_nearest_other_choice(
    kills: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that floats decide would be counted as wrong, and a wrong margin would leave out all others."""

    def reply(*tokens: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"logprobs": {"content": list(tokens)}}], "usage": {"prompt_tokens": 5}}

    ids = {letter.encode(): place for place, letter in enumerate("hgfedcbai")}  # parts lie in the order of ids
    greedy, seeded = {"temperature": 0}, {"temperature": 1, "seed": 3}
    far, near = entry(("a", -0.1), ("b", -3.0), chosen="a"), entry(("a", -0.9), ("b", -0.901), chosen="a")
    assert kills.margin(reply(far, near), greedy, ids) == pytest.approx(0.001)
    even = [(letter, math.log(1 / 8) - (5.0 if letter == "i" else 0.0)) for letter in "abcdefghi"]
    monkeypatch.setattr(kills, "uniform", lambda seed, position: {5: 0.3, 6: 0.126}[position])
    drawn = [entry(*even, chosen="f"), entry(*even, chosen="g")]
    assert kills.margin(reply(drawn[0]), seeded, ids) == pytest.approx(0.05)
    assert kills.margin(reply(*drawn), seeded, ids) == pytest.approx(0.001)
    assert kills.margin(reply(entry(*even, chosen="e")), seeded, ids) == 0  # drawn by another rule than ours
    tied = [(letter, math.log(1 / 8) - (1e-6 if letter == "i" else 0.0)) for letter in "abcdefghi"]
    assert kills.margin(reply(entry(*tied, chosen="f")), seeded, ids) == pytest.approx(1e-6)
