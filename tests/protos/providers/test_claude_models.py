"""What is known of Claude models by their names at each vendor; guards against a date that is read as a version."""

from __future__ import annotations

import pytest

from diptych.protos.providers.claude_models import claude_of


@pytest.mark.parametrize(
    ("name", "family", "version"),
    [
        ("claude-opus-4-20250514", "opus", (4, 0)),
        ("claude-sonnet-4@20250514", "sonnet", (4, 0)),
        ("claude-3-7-sonnet-20250219", "sonnet", (3, 7)),
        ("claude-3-haiku-20240307", "haiku", (3, 0)),
        ("claude-3-5-haiku-latest", "haiku", (3, 5)),
        ("us.anthropic.claude-haiku-4-5-20251001-v1:0", "haiku", (4, 5)),
        ("anthropic/claude-opus-4.6", "opus", (4, 6)),
        ("claude-opus-4-6[1m]", "opus", (4, 6)),
        ("claude-fable-5", "fable", (5, 0)),
        ("claude-mythos-preview", "mythos", (5, 0)),
        ("claude-opus-12-1", "opus", (12, 1)),
    ],
)
def test_names(name: str, family: str, version: tuple[int, int]) -> None:
    found = claude_of(name)
    assert found is not None
    assert (found.family, found.version) == (family, version)


@pytest.mark.parametrize("name", ["MiniMax-M3", "claude", "claude-latest", "my-claude-model", "kimi-k3"])
def test_of_other_names_nothing_is_assumed(name: str) -> None:
    assert claude_of(name) is None


@pytest.mark.parametrize(
    ("name", "no_thinking", "efforts", "forced", "structured"),
    [
        ("claude-sonnet-4-5", "omit", 0, True, True),
        ("claude-opus-4-1", "omit", 0, True, True),
        ("claude-sonnet-4", "omit", 0, True, False),
        ("claude-opus-4-5", "omit", 3, True, True),
        ("claude-sonnet-4-6", "omit", 4, True, True),
        ("claude-opus-4-7", "omit", 5, True, True),
        ("claude-opus-5", "disabled", 5, True, True),
        ("claude-opus-5-5", "never", 5, False, True),
        ("claude-sonnet-5-5", "between_tools", 5, False, True),
        ("claude-haiku-5-5", "disabled", 5, True, True),
        ("claude-fable-5", "never", 5, True, True),
        ("claude-fable-5-1", "never", 5, False, True),
    ],
)
def test_facts(name: str, no_thinking: str, efforts: int, forced: bool, structured: bool) -> None:
    found = claude_of(name)
    assert found is not None
    told = (found.no_thinking, len(found.efforts), found.forced_calls, found.structured)
    assert told == (no_thinking, efforts, forced, structured)
