"""The verbs `diptych providers list` and `diptych providers test`: which there are, and whether one answers.

No key is ever printed: only where it is looked for, and whether it is there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from diptych.cluster.config import DiptychConfig, load_config
from diptych.protos.errors import DiptychError
from diptych.protos.failures import FailureKind, ProviderFailure
from diptych.protos.openai import ChatRequest
from diptych.protos.providers.codecs import by_name
from diptych.protos.replies import Reply

from .clients import Clients
from .provider import Provider
from .registry import Registry
from .terms import HttpExchange, Terms, Timeouts

_FEWEST_TOKENS: Final = {"openai.responses": 16}  # OpenAI refuses fewer there
REMEDIES: Final[Mapping[FailureKind, str]] = {
    FailureKind.BAD_REQUEST: "the provider refuses the request itself: is the model one for chats?",
    FailureKind.UNSUPPORTED: "try another model of this provider",
    FailureKind.CONTEXT_LENGTH: "try another model of this provider",
    FailureKind.CONTENT_POLICY: "try another model of this provider",
    FailureKind.AUTH: "see whether the key is right, of this provider, and may use this model",
    FailureKind.NOT_FOUND: "look the model's name up at the provider's page; is base_url right?",
    FailureKind.RATE_LIMITED: "wait, or ask the provider for a higher limit",
    FailureKind.QUOTA: "pay the provider, or raise the key's budget there",
    FailureKind.OVERLOADED: "try again later",
    FailureKind.SERVER: "try again later; is base_url right?",
    FailureKind.CONNECT: "see whether the server runs and this machine reaches it: name, firewall, proxy "
    "(providers.NAME.proxy)",
    FailureKind.FIRST_TOKEN_TIMEOUT: "a model that is loaded anew takes its time: try again",
    FailureKind.IDLE_TIMEOUT: "try again later",
    FailureKind.TOTAL_TIMEOUT: "try again, or give it more time with --timeout",
    FailureKind.CANCELLED: "try again",
}


def run_list(*, as_json: bool, place: Callable[[], DiptychConfig]) -> int:
    """Print all providers that can be named; the exit code."""

    def show() -> None:
        registry = Registry.load(place().providers)
        rows = [_row(registry, provider) for provider in registry]
        if as_json:
            print(json.dumps(rows, indent=2))
            return
        head = ["", "name", "codec", "key", "needs", "without a key: start", "source", "checked"]
        marks = {True: "set", False: "-"}
        lines = [
            [
                "*" if row["configured"] else "",
                row["name"],
                row["codec"],
                f"{row['key']} ({marks[row['has_key']]})" if row["key"] else row["auth"],
                row["lacks"].partition(":")[0].removeprefix(f"{row['name']} needs "),
                row["keyless"],
                row["source"],
                row["checked"],
            ]
            for row in rows
        ]
        print(_table([head, *lines]))
        print("* in the configuration. PROVIDER/MODEL names a model; `diptych providers test PROVIDER/MODEL` asks it.")

    return _told(show)


def run_test(target: str, *, timeout_s: float, as_json: bool, place: Callable[[], DiptychConfig]) -> int:
    """Send one short request; print how long it took and what it cost, or what went wrong. The exit code: 0 for an
    answer.
    """
    found: dict[str, Any] = {}

    def ask() -> None:
        registry = Registry.load(place().providers)
        provider, model = registry.check(target)
        found.update(asyncio.run(_asked(registry, provider, model, timeout_s)))
        print(json.dumps(found, indent=2) if as_json else _words(target, found))

    code = _told(ask)
    return code or ("failure" in found)


def place_of(config: Path | None, overrides: Sequence[str] | None) -> Callable[[], DiptychConfig]:
    """The configuration that is meant; raises StartupError when it is called."""
    return lambda: load_config(config, overrides or [])


async def _asked(registry: Registry, provider: Provider, model: str, timeout_s: float) -> dict[str, Any]:
    num_tokens = _FEWEST_TOKENS.get(provider.codec, 1)
    request = ChatRequest.model_validate(
        {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": num_tokens}
    )
    exchange, clients = HttpExchange(), Clients(registry)
    timeouts = Timeouts(connect_s=min(timeout_s, 10.0), answer_s=timeout_s, idle_s=timeout_s, total_s=timeout_s)
    told: dict[str, Any] = {"target": f"{provider.name}/{model}", "host": provider.host, "codec": provider.codec}
    try:
        outgoing = by_name(provider.codec).encode(request, model=model, stream=False, quirks=provider.quirks)
        reply = await clients.of(provider).whole(outgoing, Terms.within(timeouts), exchange)
        told |= _answered(reply)
    except ProviderFailure as exc:
        failure = exc.failure
        told["failure"] = {
            "kind": failure.kind.value,
            "message": failure.message,
            "remedy": _remedy(failure.kind, provider),
        }
    finally:
        await clients.close()
    for name, value in (("status", exchange.status), ("request_id", exchange.request_id), ("limits", exchange.limits)):
        if value:
            told[name] = value
    if exchange.began_at is not None and exchange.ended_at is not None:
        told["seconds"] = round(exchange.ended_at - exchange.began_at, 3)
    return told


def _remedy(kind: FailureKind, provider: Provider) -> str:
    if kind is FailureKind.CONNECT and provider.keyless:
        return f"start it: {provider.keyless}; or name its address by providers.{provider.name}.base_url"
    return REMEDIES[kind].replace("NAME", provider.name)


def _answered(reply: Reply) -> dict[str, Any]:
    usage = {name: count for name in reply.usage.__slots__ if (count := getattr(reply.usage, name)) is not None}
    return {"model": reply.began.model, "finish": reply.ended.finish, "usage": usage}


def _words(target: str, told: Mapping[str, Any]) -> str:
    took = f" after {told['seconds']:.2f} s" if "seconds" in told else ""
    if "failure" in told:
        failure = told["failure"]
        status = f", status {told['status']}" if "status" in told else ""
        known = f" (request {told['request_id']})" if "request_id" in told else ""
        return f"{target}: {failure['kind']}{status}{took}{known}: {failure['message']}\n  {failure['remedy']}"
    usage = told["usage"]
    tokens = f"{usage.get('input_tokens', '?')} tokens in, {usage.get('output_tokens', '?')} out"
    model = f" by {told['model']}" if told["model"] else ""
    return f"{target}: answered{model}{took}; {tokens}"


def _row(registry: Registry, provider: Provider) -> dict[str, Any]:
    return {
        "name": provider.name,
        "title": provider.title,
        "configured": provider.name in registry.configured,
        "base_url": provider.base_url,
        "codec": provider.codec,
        "auth": provider.auth,
        "key": str(provider.key) if provider.key.kind != "none" else "",
        "has_key": registry.has_key(provider),
        "keyless": provider.keyless,
        "lacks": provider.lacks,
        "source": provider.source,
        "checked": provider.checked,
    }


def _told(work: Callable[[], None]) -> int:
    try:
        work()
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        return 1
    return 0


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
