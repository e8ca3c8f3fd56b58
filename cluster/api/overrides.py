"""Who asks, as the gateway knows it: what the key says of its requests, and what a request's headers want otherwise,
where the key lets it.

x-route-target: PROVIDER/MODEL   x-route-strategy: p2c|weighted|priority|lowest_cost|sticky   x-cache: no-store|...
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, cast, get_args

from diptych.cluster.gateway.rule_settings import StrategyName
from diptych.cluster.gateway.settings import TARGET_NAME
from diptych.cluster.keys import Key, Override
from diptych.protos.errors import Forbidden, InvalidRequest
from diptych.protos.strict_json import printable

if TYPE_CHECKING:  # where there are no routes, nothing of the gateway is imported
    from diptych.cluster.gateway.ports import Context

Caching = Literal["no-store", "no-cache", "always"]
_PREFIX: Final = b"x-route-"
_HEADERS: Final = {
    "x-route-target": Override.TARGET,
    "x-route-strategy": Override.STRATEGY,
    "x-cache": Override.CACHE,
}
MAX_VALUE_CHARS: Final = 256  # of a header that rules read; a longer one is like none of theirs


def overrides(
    context: Context, key: Key | None, headers: Sequence[tuple[bytes, bytes]], *, readable: Collection[str] = ()
) -> Context:
    """`context` with the key's id and tags, the headers that rules may read (`readable`), and the request's wishes.
    Without any key everybody may wish. Raises Forbidden for a wish that the key does not let, InvalidRequest for one
    that says nothing; both name the header.
    """
    told, seen = _told(headers, readable)
    if key is not None:
        context = replace(context, key=key.id, tags=key.tags)
        for name in told:
            override = _HEADERS[name]
            if override not in key.may_override:
                raise Forbidden(
                    f"this key's requests may not say {name}: leave the header out, or use a key that was made with "
                    f"`diptych keys create --may-override {override}`",
                    name,
                )
    return replace(
        context,
        headers=tuple(seen.items()),
        target=_target(told.get("x-route-target", "")),
        strategy=_strategy(told.get("x-route-strategy", "")),
        cache=_caching(told.get("x-cache", "")) or context.cache,
    )


def _told(headers: Sequence[tuple[bytes, bytes]], readable: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The wishes, and what rules may read."""
    told: dict[str, str] = {}
    seen: dict[str, str] = {}
    for raw, value in headers:
        name = raw.decode("latin-1")
        if name in readable:
            _put(seen, name, value)
        elif name in _HEADERS:
            _put(told, name, value)
        elif raw.startswith(_PREFIX):
            raise InvalidRequest(
                f"there is no header {printable(name)}; there are {', '.join(_HEADERS)}", printable(name)
            )
    return told, {name: value for name, value in seen.items() if len(value) <= MAX_VALUE_CHARS}


def _put(found: dict[str, str], name: str, value: bytes) -> None:
    if name in found:
        raise InvalidRequest(f"the header {name} is given twice; send it once", name)
    found[name] = value.decode("latin-1").strip()


def _target(value: str) -> str:
    if value and not TARGET_NAME.fullmatch(value):
        raise InvalidRequest(
            f"x-route-target: {printable(value)!r} is no target: write PROVIDER/MODEL, or pool/MODEL", "x-route-target"
        )
    return value


def _strategy(value: str) -> StrategyName | None:
    return cast("StrategyName", _one_of("x-route-strategy", value, get_args(StrategyName))) if value else None


def _caching(value: str) -> Caching | Literal[""]:
    return cast("Caching", _one_of("x-cache", value, get_args(Caching))) if value else ""


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InvalidRequest(f"{name}: {printable(value)!r} is none of {', '.join(known)}", name)
    return value
