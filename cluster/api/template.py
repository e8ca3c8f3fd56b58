"""A model's chat template in a sandbox: no way to Python's inner attributes, bounds on the text and on the time.

Templates come with the model and never from a request; what a request brings is data. Before a cluster starts,
models/trial.py runs one in a process that can be ended; here it runs in the router.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diptych.protos.errors import StartupError

MAX_TEMPLATE_CHARS = 256 << 10
MAX_GROWTH_CHARS = 1 << 20  # text that a template may add to the data
MAX_RENDER_S = 0.25
MAX_INDENT = 16
MAX_JSON_PIECES = 1 << 16  # indented JSON is written by Python, at about 2 million pieces a second
REFUSALS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)  # by a template
_INNER = re.compile(r"__[a-z_]+__")


class TooMuch(Exception):
    """A template writes more, or for longer, than it may."""


class Budget:
    """What the renderings of one conversation may take: `MAX_RENDER_S` together, and each twice the data's characters
    and `MAX_GROWTH_CHARS`. `clock` tells seconds; this thread's work, not the wait for a core, counts. A pass of the
    cycle collector through all that the process holds runs on the clock of whichever thread it meets: the time begins
    anew after one, once.
    """

    def __init__(self, data_chars: int, clock: Callable[[], float] = time.thread_time) -> None:
        self.most_chars = 2 * data_chars + MAX_GROWTH_CHARS
        self._clock = clock
        self._end = clock() + MAX_RENDER_S
        self._passes: int | None = _full_passes()

    def check(self) -> None:
        """Raises TooMuch when the time is over."""
        if self._clock() <= self._end:
            return
        if self._passes is None or self._passes == _full_passes():
            raise TooMuch
        self._passes = None
        self._end = self._clock() + MAX_RENDER_S


def _full_passes() -> int:
    return int(gc.get_stats()[-1]["collections"])


_budget: ContextVar[Budget | None] = ContextVar("_budget", default=None)


def _check_time() -> None:
    if (budget := _budget.get()) is not None:
        budget.check()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the operators that can make a huge text of a small template under watch. A loop over a client's
    data that writes nothing meets the clock where it reads a field or joins two texts.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _check_time()
            return left + right
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            if len(sequence) * times > MAX_GROWTH_CHARS:
                raise SecurityError("a repeated text is too long")
        if operator == "**" and (abs(left) > 1_000 or abs(right) > 64):
            raise SecurityError("a power is too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("text formatting by % is not allowed")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_time()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)


class _Generation(Extension):
    """`{% generation %}` marks what is trained on; here it is the text inside."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the parameters, in this order, that templates know from transformers."""
    if separators is not None and sum(map(len, separators)) > MAX_INDENT:
        raise SecurityError("JSON with separators of that length")
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    if not isinstance(indent, int) or not 0 <= indent <= MAX_INDENT:
        raise SecurityError(f"JSON is indented by 0 to {MAX_INDENT} spaces")
    budget = _budget.get() or Budget(0)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces, chars = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        chars += len(piece)
        if chars > budget.most_chars or len(pieces) > MAX_JSON_PIECES:
            raise TooMuch
    return "".join(pieces)


def compile_template(source: str) -> Template:
    """A chat template as transformers would read it. Raises StartupError on a broken or oversized one, and on one that
    names Python's inner attributes, wherever.
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise StartupError(f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
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


def template_data(
    turns: Sequence[Mapping[str, object]],
    variables: Mapping[str, object],
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    generation_prompt: bool = True,
) -> dict[str, object]:
    """The variables of a rendering, under the names that templates know from transformers."""
    given = {"messages": list(turns), "tools": list(tools) if tools else None, "documents": None}
    return {**variables, **given, "add_generation_prompt": generation_prompt}


def render(template: Template, data: Mapping[str, object], budget: Budget) -> str:
    """What the template writes of `data`, the variables it can read. Raises TooMuch, and whatever of REFUSALS the
    template raises.
    """
    room = budget.most_chars
    pieces = []
    before = _budget.set(budget)
    try:
        for piece in template.generate(data):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                raise TooMuch
            budget.check()
    except RecursionError:
        raise TooMuch from None
    finally:
        _budget.reset(before)
    return "".join(pieces)
