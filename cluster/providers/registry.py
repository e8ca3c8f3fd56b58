"""The providers that there are: the built-in table, a configuration's changes and own ones, the environment's names.

The gateway asks it for targets by their names; clients.py makes the connections. Nothing is reached from here, and no
key is read: who needs one asks `fault`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from diptych.protos.errors import InvalidRequest, StartupError
from diptych.protos.providers.quirks import Quirks

from .auth import needs_key, needs_litellm
from .provider import AuthScheme, Provider
from .secrets import NO_KEY, KeyReader, KeyReference, KeyUnreadable
from .settings import LITELLM, ProviderSettings, checked_names, checked_place, is_near
from .table import Entry, Placeholder, built_in, read_quirks

_OWN_AUTH: Final[dict[str, AuthScheme]] = {
    "anthropic.messages": "x-api-key",
    "gemini.generate": "x-goog-api-key",
    "bedrock.converse": "aws",
}
_NOT_LITELLMS: Final = ("auth", "account", "region", "proxy", "ca_file", "max_connections")
MAX_MODEL_CHARS: Final = 256
KEYLESS: Final = "start `ollama serve` and use ollama/MODEL, or serve an own pool and use pool/MODEL"


class Registry:
    """Providers by their names. `configured` are those that the configuration names."""

    def __init__(self, providers: Mapping[str, Provider], configured: frozenset[str], keys: KeyReader) -> None:
        self.configured = configured
        self.keys = keys
        self._providers = dict(providers)

    @classmethod
    def load(
        cls,
        settings: Mapping[str, ProviderSettings] | None = None,
        environ: Mapping[str, str] | None = None,
        table: Mapping[str, Entry] | None = None,
    ) -> Registry:
        """All of the table, and `settings` over it. Raises StartupError with a sentence for each mistake in them."""
        settings = settings or {}
        environ = os.environ if environ is None else environ
        table = built_in() if table is None else table
        try:
            checked_names(settings)
        except ValueError as exc:
            raise StartupError(f"providers: {exc}") from exc
        found, faults = {}, []
        for name in {**table, **settings}:
            changes, entry = settings.get(name, ProviderSettings()), table.get(name)
            try:
                if changes.codec == LITELLM:
                    found[name] = _through_litellm(name, changes, is_built_in=entry is not None)
                elif entry is not None:
                    found[name] = _built_in(name, entry, changes, environ)
                else:
                    found[name] = _own(name, changes, table, environ)
            except ValueError as exc:
                faults.append(f"providers.{name}{exc}")
        if faults:
            raise StartupError("; ".join(faults))
        return cls(found, frozenset(settings), KeyReader(environ))

    def __iter__(self) -> Iterator[Provider]:
        return iter(self._providers.values())

    def __len__(self) -> int:
        return len(self._providers)

    def __contains__(self, name: object) -> bool:
        return name in self._providers

    def provider(self, name: str) -> Provider:
        """By its name. Raises InvalidRequest that says what there is."""
        provider = self._providers.get(name)
        if provider is None:
            raise InvalidRequest(f"there is no provider {name[:64]!r}: {self._hint(name)}", "model")
        return provider

    def target(self, name: str) -> tuple[Provider, str]:
        """What `PROVIDER/MODEL` means; the model's name may hold slashes. Raises InvalidRequest."""
        first, slash, model = name.partition("/")
        if not slash or not first or not model:
            raise InvalidRequest(f"{name[:128]!r} is no target: write PROVIDER/MODEL", "model")
        if len(model) > MAX_MODEL_CHARS or not model.isprintable() or " " in model:
            raise InvalidRequest(
                f"{model[:64]!r} is no model's name: at most {MAX_MODEL_CHARS} characters, no spaces", "model"
            )
        return self.provider(first), model

    def has_key(self, provider: Provider) -> bool:
        """Whether its key can be read now; also where it goes without."""
        try:
            return provider.key.kind == "none" or self.keys.read(provider.key) is not None
        except KeyUnreadable:
            return False

    def fault(self, provider: Provider) -> str:
        """What keeps it from being used, with the remedy, as a sentence; empty: nothing that can be known here."""
        if provider.lacks:
            return provider.lacks
        if provider.auth in ("google", "aws") or provider.keyless:
            return ""  # credentials may lie elsewhere, a key may not be needed
        try:
            secret = self.keys.read(provider.key)
        except KeyUnreadable as exc:
            return f"{provider.name}: {exc}"
        return needs_key(provider) if secret is None and provider.key.kind != "none" else ""

    def check(self, name: str) -> tuple[Provider, str]:
        """`target`, and that it can be used. Raises StartupError with what to do."""
        try:
            provider, model = self.target(name)
        except InvalidRequest as exc:
            raise StartupError(str(exc)) from exc
        fault = self.fault(provider)
        if fault:
            raise StartupError(fault)
        return provider, model

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(name.lower(), self._providers, n=3, cutoff=0.7)
        if close:
            return f"did you mean {' or '.join(close)}?"
        return f"`diptych providers list` shows them; an own one is described under providers.{_plain(name)}"


