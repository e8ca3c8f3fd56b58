"""The words of JSON Schema: what each one's value must be, which ones assert and which ones only describe.

`check` reads the tables to refuse a schema, `rewrite` to know what reaches a grammar, `coverage` to print its page.
It knows no grammar and reads no schema.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Draft(Enum):
    """The drafts of JSON Schema that can be asked for by `$schema`; without it `DRAFT_2020_12` is meant."""

    DRAFT_4 = "draft-04"
    DRAFT_6 = "draft-06"
    DRAFT_7 = "draft-07"
    DRAFT_2019_09 = "draft/2019-09"
    DRAFT_2020_12 = "draft/2020-12"

    @property
    def ref_hides_siblings(self) -> bool:
        """Whether words beside a `$ref` mean nothing."""
        return self in (Draft.DRAFT_4, Draft.DRAFT_6, Draft.DRAFT_7)


TYPES: Final = ("null", "boolean", "integer", "number", "string", "array", "object")

COUNTS: Final = frozenset(
    ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"]
)
NUMBERS: Final = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
SCHEMAS: Final = frozenset(
    "additionalProperties additionalItems not if then else contains propertyNames unevaluatedProperties"
    " unevaluatedItems".split()
)
SCHEMA_LISTS: Final = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
SCHEMA_MAPS: Final = frozenset(["properties", "patternProperties", "dependentSchemas", "$defs", "definitions"])
STRINGS: Final = frozenset(["pattern", "format", "$ref", "$schema", "$id", "id", "$anchor"])
OTHER: Final = frozenset(
    ["type", "enum", "const", "required", "items", "uniqueItems", "dependencies", "dependentRequired"]
)

# What these three would do cannot be known before an instance is there; they occur in meta-schemas, hardly elsewhere.
DYNAMIC: Final = frozenset(["$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"])

KEYWORDS: Final = COUNTS | NUMBERS | SCHEMAS | SCHEMA_LISTS | SCHEMA_MAPS | STRINGS | OTHER | DYNAMIC

ANNOTATIONS: Final = frozenset(
    "title description default example examples deprecated readOnly writeOnly $comment $vocabulary contentEncoding"
    " contentMediaType contentSchema discriminator externalDocs xml".split()
)


def intended(word: str) -> str | None:
    """The keyword that an unknown word was probably meant to be: other case, `_` or `-`, or one letter wrong."""
    folded = word.replace("_", "").replace("-", "").casefold()
    for keyword in sorted(KEYWORDS - {"id"}):
        plain = keyword.lstrip("$").casefold()
        if folded == plain and word not in ANNOTATIONS:
            return keyword
        if min(len(folded), len(plain)) >= 5 and _one_edit_apart(folded, plain):
            return keyword
    return None


def _one_edit_apart(first: str, second: str) -> bool:
    """Whether one letter was left out, added, changed, or swapped with its neighbour."""
    if abs(len(first) - len(second)) > 1:
        return False
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    left, right = first[start:], second[start:]
    swapped = left[:2] == right[:2][::-1] and left[2:] == right[2:]
    return left[1:] == right[1:] or left == right[1:] or left[1:] == right or swapped
