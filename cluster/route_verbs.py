"""The verb `diptych route explain`: where a request would go and why, by a configuration alone or at a running server.

Offline nothing is measured and nothing has failed yet: every breaker is closed, and of budgets nothing is known.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diptych.cluster.client.wire import headers
from diptych.cluster.config import DiptychConfig, api_key, load_config
from diptych.protos.errors import DiptychError, Forbidden, InvalidRequest, StartupError, UnknownModel
from diptych.protos.openai import ChatRequest, read_chat
from diptych.protos.strict_json import parse_object, printable

from .gateway.gateway import Gateway
from .gateway.money import money_ports
from .gateway.ports import Context
from .gateway.record import AttemptRecord
from .gateway.settings import OWN
from .gateway.target import Continues
from .key_verbs import table
from .providers.registry import Registry
from .providers.terms import Terms
from .status import cluster_url

TIMEOUT_S: Final = 10.0
_PATH: Final = "/v1/route/explain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks: what a key would say, and the request's headers (name, value)."""

    tenant: str = ""
    key: str = ""
    session: str = ""
    tags: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    def query(self) -> str:
        """As the page takes it; empty: as the key that is shown."""
        told = [("tenant", self.tenant), ("key", self.key), ("session", self.session)]
        pairs = [(name, value) for name, value in told if value] + [("tag", tag) for tag in self.tags]
        return f"?{urllib.parse.urlencode(pairs)}" if pairs else ""


class UnstartedPool:
    """An own pool of a configuration that is not running: what is known of it before it answers."""

    is_own = True
    continues: Continues = "exact"
    weights = ""
    key_id = ""

    def __init__(self, model: str) -> None:
        self.name = f"{OWN}/{model}"

    def check(self, request: ChatRequest) -> None:
        """Whether the model can do what is asked is known to its running pool alone."""

    async def whole(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> Any:
        """Raises StartupError."""
        raise self._not_running()

    def stream(self, request: ChatRequest, terms: Terms, record: AttemptRecord) -> AsyncGenerator[Any, None]:
        """Raises StartupError."""
        raise self._not_running()

    def _not_running(self) -> StartupError:
        return StartupError(f"{self.name} is not running; start `diptych serve`")


def run_explain(
    body: Mapping[str, Any],
    asker: Asker,
    *,
    as_json: bool,
    config: Path | None,
    overrides: Sequence[str],
    url: str | None,
) -> int:
    """Print; the exit code. By the file `config` where no `url` is given with it; without both, at the cluster that
    runs here.
    """
    try:
        if config is not None and url is None:
            told = offline(load_config(config, overrides), body, asker)
        else:
            told = asked(cluster_url(config, overrides, url), body, asker)
        print(json.dumps(told, indent=2) if as_json else rendered(told))
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return 0


def body_of(model: str | None, message: str | None, file: Path | None) -> dict[str, Any]:
    """The body of the request that is meant. Raises StartupError."""
    if file is not None:
        try:
            body = parse_object(file.read_bytes())
        except OSError as exc:
            raise StartupError(f"cannot read {file}: {exc.strerror or exc}") from exc
        except InvalidRequest as exc:
            raise StartupError(f"{file}: {exc.message}") from exc
        return body | ({"model": model} if model is not None else {})
    if model is None or message is None:
        raise StartupError("give --model and --message, or a whole request by --request FILE")
    return {"model": model, "messages": [{"role": "user", "content": message}]}


def offline(
    config: DiptychConfig, body: Mapping[str, Any], asker: Asker, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The explanation, as plain values. Raises StartupError and RequestError."""
    from diptych.cluster.api.overrides import overrides

    registry = Registry.load(config.providers, os.environ if environ is None else environ)
    pools = [UnstartedPool(name) for name in config.models]
    gateway = Gateway(config.gateway, registry, targets=pools, ports=money_ports(config.gateway))
    context = Context(tenant=asker.tenant, key=asker.key, session=asker.session, tags=asker.tags)
    raw = [(name.lower().encode(), value.encode()) for name, value in asker.headers]
    context = overrides(context, None, raw, readable=config.gateway.rule_headers)
    return gateway.explain(read_chat(dict(body)), context=context).told()


def asked(url: str, body: Mapping[str, Any], asker: Asker) -> dict[str, Any]:
    """The same by a server, asked with the key of the environment. Raises StartupError and RequestError."""
    sent = {**headers("", api_key()), "content-type": "application/json", **dict(asker.headers)}
    request = urllib.request.Request(
        f"{url.rstrip('/').removesuffix('/v1')}{_PATH}{asker.query()}", json.dumps(body).encode(), sent, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            told = json.load(reply)
    except urllib.error.HTTPError as exc:
        raise _refusal(url, exc) from exc
    except (OSError, ValueError) as exc:
        raise StartupError(f"{url} does not answer: {exc}") from exc
    if not isinstance(told, dict) or "candidates" not in told:
        raise StartupError(f"{url} is no Diptych cluster")
    return told


def _refusal(url: str, exc: urllib.error.HTTPError) -> DiptychError:
    try:
        message = str(json.load(exc)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return StartupError(f"{url} does not answer: {exc}")
    if exc.code == 404:
        return UnknownModel(message, "model")
    if exc.code in (401, 403):
        return Forbidden(f"{message} (the key is that of the variable DIPTYCH_API_KEY)")
    return InvalidRequest(message)


def rendered(told: Mapping[str, Any]) -> str:
    """For a terminal."""
    route = told["model"] if told["group"] == told["model"] else f"{told['model']} -> {told['group']}"
    rule = f", by the rule {told['rule']}" if told["rule"] else ""
    head = told["target"] or "no target"
    lines = [f"{route}{rule}: {head}", f"  {told['why']}"]
    if told["rules"]:
        rows = [["rule", "outcome", "why"]]
        rows += [[one["rule"], one["outcome"], one.get("words") or one["condition"]] for one in told["rules"]]
        lines += ["", table(rows)]
    if told["candidates"]:
        head_row = ["target", "of", "breaker", "score", "in work", "latency", "costs", "not asked, because"]
        lines += ["", table([head_row, *(_row(one) for one in told["candidates"])])]
        lines.append(
            f"costs: of about {told['input_tokens']} tokens in and at most {told['output_tokens']} out, by "
            f"{told['strategy']} the lowest score is chosen"
        )
    for one in told["budgets"]:
        left = "not known here yet" if one["left"] is None else f"{one['left'] * 100:.1f} % left"
        scope = f" ({one['scope']})" if one.get("scope") else ""
        lines.append(f"budget {one['budget']}{scope}: {left}" + (f"; {one['refuses']}" if one["refuses"] else ""))
    return "\n".join(printable(line, 10_000) for text in lines for line in text.split("\n"))


def _row(one: Mapping[str, Any]) -> list[str]:
    cost = one["cost"]
    return [
        one["target"],
        one["group"],
        one["state"],
        _number(one.get("score")),
        str(one.get("in_flight", "-")),
        "-" if one.get("latency_ms") is None else f"{one['latency_ms']:.0f} ms",
        "-" if cost is None else f"${cost['dollars']:.6f}".rstrip("0").rstrip("."),
        one["excluded"],
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
