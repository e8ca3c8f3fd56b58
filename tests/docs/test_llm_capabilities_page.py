"""docs/llm-capabilities.md names what is there: examples, tests and names of the library; and it leaves none out.

Guards against a row whose test was renamed or taken away, and an example that nobody finds.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from fences import DOCS

from diptych.agents import llm
from diptych.agents.llm import testing

PAGE = DOCS / "llm-capabilities.md"
EXAMPLES = DOCS.parent / "examples" / "llm"
TEXT = PAGE.read_text()
ROWS = [row for row in re.findall(r"^\| (.*) \|$", TEXT, re.MULTILINE)[1:] if set(row) - set("-| ")]
CAPABILITIES = {f"M{number}" for number in range(1, 14)} | {f"I{number}" for number in range(1, 21)}
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)\)")


@cache
def defined_in(path: Path) -> frozenset[str]:
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[1][:40])
def test_a_row_has_an_example_and_tests_that_exist(row: str) -> None:
    _, what, here, examples, tests = row.split(" | ")
    assert what
    assert here
    shown, held = LINK.findall(examples), LINK.findall(tests)
    assert shown
    assert held
    for name, target in shown:
        path = (PAGE.parent / target).resolve()
        assert path.is_file(), f"{target} is not there"
        assert name == str(path.relative_to(EXAMPLES))
    for name, target in held:
        path = (PAGE.parent / target).resolve()
        assert path.is_file(), f"{target} is not there"
        file, _, test = name.partition("::")
        assert file == path.name
        assert test in defined_in(path), f"{target} has no {test}"


def test_every_capability_has_one_row() -> None:
    marks = [mark for row in ROWS for mark in row.split(" | ")[0].split(", ") if mark != "beyond"]
    assert sorted(marks) == sorted(CAPABILITIES)


def test_every_example_is_named() -> None:
    named = {(PAGE.parent / target).resolve() for _, target in LINK.findall(TEXT)}
    assert [str(path) for path in EXAMPLES.rglob("*.py") if path.resolve() not in named] == []


def test_every_name_of_the_library_is_there() -> None:
    names = re.findall(r"`llm\.([A-Za-z_]+)", TEXT)
    assert len(names) > 30
    assert set(names) - set(llm.__all__) == set()
    (kit,) = re.findall(r"`diptych\.llm\.testing`: ([^|]+) \|", TEXT)
    assert set(re.findall(r"`(\w+)`", kit)) - set(testing.__all__) == set()


def test_the_page_is_found() -> None:
    assert "(llm-capabilities.md)" in (DOCS / "README.md").read_text()