def _built_in(name: str, entry: Entry, changes: ProviderSettings, environ: Mapping[str, str]) -> Provider:
    region, no_region = _placed(name, "region", entry.region, changes.region, environ)
    account, no_account = _placed(name, "account", entry.account, changes.account, environ)
    lacks = no_account or no_region
    template = entry.region_base_urls.get(region, entry.base_url)
    base_url = template if lacks else template.replace("{region}", region).replace("{account}", account)
    key = _key(changes, KeyReference("env", "|".join(entry.keys)) if entry.keys else NO_KEY)
    auth, codec = changes.auth or entry.auth, changes.codec or entry.codec
    if changes.base_url is not None:
        if (lacks or _origin(changes.base_url) != _origin(base_url)) and changes.api_key is None and entry.keys:
            raise ValueError(
                f".base_url is not {entry.title}'s own address: say which key goes there by providers.{name}.api_key "
                f"(env:NAME, file:/path or none), or choose another name for it: {name} is a built-in provider"
            )
        base_url, lacks = changes.base_url, no_region if auth == "aws" else ""
    proxy, no_proxy = _proxy(changes, base_url, environ)
    return _finished(
        Provider(
            name=name,
            title=entry.title,
            base_url=base_url,
            codec=codec,
            auth=auth,
            key=key,
            keyless=entry.keyless,
            quirks=_quirks(changes, {"family": name, **entry.quirks}),
            headers=changes.headers,
            reads_urls=entry.reads_urls if changes.reads_urls is None else _urls(changes),
            region=region,
            service=entry.service,
            source=entry.source,
            checked=entry.checked.isoformat(),
            is_built_in=True,
            lacks=lacks or no_proxy,
            proxy=proxy,
            ca_file=changes.ca_file or "",
            max_connections=changes.max_connections,
        ),
        changes,
    )


def _own(name: str, changes: ProviderSettings, table: Mapping[str, Entry], environ: Mapping[str, str]) -> Provider:
    if changes.base_url is None:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {close[0]}? An own one" if close else "an own one"
        raise ValueError(f" is not a built-in provider: {hint} names base_url, its codec and api_key; {KEYLESS}")
    codec = changes.codec or "openai.chat"
    auth = changes.auth or _OWN_AUTH.get(codec, "bearer")
    if auth == "aws" and not changes.region:
        raise ValueError(".region is missing: Amazon's signatures name it, for example eu-west-1")
    if changes.api_key is None and auth not in ("google", "aws", "none"):
        raise ValueError(".api_key is missing: say where its key is by env:NAME or file:/path, or write none")
    proxy, no_proxy = _proxy(changes, changes.base_url, environ)
    return _finished(
        Provider(
            name=name,
            title=name,
            base_url=changes.base_url,
            codec=codec,
            auth=auth,
            key=_key(changes, NO_KEY),
            quirks=_quirks(changes, {}),
            headers=changes.headers,
            reads_urls=_urls(changes),
            region=changes.region or "",
            service="bedrock" if auth == "aws" else "",
            lacks=no_proxy,
            proxy=proxy,
            ca_file=changes.ca_file or "",
            max_connections=changes.max_connections,
        ),
        changes,
    )


