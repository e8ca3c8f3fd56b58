"""The form that a request wants its answer to have: OpenAI's `response_format`, vLLM's `guided_*` and
`structured_outputs`.

`read_form` is called by openai.py for both endpoints. Whether a schema, a pattern or a grammar can be obeyed is found
out where grammars are made; here it is known that there is at most one, of the right type and of a bearable size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .errors import InvalidRequest
from .openai_tools import MAX_SCHEMA_BYTES
from .strict_json import parse_inner
from .wire_checks import JsonObject, a_flag, a_list, a_name, a_text, an_object, compact, may_fit, refuse

MAX_CHOICE_ENTRIES = 4096
FORM_FIELDS = frozenset(
    {"response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"}
)
Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
ANY_OBJECT = '{"type":"object"}'
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")  # told to the model alone; clients send class names such as Page[User]
_NAME_WORDS = "1 to 64 characters of one line"
_STRUCTURED = frozenset({"json", "regex", "choice", "grammar", "json_object"})
# Settings of vLLM's backends, at values that change nothing.
_OFF: dict[str, tuple[object, ...]] = {
    "backend": (None, "auto"),
    "disable_additional_properties": (None, False),
    "disable_any_whitespace": (None, False),
    "disable_fallback": (None, False),
    "structural_tag": (None,),
    "whitespace_pattern": (None,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputForm:
    """What the text of an answer must look like.

    kind        value
    json_schema the schema as compact JSON, keys in the client's order
    json_object the schema of any object
    regex       a pattern for the whole text
    choice      the texts, of which one is the answer
    grammar     a context-free grammar, as given

    `path` is the field that asked for it. `name` and `description` are a json_schema's, told to the model; `strict` is
    its, too, as it was said: the schema is enforced whatever it says, but bytes that are passed on tell a provider.
    """

    kind: Kind
    value: str | tuple[str, ...]
    path: str
    name: str | None = None
    description: str | None = None
    strict: bool | None = field(default=None, compare=False)

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON by a schema."""
        return self.kind in ("json_schema", "json_object")

    @property
    def is_guided(self) -> bool:
        """Whether it was asked for in vLLM's way, which means the whole answer, and not in OpenAI's."""
        return self.path.startswith(("guided_", "structured_outputs"))

    @property
    def schema(self) -> JsonObject | None:
        """The JSON schema, parsed anew; None where the form has none."""
        if not self.is_json:
            return None
        assert isinstance(self.value, str)
        parsed: JsonObject = json.loads(self.value)
        return parsed


def read_form(fields: Mapping[str, object]) -> OutputForm | None:
    """The form in a body's FORM_FIELDS, in which one that was read before may stand as the response_format; None where
    there is none. Raises InvalidRequest naming the path, and where there are two, both.
    """
    if not fields:
        return None
    found = [_response_format(fields.get("response_format"))]
    for kind in ("json", "regex", "choice", "grammar"):
        found.append(_form(kind, fields.get(f"guided_{kind}"), f"guided_{kind}"))
    found += _structured_outputs(fields.get("structured_outputs"))
    forms = [form for form in found if form is not None]
    if len(forms) > 1:
        first, second = forms[0].path, forms[1].path
        raise InvalidRequest(f"{first} and {second} each give the answer a form: send one of them", second)
    return forms[0] if forms else None


def _response_format(value: object) -> OutputForm | None:
    path = "response_format"
    if value is None or isinstance(value, OutputForm):
        return value
    if not isinstance(value, dict):
        raise refuse(path, "must be an object with a type: text, json_object or json_schema")
    kind = value.get("type")
    if kind == "text":
        an_object(value, path, {"type"})
        return None
    if kind == "json_object":
        an_object(value, path, {"type"})
        return OutputForm(kind="json_object", value=ANY_OBJECT, path=path)
    if kind != "json_schema":
        words = "is missing" if kind is None else "must be text, json_object or json_schema"
        raise refuse(f"{path}.type", words)
    inner = f"{path}.json_schema"
    an_object(value, path, {"type", "json_schema"})
    if "json_schema" not in value:
        raise refuse(inner, "is missing: name and schema stand in it")
    asked = an_object(value["json_schema"], inner, {"name", "description", "schema", "strict"})
    return named_schema(asked, inner)


def named_schema(asked: JsonObject, path: str) -> OutputForm:
    """The form in an object with name, description, schema and strict, whose other fields the caller has refused.
    Raises InvalidRequest.
    """
    strict = a_flag(asked.get("strict"), f"{path}.strict")
    if asked.get("schema") is None:
        raise refuse(f"{path}.schema", 'is missing; {"type": "json_object"} asks for any object')
    description = asked.get("description")
    return OutputForm(
        kind="json_schema",
        value=_schema(asked["schema"], f"{path}.schema"),
        path=f"{path}.schema",
        name=a_name(asked.get("name"), f"{path}.name", _NAME, _NAME_WORDS),
        description=None if description is None else a_text(description, f"{path}.description", most=4096, least=0),
        strict=strict,
    )


def _structured_outputs(value: object) -> list[OutputForm | None]:
    path = "structured_outputs"
    if value is None:
        return []
    asked = an_object(value, path, _STRUCTURED | _OFF.keys())
    for name, defaults in _OFF.items():
        if not any(asked.get(name) is default or asked.get(name) == "auto" == default for default in defaults):
            raise refuse(f"{path}.{name}", "is a setting of another server's backend: leave it out")
    forms = [_form(kind, asked.get(kind), f"{path}.{kind}") for kind in ("json", "regex", "choice", "grammar")]
    if a_flag(asked.get("json_object"), f"{path}.json_object"):
        forms.append(OutputForm(kind="json_object", value=ANY_OBJECT, path=f"{path}.json_object"))
    if not any(forms):
        raise refuse(path, "asks for nothing: give it json, regex, choice, grammar or json_object")
    return forms


def _form(kind: str, value: object, path: str) -> OutputForm | None:
    if value is None:
        return None
    match kind:
        case "json":
            return OutputForm(kind="json_schema", value=_schema(value, path), path=path)
        case "regex":
            return OutputForm(kind="regex", value=_bounded(a_text(value, path), path), path=path)
        case "grammar":
            return OutputForm(kind="grammar", value=_bounded(a_text(value, path), path), path=path)
    return OutputForm(kind="choice", value=_choices(value, path), path=path)


def _choices(value: object, path: str) -> tuple[str, ...]:
    texts = a_list(value, path, most=MAX_CHOICE_ENTRIES, what="strings")
    places: dict[str, int] = {}
    for i, text in enumerate(texts):
        a_text(text, f"{path}[{i}]")
        if text in places:
            raise refuse(f"{path}[{i}]", f"is the same as {path}[{places[text]}]")
        places[text] = i
    _bounded("".join(places), path)
    return tuple(places)


def _schema(value: object, path: str) -> str:
    """As an object, or as the JSON of one, which is how vLLM's clients send it."""
    if isinstance(value, str):
        value = parse_inner(_bounded(value, path), path)[0]
    if not may_fit(an_object(value, path), MAX_SCHEMA_BYTES):
        raise _too_long(path)
    return _bounded(compact(value), path)


def _bounded(text: str, path: str) -> str:
    if len(text) > MAX_SCHEMA_BYTES or len(text.encode()) > MAX_SCHEMA_BYTES:
        raise _too_long(path)
    return text


def _too_long(path: str) -> InvalidRequest:
    return refuse(path, f"has more than {MAX_SCHEMA_BYTES} bytes")
