"""What a docstring says of a function and of each parameter: Google's, NumPy's and Sphinx's ways of writing it.

tool_schema.py calls it. It knows no types: those are in the signature.
"""

from __future__ import annotations

import inspect
import re

_GOOGLE = re.compile(r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments|Other Parameters):\s*$")
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s*:(?:\s+(.*)|$)")
_NUMPY = re.compile(r"(Parameters|Other Parameters)\s*$")
_RULE = re.compile(r"-{3,}\s*$")
_NUMPY_ENTRY = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?$")
_SPHINX = re.compile(r":(?:param|parameter|arg|argument|key|keyword)\s+(?:[^:]*\s)?\*{0,2}(\w+)\s*:\s*(.*)")
_SPHINX_TYPE = re.compile(r":type\s+\w+\s*:")


def described(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text without its sections of parameters, and what these say, by parameter."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    prose: list[str] = []
    told: dict[str, list[str]] = {}
    at = 0
    while at < len(lines):
        line = lines[at]
        if _GOOGLE.match(line) and _is_indented(lines, at + 1):
            at = _google(lines, at + 1, told)
        elif _NUMPY.match(line) and at + 1 < len(lines) and _RULE.match(lines[at + 1]):
            at = _numpy(lines, at + 2, told)
        elif found := _SPHINX.match(line.strip()):
            told[found[1]] = [found[2]]
            at = _deeper(lines, at + 1, _indent(line), told[found[1]])
        elif _SPHINX_TYPE.match(line.strip()):
            at = _deeper(lines, at + 1, _indent(line), [])
        else:
            prose.append(line)
            at += 1
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip()
    return text, {name: " ".join(part for part in parts if part).strip() for name, parts in told.items()}


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _is_indented(lines: list[str], at: int) -> bool:
    while at < len(lines) and not lines[at].strip():
        at += 1
    return at < len(lines) and _indent(lines[at]) > 0


def _deeper(lines: list[str], at: int, indent: int, parts: list[str]) -> int:
    """Takes the lines that are indented further than `indent`, and empty ones among them."""
    while at < len(lines):
        line = lines[at]
        if line.strip() and _indent(line) <= indent:
            break
        if not line.strip() and not (at + 1 < len(lines) and _indent(lines[at + 1]) > indent):
            break
        parts.append(line.strip())
        at += 1
    return at


def _google(lines: list[str], at: int, told: dict[str, list[str]]) -> int:
    indent = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        if _indent(line) == 0:
            break
        indent = indent or _indent(line)
        found = _GOOGLE_ENTRY.match(line.strip()) if _indent(line) <= indent else None
        parts = told.setdefault(found[1], [found[2] or ""]) if found else []
        at = _deeper(lines, at + 1, _indent(line), parts)
    return at


def _numpy(lines: list[str], at: int, told: dict[str, list[str]]) -> int:
    while at < len(lines):
        line = lines[at]
        is_next = at + 1 < len(lines) and _RULE.match(lines[at + 1])
        found = _NUMPY_ENTRY.match(line)
        if is_next or (line.strip() and (_indent(line) > 0 or not found)):
            break
        if not line.strip():
            at += 1
            continue
        assert found is not None
        parts: list[str] = []
        for name in found[1].split(","):
            told[name.strip().lstrip("*")] = parts
        at = _deeper(lines, at + 1, 0, parts)
    return at
