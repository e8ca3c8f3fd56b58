"""The OpenAPI document of everything that is declared here. Built once per process, when it is first asked for."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType

import diptych.cluster.api.listener  # noqa: F401  its errors are answers too
from diptych.cluster.api.access import TENANT_HEADER
from diptych.protos.errors import DiptychError

from . import (
    answers,
    anthropic,
    anthropic_requests,
    chat,
    files,
    generation,
    pages,
    response_requests,
    responses,
    routing,
    sampling,
    texts,
    usage,
)
from .answers import ERROR_BODY
from .shapes import REF, Field, JsonObject, Operation, Reply, Shape, text

MODULES: tuple[ModuleType, ...] = (
    sampling,
    chat,
    answers,
    generation,
    anthropic_requests,
    anthropic,
    response_requests,
    responses,
    texts,
    files,
    routing,
    usage,
    pages,
)
_TITLE = "Diptych"
_ABOUT = (
    "The HTTP API of a Diptych router. Requests are read strictly: a field that is not described here is an error that "
    "names it, null means that a field is left out, and whole numbers are written without a fraction."
)
_EVERYWHERE = frozenset({400, 408, 431, 500, 503})  # the listener's own: malformed, too slow, too large, too many
_KEYED = frozenset({401, 403, 429})
_WORDS = {
    400: "the request is wrong",
    401: "no key, or none that opens anything here",
    403: "the key, or the page that a browser shows, does not open this",
    404: "there is nothing of that name",
    408: "the request did not arrive in time",
    409: "the state does not allow it now",
    413: "the body is too large",
    415: "the body is of a type that is not read",
    422: "the request cannot be worked on",
    429: "too much was asked; retry-after tells when to come back",
    431: "the head is too large",
    499: "the request was cancelled",
    500: "something failed here",
    502: "a provider behind a route failed, or refused what the server is set up with",
    503: "there is no room or no engine now; retry-after tells when to come back",
    504: "a deadline passed",
    529: "there is no room or no engine now; retry-after tells when to come back",
    507: "there is no space left",
}
_TENANT = Field(name=TENANT_HEADER, schema=generation.SESSION.schema, words="whose request it is; a key says it itself")
_ERROR_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    502: {"x-should-retry": "false: it stays so until the operator has done something"},
    504: {"x-should-retry": "false: who sends it again spends its time again"},
    **{
        status: {
            "retry-after": "seconds",
            "retry-after-ms": "milliseconds",
            "x-should-retry": "false: a client need not wait for it, or not before the operator has done something",
        }
        for status in (409, 429, 503, 529)
    },
}


@functools.cache
def operations() -> tuple[Operation, ...]:
    """All of them, in the order of the modules."""
    found: list[Operation] = []
    for module in MODULES:
        found += getattr(module, "OPERATIONS", ())
    return tuple(found)


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """All that are declared, by name."""
    found: dict[str, Shape] = {}
    for module in MODULES:
        for value in vars(module).values():
            for shape in _shapes_in(value):
                assert found.setdefault(shape.name, shape) == shape, f"two shapes are called {shape.name}"
    return found


def _shapes_in(value: object) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
        yield from value.one_of
    elif isinstance(value, Operation) and value.body is not None:
        yield from _shapes_in(value.body)
    elif isinstance(value, tuple):
        for one in value:
            yield from _shapes_in(one)


def error_codes() -> dict[int, tuple[str, ...]]:
    """The codes that an error's body may name, by status; of the errors that are loaded."""
    found: dict[int, set[str]] = {}
    left: list[type[DiptychError]] = [DiptychError]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.code not in ("startup_failed",):
            found.setdefault(kind.http_status, set()).add(kind.code)
    return {status: tuple(sorted(codes)) for status, codes in sorted(found.items())}


def document(*, has_keys: bool, wanted: Iterable[Operation] | None = None) -> JsonObject:
    """The document; `has_keys`: whether this server asks for them."""
    chosen = operations() if wanted is None else tuple(wanted)
    paths: JsonObject = {}
    for operation in chosen:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, has_keys=has_keys)
    found: JsonObject = {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": importlib.metadata.version("diptych"), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in chosen)],
        "paths": paths,
        "components": {},
    }
    found["components"]["schemas"] = _referenced(found)
    if has_keys:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"header": []}]
    return found


