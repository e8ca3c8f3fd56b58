"""What a chat template can do, found out once when it is loaded. render.py and turns.py adapt conversations by it.

The names that a template reads tell nearly all of it; whether it takes contents as texts or as parts is tried.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import Template, nodes

from .template import REFUSALS, Budget, TooMuch, render, template_data

_CONTENT = "content"
_WORD = "qualm-of-conscience"  # in no template


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFacts:
    """reads               every variable that is read anywhere in the template
    knows_tools         it reads `tools`; knows_calls: messages' `tool_calls`; knows_results: the role `tool`
    knows_developer     it names the role `developer`
    asks_for_none       it asks whether a content is none: a message with calls alone gets None for one
    takes_parts         it writes contents only when they are lists of parts
    """

    reads: frozenset[str]
    knows_tools: bool
    knows_calls: bool
    knows_results: bool
    knows_developer: bool
    asks_for_none: bool
    takes_parts: bool


def facts_of(template: Template, source: str, variables: Mapping[str, str]) -> TemplateFacts:
    """The facts of a compiled template. Never raises over what the template does: the client of a request that it
    refuses is told.
    """
    tree = template.environment.parse(source)
    words = {node.attr for node in tree.find_all(nodes.Getattr)}
    words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    reads = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")
    loops = any(
        any(map(_is_content, (loop.iter, *loop.iter.find_all(nodes.Expr)))) for loop in tree.find_all(nodes.For)
    )
    return TemplateFacts(
        reads=reads,
        knows_tools="tools" in reads,
        knows_calls="tool_calls" in words,
        knows_results="tool" in words,
        knows_developer="developer" in words,
        asks_for_none=any(t.name == "none" and _is_content(t.node) for t in tree.find_all(nodes.Test)),
        takes_parts=loops and _takes_parts(template, variables),
    )


def in_parts(text: object) -> list[dict[str, object]]:
    """A content as the list of its one part, for templates that walk over parts."""
    return [{"type": "text", "text": text}]


def _is_content(node: nodes.Node) -> bool:
    match node:
        case nodes.Getattr():
            return node.attr == _CONTENT
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == _CONTENT
        case nodes.Name():
            return node.name == _CONTENT
    return False


def _takes_parts(template: Template, variables: Mapping[str, str]) -> bool:
    """A template that walks over contents may take texts too: it takes parts where parts alone arrive."""
    return _writes(template, variables, in_parts(_WORD)) and not _writes(template, variables, _WORD)


def _writes(template: Template, variables: Mapping[str, str], content: object) -> bool:
    turns = [{"role": "user", "content": content}]
    try:
        return _WORD in render(template, template_data(turns, variables), Budget(0, time.thread_time))
    except (*REFUSALS, TooMuch):
        return False
