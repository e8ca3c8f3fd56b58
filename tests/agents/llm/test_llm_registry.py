"""A reference leads to one place, with one key, for whoever asks; an override holds where it is, and nowhere else.

Guards against one tenant's key in another's request, keys in errors and reprs, an override that outlives its block or
crosses to another thread, and against a program that must be begun anew because a variable was missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm import registry as module
from diptych.agents.llm.testing import EchoModel, ScriptedModel, registry_of

SECRET = "sk-very-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Answers each chat with who asked: its authorization and its tenant."""

    daemon_threads = True
    asked: list[dict[str, str]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        who = f"{self.headers.get('authorization', '')}|{self.headers.get('x-tenant', '')}|{self.path}"
        self.server.asked.append({name.lower(): value for name, value in self.headers.items()})
        answer = {
            "id": "1", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": who}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@llm.call()
def who() -> str:
    return "who am I?"


def test_two_tenants_ask_at_once_each_with_its_own_key(server: Server) -> None:
    """Over one real connection pool each, from many threads and from tasks of one loop."""
    lab = {"lab": {"base_url": f"{server.url}/v1", "api_key": "env:LAB"}}
    tenants = [
        llm.Registry(providers=lab, keys={"lab": "key-of-ada"}, environ={}),
        llm.Registry(providers=lab, keys={"lab": "key-of-bob"}, environ={}),
        llm.Registry(clusters={"lab": llm.Cluster(url=server.url, key="key-of-eve", tenant="eve")}, environ={}),
    ]
    names = ["Bearer key-of-ada||/v1/chat/completions", "Bearer key-of-bob||/v1/chat/completions",
             "Bearer key-of-eve|eve|/v1/chat/completions"]  # fmt: skip

    def one(at: int) -> bool:
        with llm.using("lab/m", registry=tenants[at % 3]):
            return bool(who().text == names[at % 3])

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(36)))

    async def task(at: int) -> bool:
        with llm.using("lab/m", registry=tenants[at % 3]):
            await asyncio.sleep(0)
            return (await who.aio()).text == names[at % 3]

    async def all_of_them() -> list[bool]:
        return list(await asyncio.gather(*map(task, range(36))))

    assert all(asyncio.run(all_of_them()))


def test_the_cluster_is_the_one_of_the_environment(server: Server) -> None:
    environ = {"DIPTYCH_URL": f"{server.url}/v1/", "DIPTYCH_API_KEY": " key-of-env "}
    with llm.using("pool/m", registry=llm.Registry(environ=environ)):
        assert who().text == "Bearer key-of-env||/v1/chat/completions"
    with llm.using("pool/m", registry=llm.Registry(environ={"DIPTYCH_URL": server.url})):
        assert who().text == "||/v1/chat/completions"


def test_the_key_of_the_environment_goes_to_no_other_address(server: Server) -> None:
    """The host of each cluster without a key of its own learnt it."""
    environ = {"DIPTYCH_URL": "http://127.0.0.1:1", "DIPTYCH_API_KEY": "key-of-env"}
    registry = llm.Registry(clusters={"east": llm.Cluster(url=server.url)}, environ=environ)
    with llm.using("east/m", registry=registry):
        assert who().text == "||/v1/chat/completions"


def test_an_address_that_is_none_is_told_without_what_it_may_hold() -> None:
    for url in ("localhost:8000", "ftp://a", f"http://u:{SECRET}@host:1"):
        with pytest.raises(llm.UsageError, match="pool: the address of a cluster should") as caught:
            llm.Registry(environ={"DIPTYCH_URL": url}).resolve("pool/m")
        assert SECRET not in str(caught.value)


def test_keys_are_shown_to_nobody() -> None:
    cluster = llm.Cluster(url="http://127.0.0.1:1", key=SECRET)
    registry = llm.Registry(clusters={"east": cluster}, keys={"openai": SECRET}, environ={})
    upstream, _ = registry.resolve("openai/m")
    shown = [repr(cluster), repr(registry), str(vars(upstream)), repr(upstream), repr(registry.resolve("east/m"))]
    for make in (
        lambda: llm.Registry(providers={"lab": {"base_url": "http://a/v1", "api_key": SECRET}}).resolve("lab/m"),
        lambda: llm.Registry(providers={"lab": {"base_url": SECRET}}).resolve("lab/m"),
        lambda: llm.Registry(providers={"lab": {"key": SECRET}}).resolve("lab/m"),
        lambda: llm.Registry(keys={"lab": SECRET}, environ={}).resolve("openai/m"),
        lambda: llm.Registry(keys={"openai": f"{SECRET}\n"}),
        lambda: llm.Registry(keys={"openai": ""}),
        lambda: llm.Cluster(key=f"{SECRET} "),
        lambda: registry.resolve("opanai/m"),
    ):  # fmt: skip
        with pytest.raises(llm.UsageError) as caught:
            make()
        shown += [str(caught.value), repr(caught.value)]
    assert not [words for words in shown if "very-secret" in words]


def test_providers_with_names_that_look_alike_keep_their_own_keys(server: Server) -> None:
    names = ("lab-1", "lab.1", "lab_1")
    providers = {name: {"base_url": f"{server.url}/v1", "api_key": "none"} for name in names}
    registry = llm.Registry(providers=providers, keys={name: f"key-{at}" for at, name in enumerate(names)}, environ={})
    for at, name in enumerate(names):
        with llm.using(f"{name}/m", registry=registry):
            assert who().text.startswith(f"Bearer key-{at}|")


