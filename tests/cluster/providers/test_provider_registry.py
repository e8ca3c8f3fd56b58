"""The table is complete and strict, and what is wrong with a configuration of providers is said with the remedy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diptych.cluster.providers.clients import Clients
from diptych.cluster.providers.provider import Provider
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.settings import ProviderSettings, is_near
from diptych.cluster.providers.table import built_in, read_table
from diptych.protos.errors import InvalidRequest, StartupError
from diptych.protos.failures import ProviderFailure
from diptych.protos.openai import ChatRequest, parse_chat
from diptych.protos.providers.codecs import CODECS, by_name
from diptych.protos.providers.openai_relay import can_relay
from diptych.protos.providers.quirks import Quirks
from diptych.protos.providers.schemas import DIALECTS

EMPTY = Registry.load({}, {})
ROW = """
lab:
  title: Lab
  family: On your machines
  base_url: http://127.0.0.1:1/v1
  codec: openai.chat
  example: m
  source: https://example.com
  checked: 2026-01-31
"""


def load(environ: dict[str, str] | None = None, **providers: dict[str, object]) -> Registry:
    return Registry.load({name: ProviderSettings(**row) for name, row in providers.items()}, environ or {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vertex", "vertex_anthropic"])
def test_googles_multi_regions_have_hosts_of_their_own(name: str) -> None:
    """us-aiplatform.googleapis.com is nobody's name."""
    for region, host in (
        ("us", "aiplatform.us.rep.googleapis.com"),
        ("eu", "aiplatform.eu.rep.googleapis.com"),
        ("global", "aiplatform.googleapis.com"),
        ("europe-west4", "europe-west4-aiplatform.googleapis.com"),
    ):
        provider = load(**{name: {"account": "p", "region": region}}).provider(name)
        assert provider.host == host
        assert f"/projects/p/locations/{region}/" in provider.base_url


def test_the_table_covers_what_it_promises() -> None:
    names = {provider.name for provider in EMPTY}
    assert len(names) >= 40
    wanted = "openai azure anthropic google vertex vertex_anthropic bedrock bedrock_anthropic mistral groq xai cohere"
    wanted += " together fireworks deepseek openrouter perplexity cerebras nvidia ollama lmstudio llamacpp vllm sglang"
    assert set(wanted.split()) <= names
    assert {provider.codec for provider in EMPTY} == set(CODECS)


@pytest.mark.parametrize("provider", EMPTY, ids=str)
def test_a_row_of_the_table_is_sound(provider: Provider) -> None:
    entry = built_in()[provider.name]
    assert provider.auth in ("google", "aws") or entry.keys or provider.keyless
    assert provider.keyless or entry.base_url.startswith("https://")
    is_local = is_near(entry.base_url.replace("{account}", "x.example"))
    assert bool(provider.keyless) == entry.base_url.startswith("http://") == is_local
    assert provider.quirks.family
    assert provider.quirks.schema_dialect in DIALECTS
    assert provider.auth != "aws" or entry.service
    assert not entry.base_url.endswith("/")
    assert set(re.findall(r"{(\w+)}", entry.base_url)) <= {"account", "region"}
    assert ("{account}" in entry.base_url) == (entry.account is not None)
    assert entry.region is not None or "{region}" not in entry.base_url


@pytest.mark.parametrize("provider", EMPTY, ids=str)
def test_every_provider_can_be_used_once_it_has_what_it_asks_for(provider: Provider) -> None:
    """What the sentence names is what helps."""
    environ: dict[str, str] = {}
    for _ in range(3):
        registry = Registry.load({}, environ)
        fault = registry.fault(registry.provider(provider.name))
        if not fault:
            break
        variables = re.findall(r"\$([A-Z0-9_]+)", fault)
        if variables:
            environ[variables[0]] = "x-1"
            continue
        (what,) = re.findall(rf"providers\.{provider.name}\.(account|region)", fault)
        registry = load({**environ, "DATABRICKS_TOKEN": "x"}, **{provider.name: {what: "x-1"}})
        assert registry.fault(registry.provider(provider.name)) == ""
        break
    else:
        pytest.fail(fault)
    usable = registry.provider(provider.name)
    assert "{" not in usable.base_url
    assert urlsplit(usable.base_url).hostname
    assert Clients(registry).of(usable).provider is usable


