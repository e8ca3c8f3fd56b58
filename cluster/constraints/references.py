"""Where a `$ref` leads inside of one document: pointers, `$anchor`, and `$id` of the document and its parts.

`check` refuses what leads nowhere, `rewrite` gives each target a name. Never fetches anything: a reference to another
document leads nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urldefrag, urljoin

from diptych.cluster.constraints.keywords import SCHEMA_LISTS, SCHEMA_MAPS, SCHEMAS
from diptych.cluster.constraints.paths import step

_ROOT: Final = "http://document.invalid/"


def parts(schema: dict[str, object]) -> Iterator[tuple[str, str | int | None, object]]:
    """The schemas directly inside of a schema: keyword, name or index (None for a single one), and the schema."""
    for word, value in schema.items():
        if word in SCHEMAS:
            yield word, None, value
        elif word in SCHEMA_MAPS or word == "dependencies":
            for name, part in value.items() if isinstance(value, dict) else ():
                if not (word == "dependencies" and isinstance(part, list)):
                    yield word, name, part
        elif word in SCHEMA_LISTS or word == "items":
            if isinstance(value, list):
                for index, part in enumerate(value):
                    yield word, index, part
            elif word == "items":
                yield word, None, value


def part_path(path: str, word: str, key: str | int | None) -> str:
    """The path of what `parts` yielded as (word, key)."""
    inner = step(path, word)
    return inner if key is None else step(inner, key)


@dataclass(frozen=True, slots=True)
class Target:
    """A schema that can be referred to, and where it stands."""

    schema: object
    path: str


@dataclass(slots=True)
class References:
    """The index of one document. Build it with `index`."""

    document: object
    bases: dict[int, str] = field(default_factory=dict)
    resources: dict[str, Target] = field(default_factory=dict)

    def find(self, reference: str, holder: dict[str, object]) -> Target | None:
        """What the `$ref` in `holder` means; None where it leads nowhere in this document."""
        base = self.bases.get(id(holder)) or self.bases.get(id(self.document), _ROOT)
        # urljoin knows no relative references to addresses such as urn:x.
        address, fragment = (base, reference[1:]) if reference[:1] == "#" else urldefrag(urljoin(base, reference))
        target = self.resources.get(address)
        if target is None or not fragment:
            return target
        if not fragment.startswith("/"):
            return self.resources.get(f"{address}#{fragment}")
        return _follow(target, fragment)

    def add(self, schema: object, path: str, base: str) -> None:
        """Note a schema and all inside of it."""
        if not isinstance(schema, dict):
            return
        # Beside a $ref of the old drafts an id says nothing; telling them apart would change no answer here.
        name = schema.get("$id", schema.get("id"))
        if isinstance(name, str) and name:
            if name.startswith("#"):
                self.resources.setdefault(base + name, Target(schema, path))
            else:
                base = urldefrag(urljoin(base, name))[0]
                self.resources.setdefault(base, Target(schema, path))
        anchor = schema.get("$anchor")
        if isinstance(anchor, str):
            self.resources.setdefault(f"{base}#{anchor}", Target(schema, path))
        self.bases[id(schema)] = base
        for word, key, part in parts(schema):
            self.add(part, part_path(path, word, key), base)


def index(document: object) -> References:
    """The index of `document`, which must stay as it is and alive while the index is used."""
    found = References(document)
    found.resources[_ROOT] = Target(document, "")
    found.add(document, "", _ROOT)
    return found


def in_circle(references: References, referring: Iterable[tuple[dict[str, object], str]]) -> str | None:
    """The path of a `$ref` of which a schema is a part of itself for one and the same value; None where there is none.

    `referring`: the schemas with a `$ref`, and its path. Such a schema says only that it holds where it holds.
    """
    settled: set[int] = set()
    for schema, path in referring:
        if id(schema) in settled:
            continue
        way = [(id(schema), _in_place(references, schema))]
        on_way = {id(schema)}
        while way:
            part = next(way[-1][1], None)
            if part is None:
                done = way.pop()[0]
                on_way.discard(done)
                settled.add(done)
            elif id(part) in on_way:
                return path
            elif id(part) not in settled:
                way.append((id(part), _in_place(references, part)))
                on_way.add(id(part))
    return None


def _in_place(references: References, schema: dict[str, object]) -> Iterator[dict[str, object]]:
    """What must match the same value as the schema does."""
    reference, together = schema.get("$ref"), schema.get("allOf")
    target = references.find(reference, schema) if isinstance(reference, str) else None
    if target is not None and isinstance(target.schema, dict):
        yield target.schema
    for part in together if isinstance(together, list) else ():
        if isinstance(part, dict):
            yield part


def _follow(target: Target, pointer: str) -> Target | None:
    value, path = target.schema, target.path
    for token in pointer.split("/")[1:]:
        key = unquote(token).replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value, path = value[key], step(path, key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
            value, path = value[int(key)], step(path, int(key))
        else:
            return None
    return Target(value, path) if isinstance(value, dict | bool) else None
