"""`make docs`: write docs/configuration.md from the classes behind `diptych.yaml`. tests/docs compares the two."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diptych.cluster.config import DiptychConfig, default_cache_dir, default_data_dir, default_run_dir

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration reference

Every key of `diptych.yaml`, with its default. Made by `make docs` from the classes in `cluster/config.py` and
`protos/settings.py`; do not edit. How files, `--set` and `--model` come together is told in
[concepts/configuration.md](concepts/configuration.md).

`NAME` stands for a name that you choose. An unknown key is an error that names it and the nearest known one.
"""
NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
PLACES = {
    str(default_cache_dir()): "~/.cache/diptych",
    str(default_data_dir()): "~/.local/share/diptych",
    str(default_run_dir()): "/tmp/diptych-UID",
}
BOUNDS = (
    ("ge", "at least "),
    ("gt", "above "),
    ("le", "at most "),
    ("lt", "below "),
    ("min_length", "length at least "),
)


@dataclass(frozen=True, slots=True)
class Key:
    """A row of the page."""

    path: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Group:
    """A table of the page: the keys that are values, below one path."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


def groups(cls: type[BaseModel] = DiptychConfig, path: str = "") -> Iterator[Group]:
    """The tree in the order of the classes, a group before the groups in it."""
    keys, inner = [], []
    for name, field in cls.model_fields.items():
        below = f"{path}.{name}" if path else name
        plain, optional = _without_none(field.annotation)
        named = get_origin(plain) is dict
        if get_origin(plain) is tuple:
            default = "required" if field.is_required() else "[]"
            keys.append(Key(below, _list(plain), default, field.description or ""))
            continue
        settings = get_args(plain)[1] if named else plain
        if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
            keys.append(Key(below, _kind(field.annotation, field), _default(field), field.description or ""))
        elif optional:
            inside = ", ".join(f"`{key}`" for key in settings.model_fields)
            keys.append(Key(below, f"group of {inside}, or null", "null", field.description or ""))
        else:
            inner.append((settings, f"{below}.NAME" if named else below))
    yield Group(path, (cls.__doc__ or "").split("\n")[0], tuple(keys))
    for settings, below in inner:
        yield from groups(settings, below)


def render() -> str:
    """The page."""
    lines = [HEAD]
    for group in groups():
        if not group.keys:
            continue
        lines += [
            f"## {group.path or 'top level'}",
            "",
            group.meaning,
            "",
            "| key | value | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [f"| `{key.path}` | {key.kind} | `{key.default}` | {key.meaning} |" for key in group.keys]
        lines.append("")
    return "\n".join(lines)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """The annotation without `| None`, and whether it had that."""
    if get_origin(annotation) in {Union, types.UnionType}:
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(rest) < len(get_args(annotation)):
            return rest[0], True
    return annotation, False


def _kind(annotation: Any, field: FieldInfo) -> str:
    plain, optional = _without_none(annotation)
    words = _words(plain)
    limits = [
        f"{text}{getattr(bound, name)}"
        for bound in field.metadata
        for name, text in BOUNDS
        if getattr(bound, name, None) is not None
    ]
    return ", ".join([words, *limits]) + (", or null" if optional else "")


def _words(plain: Any) -> str:
    origin, inner = get_origin(plain), get_args(plain)
    if origin is Annotated:
        return _words(inner[0])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in {Union, types.UnionType}:
        return " or ".join(_words(one) for one in inner)
    if origin is dict:
        return "texts by name" if inner[1] is str else "values by name"
    return NAMES[plain]


def _list(annotation: Any) -> str:
    """A key whose value is a list of groups, or of texts."""
    if get_args(annotation)[0] is str:
        return "list of texts"
    return "list of " + ", ".join(f"`{key}`" for key in get_args(annotation)[0].model_fields)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return PLACES.get(str(value), str(value))


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"written: {PAGE}")
