"""No file over 600 lines, no function over 80, no constructor of meaningless names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sources import ALL_FOLDERS, ROOT, parse, python_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
VAGUE = {"utils", "common", "helpers", "misc", "util", "helper"}


@pytest.mark.parametrize("path", python_files(*ALL_FOLDERS), ids=str)
def test_sizes(path: Path) -> None:
    text = (ROOT / path).read_text()
    lines = text.count("\n")
    assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines: split it by noun"
    assert path.stem not in VAGUE, f"{path}: name the file by its noun"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {size} lines"


@pytest.mark.parametrize("path", python_files(*ALL_FOLDERS), ids=str)
def test_sources_are_ascii(path: Path) -> None:
    text = (ROOT / path).read_text()
    odd = [f"{path}:{n}" for n, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not odd, f"write escapes instead: {odd}"
