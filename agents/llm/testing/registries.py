"""A registry of models for tests alone."""

from __future__ import annotations

from collections.abc import Mapping

from ..params import Params
from ..registry import Registry
from ..upstream import Upstream


def registry_of(
    more: Mapping[str, Upstream] | None = None, /, *, params: Params | None = None, **upstreams: Upstream
) -> Registry:
    """Each answers its prefix: registry_of(pool=ScriptedModel(["hello"])) answers pool/ANYTHING; `more` has
    prefixes that are no names of arguments. No key is found by it: it reads no environment.
    """
    registry = Registry(params=params, environ={})
    for name, upstream in {**(more or {}), **upstreams}.items():
        registry.add(name, upstream)
    return registry
