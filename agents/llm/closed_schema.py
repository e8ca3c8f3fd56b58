"""JSON schemas of Python types that say all that Python will ask of a value; output.py and tool_schema.py use them.

Three things are more than pydantic says. Objects have no other members than the type's own, where pydantic would take
no notice of others: a model that may invent members does so until its tokens are used up. Keys of dicts are of their
type. Dates, times and addresses are those that Python takes: RFC 3339 has a year 0 and a 61st second, and not every URI
is an address with http. What pydantic would check only when it is read, behind everybody's back, has no schema.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import SchemaError

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import core_schema

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = f"^{_YEAR}-"
_TIME = "^[0-9]{2}:[0-9]{2}:[0-5]"
_DATE_TIME = f"^{_YEAR}-[0-9-]+[Tt][0-9]{{2}}:[0-9]{{2}}:[0-5]"
_DURATION = "^P(?:T?[0-9]{1,5}[YMWDHS])+$"  # of more digits than these timedelta has no days
# Keys of objects are texts in JSON: of those that Python makes numbers, days or ids of, which.
_INT = "(?:0|[1-9][0-9]{0,17})"
_DAY = (
    f"{_YEAR}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    "|[0-9]{2}(?:0[48]|[2468][048]|[13579][26])-02-29"
)
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_KEYS = {"date": f"^(?:{_DAY})$", "uuid": f"^{_UUID}$", "number": f"^-?{_INT}(?:[.][0-9]{{1,17}})?$"}


class ClosedJsonSchema(GenerateJsonSchema):
    """For `schema_generator` of pydantic's functions."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Of a BaseModel."""
        return _closed(super().model_schema(schema))

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        """Of a TypedDict."""
        return _closed(super().typed_dict_schema(schema))

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Of a dataclass."""
        return _closed(super().dataclass_schema(schema))

    def generator_schema(self, schema: core_schema.GeneratorSchema) -> JsonSchemaValue:
        """Of an Iterable or Iterator: none. Raises PydanticInvalidForJsonSchema."""
        raise PydanticInvalidForJsonSchema("items of an Iterable are checked only when they are read: write list[...]")

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """Of a dict, keys included. Raises PydanticInvalidForJsonSchema for keys that no text is."""
        found = super().dict_schema(schema)
        if "keys_schema" not in schema:
            return found
        names = self.resolve_ref_schema(self.generate_inner(schema["keys_schema"]))
        kind, form = names.get("type"), names.get("format")
        words = [names["const"]] if "const" in names else names.get("enum", ())
        if (words and not any(isinstance(word, str) for word in words)) or kind in ("array", "object", "null"):
            raise PydanticInvalidForJsonSchema("keys of a JSON object are texts: write dict[str, ...], or a list")
        if kind == "integer":
            is_positive = max(names.get("minimum", -1), names.get("exclusiveMinimum", -1)) >= 0
            found["propertyNames"] = {"pattern": f"^{'' if is_positive else '-?'}{_INT}$"}
        elif kind == "boolean":
            found["propertyNames"] = {"enum": ["true", "false"]}
        elif pattern := _KEYS.get(str(form if kind == "string" else kind)):
            rules = found.pop("patternProperties", None)
            if rules is not None:
                found["additionalProperties"] = next(iter(rules.values()))
            found["propertyNames"] = {"pattern": pattern}
        if "patternProperties" in found:
            found.setdefault("additionalProperties", False)
        return found

    def date_schema(self, schema: core_schema.DateSchema) -> JsonSchemaValue:
        """Of a date: years 1 to 9999."""
        return super().date_schema(schema) | {"pattern": _DATE}

    def datetime_schema(self, schema: core_schema.DatetimeSchema) -> JsonSchemaValue:
        """Of a date with a time: seconds to 59."""
        return super().datetime_schema(schema) | {"pattern": _DATE_TIME}

    def time_schema(self, schema: core_schema.TimeSchema) -> JsonSchemaValue:
        """Of a time of a day: seconds to 59."""
        return super().time_schema(schema) | {"pattern": _TIME}

    def timedelta_schema(self, schema: core_schema.TimedeltaSchema) -> JsonSchemaValue:
        """Of a duration, in ISO 8601's words: numbers of at most five digits."""
        found = super().timedelta_schema(schema)
        return found | {"pattern": _DURATION} if found.get("format") == "duration" else found

    def url_schema(self, schema: core_schema.UrlSchema) -> JsonSchemaValue:
        """Of an address: its schemes, and a host where these have one."""
        found = super().url_schema(schema)
        schemes = schema.get("allowed_schemes")
        if schemes:
            words = "|".join(sorted(re.escape(scheme) for scheme in schemes))
            found = found | {"pattern": f"^(?:{words})://[A-Za-z0-9]"}
        return found


def fault_of(error: Exception) -> str:
    """Why pydantic can make nothing of a type, in one line; of a pattern that its engine does not read, the remedy."""
    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, SchemaError) and "regex parse error" in str(error):
        why = lines[-1].removeprefix("error: ")
        return (
            f"its pattern cannot be read: {why}; give it compiled, Field(pattern=re.compile(...)), for Python's own re"
        )
    return lines[0].rstrip(".")


def _closed(found: JsonSchemaValue) -> JsonSchemaValue:
    if found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found
