"""What is particular about each maker's client: its wire format, where it makes answers, which errors it raises.

client.py asks `maker_of` once for each wrapped client. Nothing is imported: the package of a client that
exists is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diptych.protos.providers.claude_models import claude_of
from diptych.protos.providers.quirks import Quirks

from ..errors import UsageError

if TYPE_CHECKING:
    from diptych.cluster.providers.provider import Provider

_AS_IS = {"openai": "openai", "anthropic": "openai_strict"}  # the latter is Anthropic's own dialect in its format
_CODECS = {"openai": "openai.chat", "anthropic": "anthropic.messages"}


@dataclass(frozen=True, slots=True)
class Maker:
    """`package` is openai or anthropic; `create` what makes an answer, with the client's own attempts switched off."""

    package: str
    is_async: bool
    create: Callable[..., Any]
    known: frozenset[str]  # parameters of `create`; others go by extra_body
    client: Any

    @property
    def base_url(self) -> str:
        """Where it asks."""
        return str(self.client.base_url)

    @property
    def codec_name(self) -> str:
        """Of its wire format."""
        return _CODECS[self.package]

    @property
    def sdk(self) -> ModuleType:
        """The package itself, with its errors."""
        return sys.modules[self.package]

    @property
    def resource(self) -> str:
        """Where its users call it."""
        return "chat.completions" if self.package == "openai" else "messages"

    def provider(self) -> Provider | None:
        """The one of the table that lives at the client's address."""
        return _by_address().get((self.codec_name, _plain(self.base_url)))

    def knows_schemas(self, model: str) -> bool:
        """False of Claude models that are known to have no structured answers."""
        claude = claude_of(model) if self.package == "anthropic" else None
        return claude is None or claude.structured

    def quirks(self) -> Quirks:
        """How the place at the client's address differs from the format; one that the table does not know is taken for
        an own server, which takes schemas as they are.
        """
        provider = self.provider()
        return Quirks(family=self.package, schema_dialect=_AS_IS[self.package]) if provider is None else provider.quirks


def maker_of(client: object) -> Maker:
    """Raises UsageError for what is neither OpenAI's client nor Anthropic's."""
    for kind in type(client).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _CODECS and kind.__name__ in ("SyncAPIClient", "AsyncAPIClient"):
            break
    else:
        raise UsageError(
            f"llm.wrap takes openai.OpenAI(), openai.AsyncOpenAI(), anthropic.Anthropic() or "
            f"anthropic.AsyncAnthropic(), not {_told(client)}; other providers have no need of a client of their own: "
            f"@llm.call('PREFIX/MODEL')"
        )
    single: Any = client
    single = single.with_options(max_retries=0)
    create = single.chat.completions.create if package == "openai" else single.messages.create
    return Maker(
        package=package,
        is_async=kind.__name__ == "AsyncAPIClient",
        create=create,
        known=frozenset(signature(create).parameters),
        client=client,
    )


def _told(client: object) -> str:
    if isinstance(client, type):
        return f"the class {client.__name__}: make one, {client.__name__}()"
    kind = type(client)
    return f"a {kind.__module__}.{kind.__qualname__}"


@cache
def _by_address() -> Mapping[tuple[str, str], Provider]:
    from diptych.cluster.providers.registry import Registry

    return {(one.codec, _plain(one.base_url)): one for one in reversed(list(Registry.load({}, {})))}


def _plain(url: str) -> str:
    """Anthropic's client puts the version into its paths, the table into its addresses."""
    parts = urlsplit(url)
    return f"{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}".lower()
