"""docs/conformance.md is the table of the present architectures and situations, without an empty cell."""

from __future__ import annotations

from report import PAGE
from situations import SITUATIONS, WAYS

from diptych.kernels.testing import ARCHITECTURES

PROMISED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "gpt-oss",
}


def rows() -> list[list[str]]:
    """The table's rows, the heading first."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_exactly_the_architectures_and_situations_of_the_code() -> None:
    heading, *body = rows()
    assert heading == ["situation", *ARCHITECTURES]
    assert [row[0] for row in body] == [situation.name for situation in SITUATIONS], "run `make conformance`"
    assert all(f"- `{way}`: {words}." in PAGE.read_text() for way, words in WAYS.items())


def test_every_cell_of_the_page_compared_tokens() -> None:
    for row in rows()[1:]:
        assert len(row) == 1 + len(ARCHITECTURES)
        assert all(int(cell.split(" ")[0]) > 0 for cell in row[1:]), row


def test_every_promised_family_is_in_the_matrix() -> None:
    assert {*PROMISED, "gpt2", "gpt-bigcode"} <= set(ARCHITECTURES)