def test_a_key_that_comes_later_is_found_without_a_new_registry() -> None:
    environ: dict[str, str] = {}
    registry = llm.Registry(environ=environ)
    with pytest.raises(llm.UsageError, match=r"ANTHROPIC_API_KEY.*or give Registry\(keys=\{'anthropic': \.\.\.\}\)"):
        registry.resolve("anthropic/m")
    environ["ANTHROPIC_API_KEY"] = "k"
    assert registry.resolve("anthropic/m")[1] == "m"


@pytest.mark.parametrize("reference", ["", "m", "/m", "pool/", "pool", None, 7, ["pool/m"]])
def test_what_is_no_reference_is_told_how_one_looks(reference: Any) -> None:
    with pytest.raises(llm.UsageError, match="write PREFIX/MODEL, for example pool/smollm2-135m-instruct"):
        llm.Registry(environ={}).resolve(reference)


def test_a_prefix_that_nobody_has_is_told_with_what_is_close_and_what_is_there() -> None:
    registry = registry_of(mine=EchoModel())
    with pytest.raises(llm.UsageError, match=r"did you mean mistral\?; own targets here: mine, pool"):
        registry.resolve("mistrall/m")
    for name in ("", "Lab", "a b", "a/b"):
        with pytest.raises(llm.UsageError, match="is no prefix"):
            registry.add(name, EchoModel())


def test_what_is_added_holds_also_while_others_resolve() -> None:
    registry = llm.Registry(environ={"DIPTYCH_URL": "http://127.0.0.1:1"})
    mine = EchoModel()
    start = threading.Barrier(9)

    def resolve() -> None:
        start.wait()
        for _ in range(50):
            registry.resolve("pool/m")

    threads = [threading.Thread(target=resolve) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    registry.add("pool", mine)
    for thread in threads:
        thread.join()
    assert registry.resolve("pool/m")[0] is mine


def test_many_threads_find_one_upstream_and_one_default(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = llm.Registry(keys={"openai": "k"}, environ={})
    with ThreadPoolExecutor(16) as pool:
        assert len({id(found[0]) for found in pool.map(registry.resolve, ["openai/m"] * 64)}) == 1
        monkeypatch.setattr(module, "_default", None)
        assert len({id(one) for one in pool.map(lambda _: llm.default_registry(), range(64))}) == 1


# Overrides.


def asked(model: ScriptedModel) -> str:
    return str(model.requests[-1]["model"])


def test_blocks_lie_in_blocks_and_end_with_errors_too() -> None:
    model = ScriptedModel([], then="ok")
    registry = registry_of(a=model)

    def ask() -> tuple[str, Any]:
        who()
        return asked(model), model.requests[-1].get("temperature")

    with llm.using("a/1", registry=registry, temperature=0.5):
        assert ask() == ("1", 0.5)
        with contextlib.suppress(ZeroDivisionError), llm.using("a/2"):
            assert ask() == ("2", 0.5)
            with llm.using(temperature=0.7):
                assert ask() == ("2", 0.7)
                raise ZeroDivisionError
        assert ask() == ("1", 0.5)
    with pytest.raises(llm.UsageError, match="is no model"):
        who()


def test_an_override_does_not_cross_to_other_threads_or_tasks() -> None:
    async def inner(at: int) -> tuple[str | None, str | None]:
        with llm.using(f"a/{at}"):
            await asyncio.sleep(0)
            before = module.current().model
            await asyncio.sleep(0)
            return before, module.current().model

    async def outer() -> None:
        found = await asyncio.gather(*map(inner, range(20)))
        assert found == [(f"a/{at}", f"a/{at}") for at in range(20)]
        with llm.using("a/parent"):
            assert await asyncio.create_task(inner(1)) == ("a/1", "a/1")
            assert module.current().model == "a/parent"
        assert module.current().model is None

    asyncio.run(outer())
    seen: list[str | None] = []
    with llm.using("a/mine"):
        thread = threading.Thread(target=lambda: seen.append(module.current().model))
        thread.start()
        thread.join()
    assert seen == [None]


async def test_a_block_in_a_generator_that_ends_elsewhere_does_no_harm() -> None:
    async def fixture() -> AsyncIterator[int]:
        with llm.using("a/m"):
            yield 1

    made = fixture()
    await asyncio.create_task(made.__anext__())  # type: ignore[arg-type]
    with pytest.raises(StopAsyncIteration):
        await made.__anext__()
    assert module.current().model is None


def test_a_stream_holds_what_held_where_it_was_made() -> None:
    model = ScriptedModel([], then="ok")
    with llm.using("a/1", registry=registry_of(a=model), temperature=0.5):
        stream = who.stream()
    assert "".join(stream.text()) == "ok"
    assert (asked(model), model.requests[-1]["temperature"]) == ("1", 0.5)


def test_a_cluster_travels_as_data() -> None:
    cluster = llm.Cluster(url="http://a", key="k", tenant="t")
    assert pickle.loads(pickle.dumps(cluster)) == cluster
    with pytest.raises(llm.UsageError, match="tenant is a text"):
        llm.Cluster(tenant="a\nb")
