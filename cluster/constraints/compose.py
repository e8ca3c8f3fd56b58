"""One constraint of all that a request wants of its answer: a form, tools, or both.

The API calls `compose` with the values of `protos.openai_output` and `protos.openai_tools` and the model's format of
calls. Engines compile what comes out; that they can is tried here first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from diptych.cluster.constraints import lark, trial
from diptych.cluster.constraints.check import compact
from diptych.cluster.constraints.kept import Newest, key_of
from diptych.cluster.constraints.paths import joined
from diptych.cluster.constraints.rewrite import Note
from diptych.cluster.constraints.schema import Judged, judge
from diptych.cluster.constraints.tool_calls import Calls, Offered
from diptych.cluster.formats import calls as written
from diptych.cluster.formats.format import ToolFormat
from diptych.protos.constraint import MAX_GRAMMAR_BYTES, Backend, Constraint
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_tools import ToolUse

_NO_IDS: Final[Mapping[str, int]] = {}


@dataclass(frozen=True, slots=True)
class Composed:
    """A constraint, and what of the request it does not enforce. Paths are those of the request."""

    constraint: Constraint
    notes: tuple[Note, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def coverage(self) -> str:
        """`full` where the grammar says all that the schemas say, else `partial`."""
        return "partial" if self.notes else "full"


def compose(
    form: OutputForm | None,
    tools: ToolUse | None,
    format: ToolFormat | None,
    *,
    token_ids: Mapping[str, int] = _NO_IDS,
) -> Composed | None:
    """What the answer must match; None where it may be any text.

    `format`: how the model writes calls; where that is not known, tools put no constraint on an answer.
    `token_ids`: the format's markers that are one token in the model's vocabulary. With tools to choose from freely, a
    JSON form of OpenAI's holds for answers that call none; a form of vLLM's is the whole answer, and no call is made.
    Raises InvalidRequest naming the field, and the place in it.
    """
    offers = tools is not None and tools.mode != "none" and not (form is not None and form.is_guided)
    if tools is None or not offers:
        return None if form is None else _from_cache(_key(form, None, None, _NO_IDS), lambda: _formed(form))
    if format is None:
        if tools.mode == "required":
            field = "function_call" if tools.is_legacy else "tool_choice"
            told = "it is not known how this model writes calls, so none can be required of it; say auto"
            raise InvalidRequest(f"{field}: {told}", field)
        return None if form is None else _from_cache(_key(form, None, None, _NO_IDS), lambda: _formed(form))
    ids = {mark: token_ids[mark] for mark in sorted(format.markers) if mark in token_ids}
    return _from_cache(_key(form, tools, format, ids), lambda: _with_tools(form, tools, format, ids))


@cache
def any_text() -> Constraint:
    """Of an answer that may be any text, for engines that watch its reasoning."""
    return Constraint(grammar=trial.regex_grammar("(?s:.*)"))


_COMPOSED: Final = Newest[Composed](max_count=1024, max_bytes=32 << 20)


def _from_cache(key: bytes, make: Callable[[], Composed]) -> Composed:
    found = _COMPOSED.get(key)
    if found is None:
        found = make()
        _COMPOSED.put(key, found, 2 * len(found.constraint.grammar) + 300 * (len(found.notes) + len(found.ignored) + 2))
    return found


def _key(form: OutputForm | None, tools: ToolUse | None, format: ToolFormat | None, ids: Mapping[str, int]) -> bytes:
    texts = [repr((form.kind, form.path, form.value)) if form else "", format.name if format else "", repr(ids)]
    if tools is not None:
        texts += [repr((tools.mode, tools.names, tools.most_calls, tools.is_legacy))]
        texts += [part for tool in tools.tools for part in (tool.path, tool.name, compact(tool.parameters))]
    return key_of(*texts)


def _formed(form: OutputForm) -> Composed:
    if form.is_json:
        return _json(form)
    if isinstance(form.value, tuple):
        pattern = "|".join(lark.regex_escaped(text) for text in form.value)
        return _tried(trial.regex_grammar(f"(?:{pattern})"), form.path)
    checked = lark.checked if form.kind == "grammar" else lark.checked_regex
    return _tried(checked(form.value, form.path), form.path)


def _json(form: OutputForm) -> Composed:
    where = _schema_path(form)
    judged = judge(form.schema, where)
    notes, ignored = _of_request(judged, where)
    if judged.backend == "xgrammar":
        return Composed(Constraint(grammar=compact(judged.schema), backend=Backend.XGRAMMAR), notes, ignored)
    return Composed(Constraint(grammar=trial.json_grammar(judged.schema)), notes, ignored)


def _with_tools(form: OutputForm | None, tools: ToolUse, format: ToolFormat, ids: Mapping[str, int]) -> Composed:
    notes: list[Note] = []
    ignored: list[str] = []
    offered = []
    group, inner = ("functions", "") if tools.is_legacy else ("tools", ".function")
    for number, tool in enumerate(tools.tools):
        if tool.name not in tools.names:
            continue
        path = tool.path or f"{group}[{number}]{inner}"
        try:
            written.prefix(format, tool.name)
        except ValueError as error:
            raise InvalidRequest(f"{path}.name: {error}", f"{path}.name") from error
        schema = _followed(tool.parameters, f"{path}.{tool.schema_field}", notes, ignored)
        offered.append(Offered(name=tool.name, schema=schema))
    answer: object = None
    if form is not None and form.is_json and tools.mode == "auto":
        answer = _followed(form.schema, _schema_path(form), notes, ignored)

    def grammar(known: Mapping[str, int]) -> str:
        made = Calls(format=format, tools=offered, parallel=tools.most_calls is None, token_ids=known)
        if tools.mode == "required":
            return made.required()
        return made.optional() if answer is None else made.optional_or_json(answer)

    text = grammar(ids)
    # Tokens of the model are unknown to the trial: there it reads the markers as text.
    return _tried(text, group, grammar(_NO_IDS) if ids else text, tuple(notes), tuple(ignored))


def _followed(schema: object, where: str, notes: list[Note], ignored: list[str]) -> object:
    """The schema in the form that can stand among others; what it says more goes to `notes`."""
    judged = judge(schema, where)
    told, passed = _of_request(judged, where)
    notes += told
    ignored += passed
    if judged.backend == "llguidance":
        return judged.schema
    notes.append(Note("", where, "is too involved to be followed together with tools: checked after the answer"))
    kind = schema.get("type") if isinstance(schema, dict) else None
    return {"type": kind} if kind is not None else True


def _of_request(judged: Judged, where: str) -> tuple[tuple[Note, ...], tuple[str, ...]]:
    notes = tuple(Note(note.keyword, joined(where, note.path), note.why) for note in judged.notes)
    return notes, tuple(joined(where, path) for path in judged.ignored)


def _schema_path(form: OutputForm) -> str:
    inner = form.path.startswith("response_format") and form.kind == "json_schema"
    return "response_format.json_schema.schema" if inner else form.path


def _tried(
    grammar: str, where: str, readable: str | None = None, notes: tuple[Note, ...] = (), ignored: tuple[str, ...] = ()
) -> Composed:
    size = len(grammar.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{where}: makes a grammar of {size} bytes; the limit is {MAX_GRAMMAR_BYTES}", where)
    refusal = trial.refusal(readable or grammar)
    if refusal is not None:
        told = " ".join(refusal.split("\n", 1)[0].split())
        raise InvalidRequest(f"{where}: too large or too involved together ({told[:200]})", where)
    return Composed(Constraint(grammar=grammar), notes, ignored)
