"""providers.yaml, the built-in providers, read strictly: a key that nobody knows is refused by its path.

registry.py reads it once per process and lays a configuration over it. It knows no environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Final, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from diptych.protos.errors import StartupError
from diptych.protos.providers.codecs import CODECS
from diptych.protos.providers.quirks import Quirks
from diptych.protos.settings import Settings

from .provider import AuthScheme

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
RESERVED: Final = ("pool",)  # an own pool's targets begin with it
_ADDRESS = r"https?://[A-Za-z0-9{}._:\[\]-]+(?:/[A-Za-z0-9{}._~/-]*)?"
Words = Annotated[str, Field(min_length=1, max_length=200)]
Variable = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]


class Placeholder(Settings):
    """What stands for `{account}` or `{region}` where a configuration does not say."""

    env: tuple[Variable, ...] = ()
    default: str = ""
    words: Words


class Entry(Settings):
    """A row of the table. `region_base_urls` are those of regions whose address is made in another way."""

    title: Words
    family: Words  # of the documentation: which part of the page tells of it
    base_url: Annotated[str, Field(pattern=f"^{_ADDRESS}$")]
    region_base_urls: dict[str, Annotated[str, Field(pattern=f"^{_ADDRESS}$")]] = Field({})
    codec: str
    auth: AuthScheme = "bearer"
    service: str = ""
    keys: tuple[Variable, ...] = ()
    keyless: str = ""
    account: Placeholder | None = None
    region: Placeholder | None = None
    quirks: dict[str, Any] = Field({})
    reads_urls: tuple[str, ...] = ("https://", "http://")
    example: Words  # a model that its page names
    notes: str = ""
    source: Annotated[str, Field(pattern=r"^https://")]
    checked: date

    @field_validator("codec")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_codec(name)

    @field_validator("quirks")
    @classmethod
    def _quirks(cls, given: dict[str, Any]) -> dict[str, Any]:
        read_quirks(given)
        return given


def known_codec(name: str) -> str:
    """A codec's name. Raises ValueError that names them all."""
    if name not in CODECS:
        close = difflib.get_close_matches(name, CODECS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"there is no codec {name[:64]!r} ({hint}those that are: {', '.join(CODECS)})")
    return name


@cache
def _quirk_kinds() -> Mapping[str, TypeAdapter[Any]]:
    hints = get_type_hints(Quirks)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(Quirks)}


def read_quirks(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Quirks that are given, as it wants them. Nothing is coerced. Raises ValueError naming the field."""
    kinds, found = _quirk_kinds(), {}
    for name, value in given.items():
        if name not in kinds:
            close = difflib.get_close_matches(str(name), kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(kinds))}"
            raise ValueError(f"{name} is not a known quirk ({hint})")
        try:
            found[name] = kinds[name].validate_json(json.dumps(value), strict=True)
        except ValidationError as exc:
            words = str(exc.errors()[0]["msg"]).removeprefix("Input ")
            raise ValueError(f"{name} {words[:1].lower() + words[1:]}") from None
        except (TypeError, ValueError):
            raise ValueError(f"{name} holds what JSON cannot say") from None
    return found


def read_table(text: str) -> dict[str, Entry]:
    """The table in `text`. Raises StartupError with a sentence for each mistake; two rows of one name are one."""
    try:
        tree = yaml.load(text, _UniqueLoader)
    except yaml.YAMLError as exc:
        raise StartupError(f"the table of providers is not valid YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(tree, dict):
        raise StartupError("the table of providers should be a group of keys, one for each provider")
    found, faults = {}, []
    for name, row in tree.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            faults.append(f"{name!r} cannot be a provider's name: lower-case letters, digits, '.', '_', '-'")
            continue
        try:
            found[name] = Entry.model_validate(row)
        except ValidationError as exc:
            faults += [f"{name}.{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors()]
    if faults:
        raise StartupError("the table of providers: " + "; ".join(faults))
    return found


class _UniqueLoader(yaml.SafeLoader):
    """Two equal keys are a mistake, not the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"two entries have the name {name}", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


@cache
def built_in() -> Mapping[str, Entry]:
    """The table that comes with Diptych."""
    return read_table((files(__package__) / "providers.yaml").read_text(encoding="utf-8"))