def _referenced(document: JsonObject) -> JsonObject:
    known = shapes()
    found: JsonObject = {}
    left = _names(document)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = known[name].schema()
            left |= _names(found[name])
    return dict(sorted(found.items()))


def _names(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"].removeprefix(REF)} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_names(inner) for inner in value.values()))
    return set().union(*(_names(inner) for inner in value)) if isinstance(value, list) else set()


def _operation(operation: Operation, *, has_keys: bool) -> JsonObject:
    found: JsonObject = {"operationId": operation.id, "tags": [operation.tag], "summary": operation.words}
    parameters = [_parameter(one, "path") for one in operation.path_fields]
    parameters += [_parameter(one, "query") for one in operation.query]
    parameters += [_parameter(one, "header") for one in operation.headers]
    if operation.scope and not has_keys:
        parameters.append(_parameter(_TENANT, "header"))
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {operation.body_media: {"schema": operation.body.ref}}}
    replies = {str(reply.status): _reply(reply, operation) for reply in operation.replies}
    is_open = not operation.scope or not has_keys
    for status in sorted(operation.errors | _EVERYWHERE | (frozenset() if is_open else _KEYED)):
        if (told := _error(status, operation)) and str(status) in replies:
            reply = replies[str(status)]
            reply["content"] = _both(reply["content"], told["content"])
        else:
            replies[str(status)] = told
    found["responses"] = replies
    if has_keys and not operation.scope:
        found["security"] = []
    elif has_keys:
        found["x-scope"] = operation.scope
    return found


def _both(one: JsonObject, other: JsonObject) -> JsonObject:
    """An answer and an error of one status."""
    found = dict(one)
    for media, content in other.items():
        found[media] = {"schema": {"anyOf": [found[media]["schema"], content["schema"]]}} if media in found else content
    return found


def _parameter(one: Field, place: str) -> JsonObject:
    words = f"{one.words}. Default: {one.default}" if one.default else one.words
    found: JsonObject = {"name": one.name, "in": place, "description": words, "schema": one.schema}
    if one.is_required:
        found["required"] = True
    if one.schema.get("type") == "object":
        found |= {"style": "deepObject", "explode": True}
    return found


def _reply(reply: Reply, operation: Operation) -> JsonObject:
    found: JsonObject = {"description": reply.words}
    if reply.headers:
        found["headers"] = {name: {"description": words, "schema": text()} for name, words in reply.headers.items()}
    content: JsonObject = {}
    for media, schema in reply.media.items():
        is_stream = media == "text/event-stream" and operation.events is not None
        content[media] = {"schema": _event(operation) if is_stream else schema}
    if content:
        found["content"] = content
    if reply.links:
        found["links"] = reply.links
    return found


def _event(operation: Operation) -> JsonObject:
    """Of each event of a stream: its data, by what the data holds."""
    told = {"type": "string", "contentMediaType": "application/json", "contentSchema": operation.events}
    names = {"type": "string", "description": "the type, as the data has it"}
    event: JsonObject = {"type": "object", "required": ["data"], "properties": {"event": names, "data": told}}
    if not operation.last_event:
        return event
    last = {"type": "object", "required": ["data"], "properties": {"data": {"const": operation.last_event}}}
    return {"anyOf": [event, last]}


def _error(status: int, operation: Operation) -> JsonObject:
    codes = ", ".join(error_codes().get(status, ()))
    words = _WORDS[status]
    if status == 400 and not operation.errors & {400}:
        words = "the head of the request is malformed"
    schema = ERROR_BODY.ref if operation.error_schema is None else operation.error_schema
    found: JsonObject = {"description": f"{words} ({codes})" if codes else words}
    if (headers := _ERROR_HEADERS.get(status)) is not None:
        found["headers"] = {name: {"description": told, "schema": text()} for name, told in headers.items()}
    found["content"] = {"application/json": {"schema": schema}}
    return found


def encoded(*, has_keys: bool) -> bytes:
    """The document as JSON."""
    return json.dumps(document(has_keys=has_keys), ensure_ascii=False, separators=(",", ":")).encode()