@pytest.mark.parametrize("provider", EMPTY, ids=str)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_plain_request_goes_to_every_provider_with_nothing_lost(provider: Provider, is_stream: bool) -> None:
    request = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            "max_completion_tokens": 9,
            "temperature": 0.5,
        }
    )
    example = built_in()[provider.name].example
    codec = by_name(provider.codec)
    outgoing = codec.encode(request, model=example, stream=is_stream, quirks=provider.quirks)
    lost = [note for note in outgoing.unsupported if note.field != "temperature"]  # some models refuse it
    assert not lost
    assert "be kind" in json.dumps(outgoing.body)
    assert " " not in outgoing.path


@pytest.mark.parametrize(("name", "said"), [("groq", ["high", "high"]), ("xai", ["xhigh", "high"])])
def test_an_effort_that_a_provider_refuses_is_the_nearest_that_it_knows(name: str, said: list[str]) -> None:
    """Clients that want the most of every model got its 400."""
    provider, found = EMPTY.provider(name), []
    for effort in ("xhigh", "max"):
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "reasoning_effort": effort}
        request = parse_chat(json.dumps(body).encode())
        assert not can_relay(body, provider.quirks)
        outgoing = by_name(provider.codec).encode(request, model="m", stream=False, quirks=provider.quirks)
        found.append(outgoing.body["reasoning_effort"])
        assert bool(outgoing.notes) == (found[-1] != effort)
    assert found == said


def test_an_address_with_a_region_is_the_regions() -> None:
    environ = {"GOOGLE_CLOUD_PROJECT": "proj", "AWS_DEFAULT_REGION": "eu-west-1"}
    registry = load(environ, vertex={"region": "europe-west4"}, moonshot={"region": "cn"})
    assert registry.provider("vertex").base_url.startswith(
        "https://europe-west4-aiplatform.googleapis.com/v1/projects/proj/locations/europe-west4/"
    )
    assert registry.provider("vertex_anthropic").host == "aiplatform.googleapis.com"
    assert registry.provider("bedrock").host == "bedrock-runtime.eu-west-1.amazonaws.com"
    assert registry.provider("moonshot").host == "api.moonshot.cn"


