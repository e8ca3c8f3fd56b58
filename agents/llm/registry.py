"""Which targets there are for a program: providers of the table, own clusters, places of the testing kit; with the keys
that open them.

A registry is an object, so that two tenants of one process can have two. `default_registry` is the one that calls use
where nothing else is said; call.py resolves references by it.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Unpack

from diptych.protos.errors import DiptychError, StartupError

from .errors import UsageError
from .hooks import Hooks
from .machine import Awaited, Machine, take, verb
from .params import FAMILIES, MOST_LABEL, Params, checked, is_label, layered
from .profiles import POOL, POOL_QUIRKS
from .tracing import Tracing
from .upstream import HttpUpstream, Upstream
from .usage import Price, PriceList

if TYPE_CHECKING:
    from diptych.cluster.providers.registry import Registry as Providers

    from .cache import Cache
    from .limiter import Limiter

POOL_NAME = "pool"  # of the cluster at $DIPTYCH_URL, or the one started last on this machine
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Diptych cluster. `url` empty: $DIPTYCH_URL, or the cluster started last on this machine. `key` empty: none; but
    $DIPTYCH_API_KEY, if anything, where `url` is empty, too. `tenant`: whose KV and whose share it is, where the
    cluster asks for no keys.
    """

    url: str = ""
    key: str = field(default="", repr=False)
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.tenant and not is_label(self.tenant):
            raise UsageError(f"tenant is a text of at most {MOST_LABEL} printable ASCII characters", "tenant")
        if self.key and not is_secret(self.key):
            raise UsageError("key is a text of printable ASCII characters without spaces", "key")


def is_secret(key: object) -> bool:
    """Whether it can be shown in a header."""
    return isinstance(key, str) and bool(key) and key.isascii() and key.isprintable() and " " not in key


