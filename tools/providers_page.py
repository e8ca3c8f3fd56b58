"""`make docs`: write docs/providers.md and a page for each family of providers, from the built-in table and what the
codecs do. tests/docs compares the two.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.table import Entry, built_in
from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import parse_chat
from diptych.protos.providers.codecs import by_name
from diptych.protos.providers.quirks import Quirks

DOCS = Path(__file__).resolve().parents[1] / "docs"
INDEX = "providers.md"
MADE = (
    "Made by `make docs` from\n`cluster/providers/providers.yaml` and the codecs of `protos/providers/`; do not edit."
)
HEAD = f"""# Providers

The outside services that a target `PROVIDER/MODEL` can name. {MADE}

`diptych providers list` shows the same with your keys; `diptych providers test PROVIDER/MODEL` sends a request for one
token. Own ones are described under `providers:` of `diptych.yaml` ([configuration.md](configuration.md#providersname)):
`base_url`, `codec`, `api_key` and what differs.

| family | providers |
|---|---|"""
LEGEND = """- *key*: the first of the variables that is set. `providers.NAME.api_key` names another place: `env:NAME`,
  `file:/path`. A key goes to the host of the address and nowhere else; no redirect is followed.
- *checked*: when address, variable and codec were compared with public copies of the source, of SDKs or of others'
  tables. Nothing was tried with a key.
- *differs*: from what the maker of the wire format does, in
  [these words](../providers.md#what-the-words-of-differs-mean)."""
# Of each family of the table: the page's name and what its providers have in common.
FAMILIES = {
    "Model makers": (
        "model-makers",
        "Who trains models and serves them. OpenAI, Anthropic and Google have wire formats of their own. What only a\n"
        "provider knows of a turn (signatures of reasoning, sealed items, parts of tools that ran there) goes back to\n"
        "it verbatim with the next turn, and to nobody else.",
    ),
    "Clouds": (
        "clouds",
        "Others' models within a cloud's own account, region and credentials. An address has a place for the account\n"
        "or the region; where neither the configuration nor a variable names it, the error says which.",
    ),
    "Hosts of open models": (
        "open-models",
        "Who serves models whose weights are public. All speak OpenAI's chat format, each with a few differences; the\n"
        "same model at two hosts is two targets of a route.",
    ),
    "Gateways": (
        "gateways",
        "Who passes requests on to others. What a model can do depends on where it is served behind the gateway.",
    ),
    "On your machines": (
        "your-machines",
        "Servers that you run yourself, most of them without a key. An own pool needs none of these: it is the target\n"
        "`pool/MODEL`.",
    ),
}
MEANINGS = {
    "family": "by which name `provider_data` and `provider_options` are this provider's; by default its own",
    "rename": "fields with another name here; those that OpenAI's format lacks are sent where they stand here",
    "unsupported": "fields that the provider refuses or ignores: see `on_unsupported` of a route",
    "system_role": "how instructions are sent; developer: both roles are known",
    "flattens_content": "contents are strings, never lists of parts",
    "stream_usage": "`stream_options.include_usage` is known",
    "tool_choice": "which of its values are known",
    "parallel_tools": "`parallel_tool_calls` is known",
    "schema_dialect": "what schemas of answers and tools are rewritten to; openai: any, as a wish; none: none are sent",
    "reasoning_field": "of messages and of pieces of a stream",
    "effort_field": "where the effort of reasoning is said, a dotted path; none: nowhere",
    "effort_values": "ours to theirs; one that is not here goes as it is",
    "replay_reasoning": "whether reasoning goes back with the messages",
    "most_stops": "most stop strings of a request",
    "prefill": "an answer goes on from a last message of the assistant",
    "prefill_field": "a field of that message which must be true for it",
    "default_max_tokens": "sent where the request names no limit",
    "error_in_200": "errors come with the status 200, too",
    "media": "kinds that can be sent",
    "tells_parts": "deltas tell finished parts of a JSON answer as `structured`, where a request asks",
    "extra_body": "always sent",
    "headers": "always sent",
}


# What a client can ask for, by the field of POST /v1/chat/completions, with a value that asks for something.
ASKED: dict[str, Any] = {
    "max_tokens": 100,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["x"],
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "logprobs": True,
    "reasoning_effort": "low",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "response_format: json_object": {"type": "json_object"},
    "response_format: json_schema": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
    },
    "guided_regex": "a+",
    "user": "u",
    "continue_final_message": True,
}
# Whose answer stands for a format: the maker's own provider, with a model of which all is known.
MAKERS = {
    "openai": "gpt-4.1",
    "openai_responses": "gpt-5.1",
    "anthropic": "claude-sonnet-4-5",
    "google": "gemini-2.5-flash",
    "bedrock": "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
}


def pages() -> dict[str, str]:
    """All pages by their paths below docs/."""
    families: dict[str, dict[str, Entry]] = {}
    for name, entry in built_in().items():
        families.setdefault(entry.family, {})[name] = entry
    found = {INDEX: _index(families)}
    for family, rows in families.items():
        found[f"providers/{FAMILIES[family][0]}.md"] = _page(family, rows)
    return found


def write() -> list[Path]:
    """The files, and none besides them."""
    made = pages()
    (DOCS / "providers").mkdir(exist_ok=True)
    for path in (DOCS / "providers").glob("*.md"):
        if f"providers/{path.name}" not in made:
            path.unlink()
    for name, text in made.items():
        (DOCS / name).write_text(text)
    return [DOCS / name for name in made]


def _index(families: Mapping[str, Mapping[str, Entry]]) -> str:
    lines = [HEAD]
    for family, rows in families.items():
        page = f"providers/{FAMILIES[family][0]}.md"
        links = ", ".join(f"[{name}]({page}#{_anchor(entry.title)})" for name, entry in rows.items())
        lines.append(f"| [{family}]({page}) | {links} |")
    lines += ["", "## What each format has words for", "", *_abilities()]
    lines += ["", "## What the words of *differs* mean", "", *_meanings(), ""]
    return "\n".join(lines)


def _page(family: str, rows: Mapping[str, Entry]) -> str:
    lines = [f"# {family}", "", FAMILIES[family][1], "", f"{MADE} [All families](../{INDEX}).", "", LEGEND, ""]
    lines += ["```yaml", *_example(rows), "```", ""]
    for name, entry in rows.items():
        lines += [f"## {entry.title}", "", *_section(name, entry), ""]
    return "\n".join(lines)


def _example(rows: Mapping[str, Entry]) -> Iterator[str]:
    """Two of them behind one name, the second for when the first fails."""
    chosen = list(rows.items())[:3:2] if len(rows) > 2 else list(rows.items())
    yield "providers:"
    for name, entry in chosen:
        places = {"account": entry.account, "region": entry.region}
        needed = [f"{what}: my-{what}" for what, place in places.items() if place is not None and not place.default]
        yield f"  {name}: {{{', '.join(needed)}}}"
    first, *others = [f"{name}/{entry.example}" for name, entry in chosen]
    yield "gateway:"
    yield "  routes:"
    yield f"    chat: {{targets: ['{first}'], fallback: [{', '.join(repr(other) for other in others)}]}}"


def _abilities() -> Iterator[str]:
    """What becomes of each field, as the codecs themselves say."""
    registry = Registry.load({}, {"AWS_REGION": "eu-west-1"})
    yield "What a provider's format cannot say is never left out in silence: by default the request is refused with"
    yield "the field's name; `on_unsupported: warn` or `drop` of a route leaves it out and tells. Of the makers' own"
    yield "services: others differ as their page says, and models among themselves."
    yield ""
    yield "| field | " + " | ".join(f"`{registry.provider(name).codec}`" for name in MAKERS) + " |"
    yield "|---|" + "---|" * len(MAKERS)
    for asked, value in ASKED.items():
        cells = (_ability(registry, name, asked.partition(":")[0], value) for name in MAKERS)
        yield f"| `{asked}` | {' | '.join(cells)} |"


def _ability(registry: Registry, name: str, field: str, value: Any) -> str:
    provider = registry.provider(name)
    messages = [{"role": "user", "content": "hi"}]
    if field == "continue_final_message":
        messages.append({"role": "assistant", "content": "Once"})
    body = {"model": "m", "messages": messages, field: value}
    if field == "continue_final_message":
        body["add_generation_prompt"] = False
    request = parse_chat(json.dumps(body).encode())
    try:
        sent = by_name(provider.codec).encode(request, model=MAKERS[name], stream=False, quirks=provider.quirks)
    except InvalidRequest:
        return "refused"
    notes = [note for note in sent.notes if note.field.partition(".")[0].partition("[")[0] == field]
    if any(note.kind == "unsupported" for note in notes):
        return "no"
    return next((note.kind for note in notes), "yes")


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")


def _section(name: str, entry: Entry) -> Iterator[str]:
    yield f"`{name}/{entry.example}`, for example. [Source]({entry.source}), checked {entry.checked}."
    yield ""
    yield f"- address: `{entry.base_url}`, codec `{entry.codec}`"
    for region, url in entry.region_base_urls.items():
        yield f"- address where the region is `{region}`: `{url}`"
    for what, place in (("account", entry.account), ("region", entry.region)):
        if place is not None:
            names = " or ".join(f"`${variable}`" for variable in place.env)
            default = f"; by default `{place.default}`" if place.default else ""
            yield f"- {what}: {place.words}: `providers.{name}.{what}`{', else ' + names if names else ''}{default}"
    variables = " or ".join(f"`${variable}`" for variable in entry.keys)
    yield f"- key: {variables or 'none'}, shown as `{entry.auth}`"
    if entry.keyless:
        yield f"- without a key: {entry.keyless}"
    if not entry.reads_urls:
        yield "- media behind addresses are fetched here and sent as bytes"
    elif "https://" not in entry.reads_urls:
        own = ", ".join(f"`{url}`" for url in entry.reads_urls)
        yield f"- media behind addresses are fetched here and sent as bytes, but for {own}"
    if differs := _differs(entry.quirks):
        yield f"- differs: {differs}"
    if entry.notes:
        yield f"- {entry.notes}"


def _differs(given: Mapping[str, Any]) -> str:
    return "; ".join(f"`{name}` {_value(value)}" for name, value in given.items() if name != "family")


def _value(value: object) -> str:
    if isinstance(value, dict):
        changed = [f"`{key}` as `{other}`" if key != other else f"`{key}` as it is" for key, other in value.items()]
        return ", ".join(changed)
    if isinstance(value, list):
        return ", ".join(f"`{one}`" for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"`{value}`" if value != "" else "none"


def _meanings() -> Iterator[str]:
    yield "| word | default | meaning |"
    yield "|---|---|---|"
    defaults, hints = Quirks(), get_type_hints(Quirks)
    for field in dataclasses.fields(Quirks):
        value, hint = getattr(defaults, field.name), hints[field.name]
        told = _value(sorted(value) if isinstance(value, frozenset) else value) if value not in (None, {}) else "none"
        choices = f" ({_value(list(get_args(hint)))})" if get_origin(hint) is Literal else ""
        yield f"| `{field.name}` | {told} | {MEANINGS[field.name]}{choices} |"


if __name__ == "__main__":
    for written in write():
        print(f"written: {written}")
