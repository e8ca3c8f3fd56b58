"""JSON read by a type, as JSON has it: `NaN` and `Infinity` are no values, where pydantic takes them for floats.

output.py, assembling.py and tool_schema.py validate by it. A type that says `allow_inf_nan=True` gets them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, from_json

T = TypeVar("T")
_MAYBE = re.compile(r"NaN|Infinity|[eE]\+?[0-9]{3}|[0-9]{309}")  # a float ends at 1.8e308


def validated(adapter: TypeAdapter[T], document: str, *, strict: bool | None = None, context: Any = None) -> T:
    """The value of `document`. Raises ValidationError, RecursionError, what validators raise."""
    found = adapter.validate_json(document, strict=strict, context=context)
    if _MAYBE.search(document) is not None and not _allows(adapter.core_schema):
        errors = [
            InitErrorDetails(type="finite_number", loc=steps, input=value)
            for steps, value in _not_finite(from_json(document))
        ]
        if errors:
            raise ValidationError.from_exception_data("JSON", errors, input_type="json")
    return found


def _not_finite(value: Any, *steps: str | int) -> Iterator[tuple[tuple[str | int, ...], float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield steps, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _not_finite(inner, *steps, name)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _not_finite(inner, *steps, at)


def _allows(schema: Any) -> bool:
    """Whether a part of pydantic's own schema says so, which is nobody's default."""
    if isinstance(schema, dict):
        return schema.get("allow_inf_nan") is True or any(map(_allows, schema.values()))
    return isinstance(schema, list | tuple) and any(map(_allows, schema))