WRONG_TABLES = {
    "unknown key": (ROW + "  base: 1\n", "lab.base: "),
    "unknown key inside": (ROW + "  account: {envs: [A], words: x}\n", "lab.account.envs: "),
    "unknown quirk": (ROW + "  quirks: {stream_usag: false}\n", "did you mean stream_usage"),
    "quirk of another type": (ROW + "  quirks: {stream_usage: 'no'}\n", "lab.quirks: .*stream_usage"),
    "unknown codec": (ROW.replace("openai.chat", "openai.chats"), "did you mean openai.chat"),
    "unknown scheme": (ROW + "  auth: cookie\n", "lab.auth: "),
    "two of one name": (ROW + ROW.replace("Lab", "Lob"), "two entries have the name lab"),
    "two of one key": (ROW + "  title: Lob\n", "two entries have the name title"),
    "no name": (ROW.replace("lab:", "Lab:"), "'Lab' cannot be"),
    "an own pool's name": (ROW.replace("lab:", "pool:"), "'pool' cannot be"),
    "no date": (ROW.replace("2026-01-31", "soon"), "lab.checked: "),
    "no list": ("[1]", "group of keys"),
    "no yaml": ("a: [", "not valid YAML"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_refused_by_its_path(name: str) -> None:
    text, words = WRONG_TABLES[name]
    with pytest.raises(StartupError, match=words):
        read_table(text)


WRONG_SETTINGS: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    "unknown": ({"grok": {}}, r"providers\.grok is not a built-in provider: did you mean groq\?"),
    "unlike any": ({"zzz": {}}, r"providers\.zzz .* names base_url.*`ollama serve`"),
    "no key said": (
        {"lab": {"base_url": "http://10.0.0.7/v1"}},
        r"providers\.lab\.api_key is missing: .*write none",
    ),
    "no region said": (
        {"lab": {"base_url": "https://x.test", "codec": "bedrock.converse"}},
        r"providers\.lab\.region is missing",
    ),
    "two of one name": (
        {"groq": {"base_url": "https://evil.test/v1"}},
        r"providers\.groq\.base_url is not Groq's own .*api_key .*another name for it: groq is a built-in",
    ),
    "upper case": ({"Groq": {}}, "write groq"),
    "own pools": ({"pool": {}}, "what own pools are called by"),
    "plain http": (
        {"lab": {"base_url": "http://x.example.com/v1", "api_key": "env:X"}},
        r"plain http.*providers\.lab\.allow_plaintext",
    ),
    "no account": ({"groq": {"account": "x"}}, r"providers\.groq\.account: groq's address has no account"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_wrong_configuration_is_told_with_the_remedy(name: str) -> None:
    given, words = WRONG_SETTINGS[name]
    with pytest.raises(StartupError, match=words):
        load({}, **given)


WRONG_FIELDS = {
    "base_url": [
        "https://u:p@x/v1",
        "ftp://x",
        "x/v1",
        "https://",
        "https://x/v1?a=1",
        "https://x/v1#a",
        "https://x/ v1",
        "https://x:0/",
        "https://x:99999/",
        "https://[::1/",
        "https://x/v1/chat/completions",
        "file:///etc/passwd",
    ],
    "codec": ["openai"],
    "auth": ["cookie", 1],
    "account": ["evil.com/x", "a b", "", "@evil"],
    "quirks": [{"stream_usag": True}, {"most_stops": "4"}, {"rename": []}],
    "headers": [{"authorization": "x"}, {"Host": "x"}, {"a b": "x"}, {"x": "a\r\nb"}],
    "proxy": ["http://u:p@proxy:1", "socks5://x"],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, some in WRONG_FIELDS.items() for value in some])
def test_a_field_that_could_lead_elsewhere_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        ProviderSettings(**{field: value})  # type: ignore[arg-type]
    assert ":p@" not in str(caught.value)


def test_a_changed_provider_keeps_the_rest_of_its_row() -> None:
    registry = load(
        {},
        groq={"quirks": {"stream_usage": False}, "headers": {"x-team": "a"}, "max_connections": 3},
        ollama={"base_url": "http://10.0.0.9:11434/v1", "api_key": "none"},
    )
    groq = registry.provider("groq")
    assert (groq.quirks.stream_usage, groq.quirks.reasoning_field, groq.max_connections) == (False, "reasoning", 3)
    assert registry.provider("ollama").base_url == "http://10.0.0.9:11434/v1"
    assert registry.configured == {"groq", "ollama"}


def test_an_own_provider_shows_its_key_as_its_formats_maker_does() -> None:
    row = {"base_url": "https://x.test/v1", "api_key": "env:X"}
    registry = load({}, a={**row}, b={**row, "codec": "anthropic.messages"}, c={**row, "codec": "gemini.generate"})
    assert [registry.provider(name).auth for name in "abc"] == ["bearer", "x-api-key", "x-goog-api-key"]
    assert registry.provider("a").quirks == Quirks()
    assert registry.provider("a").reads_urls == ()


@settings(max_examples=60)
@given(model=st.text("abcXYZ09._:@-/", min_size=1, max_size=60))
def test_a_target_is_the_provider_and_all_behind_the_first_slash(model: str) -> None:
    provider, name = EMPTY.target(f"groq/{model}")
    assert (provider.name, name) == ("groq", model)


@pytest.mark.parametrize("name", ["", "groq", "groq/", "/x", "nope/x", "groq/a b", "groq/" + "x" * 300, "groq/\n"])
def test_what_is_no_target_is_the_clients_mistake(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        EMPTY.target(name)
    assert caught.value.param == "model"


def test_a_proxy_of_the_environment_is_for_https_alone() -> None:
    """A proxy of plain http would read the key of a local server, and $HTTP_PROXY is no word about local servers."""
    environ = {"HTTPS_PROXY": "http://proxy:3128", "HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "x.test,.groq.com"}
    registry = load(environ, lab={"base_url": "https://x.test/v1", "api_key": "none"})
    found = {name: registry.provider(name).proxy for name in ("openai", "ollama", "lab", "groq")}
    assert found == {"openai": "http://proxy:3128", "ollama": "", "lab": "", "groq": ""}
    assert load({"https_proxy": "proxy:3128"}).provider("openai").proxy == "http://proxy:3128"
    socks = load({"https_proxy": "socks5://proxy:1", "OPENAI_API_KEY": "x"})
    assert "$NO_PROXY" in socks.fault(socks.provider("openai"))


async def test_a_provider_that_lacks_a_name_is_refused_before_a_connection_is_made() -> None:
    with pytest.raises(ProviderFailure, match=r"providers\.azure\.account"):
        Clients(EMPTY).of(EMPTY.provider("azure"))
    with pytest.raises(StartupError, match=r"set \$GROQ_API_KEY"):
        EMPTY.check("groq/x")
    with pytest.raises(StartupError, match="did you mean groq"):
        EMPTY.check("grok/x")


def test_the_process_that_uses_it_loads_neither_torch_nor_the_clouds_packages() -> None:
    code = (
        "import sys; from diptych.cluster.providers.clients import Clients; "
        "from diptych.cluster.providers.registry import Registry; Clients(Registry.load({}, {})); "
        "print(sorted({'torch', 'ray', 'transformers', 'botocore', 'google.auth', 'openai'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