class Registry:
    """Targets by their references `PREFIX/MODEL`.

    clusters    own clusters by their prefixes; `pool` is always there
    providers   changes of the table and own servers, as the branch `providers:` of diptych.yaml has them
                ({"lab": {"base_url": "http://10.0.0.7:8000/v1", "api_key": "env:LAB_KEY"}})
    keys        providers' keys, where they are not in the environment; shown to nobody
    params      what holds for every call by this registry
    prices      dollars for a million tokens of prompts and of answers, before the public table: {"lab/*": (0.2, 0.4)},
                or a mapping as `gateway.prices` of diptych.yaml has it
    hooks       who hears of its calls; `registry.hooks.on(...)` also later
    cache       where its calls' answers are kept; None: nowhere
    tracing     what is told to OpenTelemetry
    limiter     how many of its calls' requests are on their way at once, and how fast they go out; a call's own holds,
                too
    """

    def __init__(
        self,
        *,
        clusters: Mapping[str, Cluster] | None = None,
        providers: Mapping[str, Mapping[str, Any]] | None = None,
        keys: Mapping[str, str] | None = None,
        params: Params | None = None,
        environ: Mapping[str, str] | None = None,
        prices: Mapping[str, Price] | None = None,
        hooks: Hooks | None = None,
        cache: Cache | None = None,
        tracing: Tracing | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self.params: Params = checked(params or {}, "Registry(params=...)")
        self.prices = PriceList(prices or {})
        self.hooks = Hooks() if hooks is None else hooks
        self.cache = cache
        self.tracing = Tracing() if tracing is None else tracing
        self.limiter = limiter
        self._environ = os.environ if environ is None else environ
        self._settings = dict(providers or {})
        self._keys = dict(keys or {})
        for name, key in self._keys.items():
            if not is_secret(key):
                raise UsageError(
                    f"keys: that of {name} is no text of printable ASCII characters without spaces", "keys"
                )
        self._clusters = {POOL_NAME: Cluster(), **(clusters or {})}
        for name in self._clusters:
            if not _NAME.fullmatch(name):
                raise UsageError(f"clusters: {name!r} is no prefix: lower case letters, digits, _, . and -")
        self._upstreams: dict[str, Upstream] = {}
        self._lock = threading.Lock()
        self._providers: Providers | None = None
        self._families: set[str] = set()  # of options, which were looked up
        self._token = secrets.token_hex(16)
        _living[self._token] = self

    def __reduce__(self) -> tuple[Any, ...]:  # keys and connections do not travel: it is found again, or asked for
        return _found_again, ("" if self is _default else self._token,)

    def add(self, name: str, upstream: Upstream) -> None:
        """`upstream` answers `name/...` from now on."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no prefix: lower case letters, digits, _, . and -")
        with self._lock:
            self._upstreams[name] = upstream

    def resolve(self, reference: str) -> tuple[Upstream, str]:
        """What `PREFIX/MODEL` means. Raises UsageError that says what is close, or which key is missing."""
        prefix, slash, model = reference.partition("/") if isinstance(reference, str) else ("", "", "")
        if not slash or not prefix or not model:
            raise UsageError(
                f"{reference!r} is no model: write PREFIX/MODEL, for example pool/smollm2-135m-instruct for an own "
                f"cluster or anthropic/claude-sonnet-4-5",
                "model",
            )
        upstream = self._upstreams.get(prefix)
        if upstream is None:
            with self._lock:
                upstream = self._upstreams.get(prefix) or self._found(prefix)
                self._upstreams[prefix] = upstream
        return upstream, model

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises UsageError where `options` are for a family that neither the table nor this registry has: those of a
        misspelt name would go nowhere.
        """
        for family in options:
            if family in FAMILIES or family in self._clusters or family in self._upstreams or family in self._families:
                continue
            with self._lock:
                known = {entry.quirks.family or entry.name for entry in self._loaded()}
                known |= {entry.name for entry in self._loaded()}
            if family not in known:
                close = get_close_matches(family, [*FAMILIES, *known, *self._clusters, *self._upstreams], n=1)
                hint = f": did you mean {close[0]}?" if close else "; `diptych providers list` shows the names"
                raise UsageError(f"options: there is no target {family!r}{hint}", f"options.{family}")
            self._families.add(family)

    @verb
    def close(self, /) -> Machine[None]:
        """Closes the connections that its calls have kept: `close()` those of synchronous calls, `await close.aio()`
        those of the running loop. The end of a loop does it, too; a registry that is used again makes new ones.
        """
        for upstream in list(self._upstreams.values()):
            if isinstance(upstream, HttpUpstream):
                yield from take(Awaited(upstream.close()))

    def _found(self, prefix: str) -> Upstream:
        if prefix in self._clusters:
            return self._cluster(prefix, self._clusters[prefix])
        providers = self._loaded()
        try:
            provider = providers.provider(prefix)
            fault = providers.fault(provider)
        except DiptychError as exc:
            own = ", ".join(sorted({*self._clusters, *self._upstreams}))
            raise UsageError(f"{exc}; own targets here: {own}", "model") from exc
        if fault:
            self._providers = None  # who sets the variable that is missing need not begin anew
            raise UsageError(f"{fault}, or give Registry(keys={{{prefix!r}: ...}})", "model")
        return HttpUpstream(provider, providers)

    def _loaded(self) -> Providers:
        if self._providers is None:
            from diptych.cluster.providers.registry import Registry as Providers
            from diptych.cluster.providers.settings import ProviderSettings
            from diptych.cluster.providers.table import built_in

            environ, table = dict(self._environ), built_in()
            settings = {name: _settings(name, fields) for name, fields in self._settings.items()}
            for number, (name, key) in enumerate(self._keys.items()):
                variable = f"DIPTYCH_KEY_{number}"
                environ[variable] = key
                given = settings.get(name, ProviderSettings())
                if name not in table and name not in settings:
                    raise UsageError(f"keys: there is no provider {name!r}", "keys")
                settings[name] = given.model_copy(update={"api_key": f"env:{variable}"})
            try:
                self._providers = Providers.load(settings, environ)
            except StartupError as exc:
                raise UsageError(str(exc)) from exc
        return self._providers

    def _cluster(self, prefix: str, cluster: Cluster) -> Upstream:
        from dataclasses import replace

        from diptych.cluster.client.wire import base_of, locate
        from diptych.cluster.providers.provider import Provider
        from diptych.cluster.providers.registry import Registry as Providers
        from diptych.cluster.providers.secrets import KeyReader, KeyReference
        from diptych.cluster.providers.settings import checked_base_url

        try:
            url = base_of(cluster.url or self._environ.get("DIPTYCH_URL", "").strip() or locate(None))
            checked_base_url(url)
        except ValueError as exc:
            raise UsageError(f"{prefix}: the address of a cluster {exc}", "url") from exc
        except DiptychError as exc:
            raise UsageError(f"{prefix}: {exc}; or set $DIPTYCH_URL, or Registry(clusters=...)", "model") from exc
        # A key of the environment is for the cluster of the environment: another address would learn it.
        usual = "" if cluster.url else self._environ.get("DIPTYCH_API_KEY", "").strip()
        environ = {"KEY": cluster.key or usual}
        provider = Provider(
            name=prefix,
            title=f"the cluster at {url}",
            base_url=f"{url.rstrip('/')}/v1",
            codec="openai.chat",
            key=KeyReference("env", "KEY"),
            keyless="diptych serve",
            quirks=replace(POOL_QUIRKS, family=POOL_NAME),
            headers={"x-tenant": cluster.tenant} if cluster.tenant else {},
            reads_urls=(),
        )
        providers = Providers({prefix: provider}, frozenset(), KeyReader(environ))
        return HttpUpstream(provider, providers, POOL)


def _settings(name: str, fields: Mapping[str, Any]) -> Any:
    """One provider's. Raises UsageError, without what stands there: it may be a key."""
    from pydantic import ValidationError

    from diptych.cluster.providers.settings import ProviderSettings

    try:
        return ProviderSettings(**fields)
    except ValidationError as exc:
        told = [f"{name}.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in exc.errors(include_input=False)]
        raise UsageError(f"providers: {'; '.join(told)}", "providers") from None


class Elsewhere(Registry):
    """In place of one that a reply was made by in another process: who goes on names one that is here."""

    def __init__(self, token: str) -> None:
        super().__init__(environ={})
        del _living[self._token]
        self._token = token

    def resolve(self, reference: str) -> tuple[Upstream, str]:
        """Raises UsageError."""
        raise UsageError(
            f"{reference}: the registry that this reply was made by did not travel with it, because it holds keys: "
            f"go on inside `with llm.using(registry=...):`",
            "registry",
        )


_living: weakref.WeakValueDictionary[str, Registry] = weakref.WeakValueDictionary()


def _found_again(token: str) -> Registry:
    return _living.get(token) or Elsewhere(token) if token else default_registry()


_default: Registry | None = None
_default_lock = threading.Lock()


def default_registry() -> Registry:
    """Of the process: the environment's keys, and the cluster at $DIPTYCH_URL."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Registry()
        return _default


@dataclass(frozen=True, slots=True)
class Override:
    """What holds for calls inside a `with using(...)`."""

    model: str | None = None
    registry: Registry | None = None
    params: Params = field(default_factory=lambda: Params())


_override: ContextVar[Override] = ContextVar("diptych_llm_override", default=Override())  # noqa: B039  it is frozen


def current() -> Override:
    """What holds here."""
    return _override.get()


@contextmanager
def using(
    model: str | None = None, *, registry: Registry | None = None, **params: Unpack[Params]
) -> Iterator[Override]:
    """Calls inside go to `model`, by `registry`, with `params` over their own; blocks may lie in blocks, and what held
    outside holds again behind them. Of this thread or task alone, and of what it starts.
    """
    outer = _override.get()
    inner = Override(
        outer.model if model is None else model,
        outer.registry if registry is None else registry,
        layered(outer.params, checked(params, "using(...)")),
    )
    token = _override.set(inner)
    try:
        yield inner
    finally:
        with suppress(ValueError):  # a generator that is closed in another context, where the block never held
            _override.reset(token)
