"""A model's chat template in a sandbox: no way to Python's inner attributes, bounds on the text and on the time.

Templates come with the model and never from a request. Before a cluster starts, models/trial.py runs one in a process
that can be ended; here it runs in the router.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.protos.errors import StartupError

MAX_TEMPLATE_CHARS = 256 << 10
MAX_GROWTH_CHARS = 1 << 20  # text that a template may add to the messages
MAX_RENDER_S = 0.25
_INNER = re.compile(r"__[a-z_]+__")


class TooMuch(Exception):
    """A template writes more, or for longer, than it may."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the operators that can make a huge text of a small template under watch."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            if len(sequence) * times > MAX_GROWTH_CHARS:
                raise SecurityError("a repeated text is too long")
        if operator == "**" and (abs(left) > 1_000 or abs(right) > 64):
            raise SecurityError("a power is too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text formatting by % is not allowed")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def compile_template(source: str) -> Template:
    """A chat template as transformers would read it. Raises StartupError on a broken or oversized one, and on one that
    names Python's inner attributes, wherever.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise StartupError(f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    for filter_name in ("center", "indent", "format", "xmlattr", "urlize"):  # pad or format without a bound
        environment.filters.pop(filter_name, None)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    for global_name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(global_name, None)
    try:
        if found := _inner_name(environment.parse(source)):
            raise StartupError(f"the chat template reaches for {found}, an inner attribute of Python, and is not run")
        return environment.from_string(source)
    except TemplateError as exc:
        raise StartupError(f"the chat template is broken: {exc}") from exc
    except (RecursionError, MemoryError, SyntaxError) as exc:
        raise StartupError(f"the chat template is broken: {type(exc).__name__} while it was read") from exc


def _inner_name(tree: nodes.Node) -> str:
    """The first of Python's inner names in a template; no template needs one, and each way out of a sandbox does."""
    for node in tree.find_all((nodes.Getattr, nodes.Const, nodes.Name)):
        name = getattr(node, "attr", None) or getattr(node, "value", None) or getattr(node, "name", None)
        if isinstance(name, str) and _INNER.fullmatch(name):
            return name
    return ""


def render(
    template: Template,
    turns: Sequence[Mapping[str, str]],
    variables: Mapping[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """A conversation as the template writes it, ready for the assistant's turn. Raises TooMuch, and whatever the
    template raises.
    """
    room = sum(len(turn["content"]) for turn in turns) * 2 + MAX_GROWTH_CHARS
    end = clock() + MAX_RENDER_S
    pieces = []
    for piece in template.generate(messages=list(turns), add_generation_prompt=True, **variables):
        pieces.append(piece)
        room -= len(piece)
        if room < 0 or clock() > end:
            raise TooMuch
    return "".join(pieces)
