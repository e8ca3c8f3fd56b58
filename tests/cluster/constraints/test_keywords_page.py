"""docs/structured-output-keywords.md is what its command prints."""

from __future__ import annotations

from pathlib import Path

from diptych.cluster.constraints import coverage, keywords

PAGE = Path(__file__).parents[3] / "docs" / "structured-output-keywords.md"


def test_the_page_says_what_the_grammar_does() -> None:
    """The table promised a keyword that a newer llguidance no longer enforced."""
    assert PAGE.read_text() == coverage.page() + "\n"


def test_every_keyword_is_in_the_table() -> None:
    """A keyword without a row is a promise that nobody tried."""
    page = coverage.page()
    silent = {"$schema", "$id", "id", "$anchor", "definitions", *keywords.DYNAMIC}
    assert [word for word in sorted(keywords.KEYWORDS - silent) if word not in page] == []