def _through_litellm(name: str, changes: ProviderSettings, *, is_built_in: bool) -> Provider:
    """A provider that the library litellm reaches; it knows addresses and looks keys up by itself."""
    if is_built_in:
        raise ValueError(f".codec: {name} is built in and needs no library; give what LiteLLM reaches another name")
    ignored = [key for key in _NOT_LITELLMS if key in changes.model_fields_set]
    if ignored:
        raise ValueError(f".{ignored[0]}: LiteLLM makes its connections itself and is not told of this; remove it")
    is_there = find_spec(LITELLM) is not None
    return _finished(
        Provider(
            name=name,
            title=name,
            base_url=changes.base_url or "",
            codec="openai.chat",
            via="litellm",
            key=_key(changes, NO_KEY),
            quirks=_quirks(changes, {"schema_dialect": "openai", "media": ["image", "audio", "file"]}),
            headers=changes.headers,
            reads_urls=_urls(changes),
            lacks="" if is_there else needs_litellm(name),
        ),
        changes,
    )


def _finished(provider: Provider, changes: ProviderSettings) -> Provider:
    shows_key = provider.key.kind != "none" or provider.auth in ("google", "aws")
    is_open = provider.base_url.startswith("http://") and not is_near(provider.base_url)
    if is_open and shows_key and not changes.allow_plaintext:
        raise ValueError(
            f".base_url: {provider.host} would get the key over plain http, readable by everybody on the way; "
            f"write https, or providers.{provider.name}.allow_plaintext: true where the network itself is trusted"
        )
    return provider


def _placed(
    name: str, what: str, place: Placeholder | None, given: str | None, environ: Mapping[str, str]
) -> tuple[str, str]:
    """The value, and what is missing where there is none."""
    if place is None:
        if given is not None and what == "account":
            raise ValueError(f".{what}: {name}'s address has no {what}; remove this key")
        return given or "", ""
    value = given or next((found for key in place.env if (found := environ.get(key, "").strip())), place.default)
    wrong = ""
    if value:
        try:
            return checked_place(value), ""
        except ValueError as exc:
            if given:
                raise ValueError(f".{what}: {exc}") from None
            wrong = f", and {exc}"
    variables = " or ".join(f"${key}" for key in place.env)
    either = f"set {variables}, or providers.{name}.{what}" if variables else f"set providers.{name}.{what}"
    return "", f"{name} needs {place.words}{wrong}: {either}; without any, {KEYLESS}"


def _urls(changes: ProviderSettings) -> tuple[str, ...]:
    return ("https://", "http://") if changes.reads_urls else ()


def _key(changes: ProviderSettings, usual: KeyReference) -> KeyReference:
    return usual if changes.api_key is None else KeyReference.parse(changes.api_key)


def _quirks(changes: ProviderSettings, usual: Mapping[str, object]) -> Quirks:
    try:
        return Quirks(**read_quirks({**usual, **changes.quirks}))
    except ValueError as exc:
        raise ValueError(f".quirks.{exc}") from None


def _proxy(changes: ProviderSettings, base_url: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Its address, and what is wrong with it. A proxy of plain http would read the key: only a named one may stand
    there.
    """
    if changes.proxy is not None:
        return changes.proxy, ""
    parts = urlsplit(base_url)
    found = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
    excepted = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if parts.scheme != "https" or not found or _is_excepted(parts.hostname or "", excepted):
        return "", ""
    found = found if "://" in found else f"http://{found}"
    try:
        is_known = urlsplit(found).scheme in ("http", "https") and bool(urlsplit(found).hostname)
    except ValueError:
        is_known = False
    if not is_known:
        return "", f"$HTTPS_PROXY is no http://host:port: {parts.hostname} is not reached; set $NO_PROXY to except it"
    return found, ""


def _is_excepted(host: str, names: str) -> bool:
    """By $NO_PROXY: names and endings of names, separated by commas; an asterisk is all."""
    words = [word.strip().lower().removeprefix("*").removeprefix(".") for word in names.split(",")]
    return "*" in names.split(",") or any(word and (host == word or host.endswith("." + word)) for word in words)


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port


def _plain(name: str) -> str:
    return name if re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", name) else "NAME"
