"""The project's Python sources, as the shape tests see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("protos", "kernels", "kvtransfer", "prefill", "decode", "cluster", "agents")
ALL_FOLDERS = (*FLOORS, "tests", "bench", "examples")


def python_files(*folders: str) -> list[Path]:
    """Every source file below the folders, generated code left out, relative to the root."""
    found = [p for f in folders for p in (ROOT / f).rglob("*.py") if "_pb2" not in p.name]
    return sorted(p.relative_to(ROOT) for p in found)


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file given relative to the root."""
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, relative ones resolved below `diptych`."""
    package = ("diptych", *path.parent.parts)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                yield node.lineno, ".".join((*base, node.module)) if node.module else ".".join(base)
            else:
                assert node.module is not None
                yield node.lineno, node.module
                if node.module == "diptych":
                    for alias in node.names:
                        yield node.lineno, f"diptych.{alias.name}"
