"""A kept answer is given to an equal call alone: of the same target, key, tenant, body, type and context.

Guards against the mistakes that caches of this kind have had: an answer for another tenant or system prompt, one
that the program has changed since, one that the type no longer takes, and failures, cut answers or samples that stay.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
import subprocess
import sys
import threading
from base64 import b64decode
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel

from diptych.agents import llm
from diptych.agents.llm.cache_store import FileStore, MemoryStore
from diptych.agents.llm.testing.scripted import Said, ScriptedModel, failure, tool_call
from diptych.agents.llm.upstream import HttpUpstream
from diptych.protos.deltas import Content
from diptych.protos.replies import Usage

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Book(BaseModel):
    title: str


def made(*entries: Any, cache: llm.Cache | None = None, **settings: Any) -> tuple[llm.Registry, ScriptedModel]:
    registry, model = llm.Registry(environ={}, cache=cache, **settings), ScriptedModel(list(entries))
    registry.add("test", model)
    return registry, model


def ask(registry: llm.Registry, **given: Any) -> Any:
    settings = {"temperature": 0.0, "retries": llm.Retries(base_s=0.0, repair=False), **given}

    @llm.call("test/m", registry=registry, **settings)
    def recommend(topic: str) -> str:
        return f"A book about {topic}"

    return recommend


@pytest.fixture(params=["memory", "file"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with llm.Cache(tmp_path / "answers.db" if request.param == "file" else None) as found:
        yield found


def test_it_is_off_unless_somebody_says_so() -> None:
    registry, model = made("a", "b")
    assert [ask(registry)("x").text for _ in range(2)] == ["a", "b"]
    assert len(model.requests) == 2


@pytest.mark.parametrize("way", ["call", "aio", "stream"])
async def test_an_equal_call_is_not_made_again(cache: llm.Cache, way: str) -> None:
    registry, model = made(
        Said(text='{"title": "Emma"}', thoughts="Hm.", usage=Usage(input_tokens=9, output_tokens=4)), cache=cache
    )
    call = ask(registry, output=Book)
    first = await call.aio("love")
    if way == "call":
        again = await asyncio.to_thread(call, "love")
    elif way == "aio":
        again = await call.aio("love")
    else:
        async with call.stream("love") as stream:
            events = [event async for event in stream]
        assert "".join(event.text for event in events if isinstance(event, Content)) == '{"title": "Emma"}'
        assert isinstance(events[-1], llm.Finished)
        again = await stream.reply.aio()
    assert len(model.requests) == 1
    assert (again.value, again.text, again.thoughts, again.usage, again.finish, again.messages) == (
        first.value,
        first.text,
        first.thoughts,
        first.usage,
        first.finish,
        first.messages,
    )
    assert not first.is_cached
    assert again.is_cached
    (attempt,) = again.attempts
    assert (attempt.why, attempt.number, attempt.spent) == ("cached", 1, llm.Spent())
    assert again.cost == Decimal(0)
    assert again.saved == first.spent
    assert (cache.hits, cache.misses) == (1, 1)


async def test_what_a_stream_gave_is_kept_for_calls(cache: llm.Cache) -> None:
    registry, model = made("hello", cache=cache)
    call = ask(registry)
    await call.stream("x").reply.aio()
    assert (await call.aio("x")).is_cached
    assert len(model.requests) == 1


def test_calls_of_tools_are_kept_with_their_ids_and_arguments(cache: llm.Cache) -> None:
    @llm.tool
    def search(query: str) -> str:
        """Looks it up."""
        return query

    registry, _ = made(tool_call("search", query="x"), cache=cache)
    call = ask(registry, tools=[search])
    first = call("x")
    first.tool_calls[0].arguments["query"] = "changed by the program"
    again = call("x")
    assert again.is_cached
    assert again.tool_calls[0].arguments == {"query": "x"}
    assert again.tool_calls[0].id == first.tool_calls[0].id
    again.tool_calls[0].arguments.clear()
    assert call("x").tool_calls[0].arguments == {"query": "x"}


class Strict(BaseModel):
    title: str
    year: int = 0


DIFFERENT: dict[str, Any] = {
    "a field of the body": {"extra": {"temperature": 0.0, "nonce": 1}},
    "max_tokens": {"max_tokens": 5},
    "seed": {"seed": 1},
    "user": {"user": "anne"},
    "options": {"options": {"pool": {"min_p": 0.1}}},
    "type": {"output": Strict},
    "no type": {"output": None},
    "lax": {"strict": False},
    "context": {"validation": {"known": ["Emma"]}},
    "another context": {"validation": {"known": ["Persuasion"]}},
}


def test_whatever_an_answer_depends_on_is_in_the_key(cache: llm.Cache) -> None:
    """Each call differs from all the others in one thing alone, so each must be made."""
    registry, model = made(*[{"title": "Emma"}] * (len(DIFFERENT) + 1), cache=cache)
    calls = [ask(registry, **{"output": Book, **given}) for given in ({}, *DIFFERENT.values())]
    for call in calls:
        assert not call("x").is_cached
    for call in calls:
        assert call("x").is_cached
    assert len(model.requests) == len(calls)


def test_messages_system_texts_models_and_media_are_in_the_key(cache: llm.Cache) -> None:
    registry, _ = made(*map(str, range(20)), cache=cache)
    image = llm.image(data=b64decode(PIXEL))
    prompts: list[Any] = [
        "x",
        "x ",
        [llm.system("s"), llm.user("x")],
        [llm.system("t"), llm.user("x")],
        [llm.user("x"), llm.assistant("a"), llm.user("x")],
        [image, "x"],
        [llm.image(data=b64decode(PIXEL) + b"\0"), "x"],
    ]

    def asked(prompt: Any) -> Any:
        @llm.call("test/m", registry=registry, temperature=0)
        def f() -> Any:
            return prompt

        return f

    assert not any(asked(prompt)().is_cached for prompt in prompts)
    assert all(asked(prompt)().is_cached for prompt in prompts)
    assert not asked("x").with_("test/n")().is_cached


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=6), st.integers(1, 3)), min_size=2, max_size=5))
def test_two_calls_share_an_answer_if_and_only_if_they_are_equal(asked: list[tuple[str, int]]) -> None:
    registry, _ = made(*[str(at) for at in range(5)], cache=llm.Cache())
    seen: dict[tuple[str, int], str] = {}
    for topic, limit in asked:
        reply = ask(registry, max_tokens=limit)(topic)
        assert reply.is_cached == ((topic, limit) in seen)
        assert seen.setdefault((topic, limit), reply.text) == reply.text


def http(key: str = "", tenant: str = "", url: str = "http://10.0.0.1:8000", prefix: str = "own") -> HttpUpstream:
    registry = llm.Registry(environ={}, clusters={prefix: llm.Cluster(url, key=key, tenant=tenant)})
    upstream, _ = registry.resolve(f"{prefix}/m")
    assert isinstance(upstream, HttpUpstream)
    return upstream


def test_two_tenants_keys_or_addresses_are_never_one() -> None:
    ways = [
        http(),
        http(key="sk-one-0123456789"),
        http(key="sk-two-0123456789"),
        http(tenant="a"),
        http(tenant="b"),
        http(tenant="a", key="sk-one-0123456789"),
        http(url="http://10.0.0.2:8000"),
        http(prefix="other"),
    ]
    identities = [way.identity() for way in ways]
    assert len(set(identities)) == len(ways)
    assert http(key="sk-one-0123456789").identity() == identities[1]
    assert not any("sk-one" in identity for identity in identities)


def test_an_identity_is_the_same_in_every_process() -> None:
    words = (
        "from diptych.agents import llm; r = llm.Registry(environ={}, keys={'openai': 'sk-one-0123456789'});"
        "print(r.resolve('openai/m')[0].identity())"
    )
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout.strip()
    registry = llm.Registry(environ={}, keys={"openai": "sk-one-0123456789"})
    assert registry.resolve("openai/m")[0].identity() == found
    other = llm.Registry(environ={}, keys={"openai": "sk-two-0123456789"})
    assert other.resolve("openai/m")[0].identity() != found


def test_namespaces_share_nothing(tmp_path: Path) -> None:
    texts = []
    for namespace in ("", "a", "b", "a"):
        with llm.Cache(tmp_path / "c", namespace=namespace) as cache:
            texts.append(ask(made(f"for {namespace}", cache=cache)[0])("x").text)
    assert texts == ["for ", "for a", "for b", "for a"]


@pytest.mark.parametrize(
    "entries",
    [
        [failure("auth")],
        [Said(text="cut", finish="length")],
        [Said(text="no", finish="content_filter")],
        [Said(text="  ")],
    ],
)
def test_what_failed_or_was_cut_is_not_kept(cache: llm.Cache, entries: list[Any]) -> None:
    registry, model = made(*entries, "good", cache=cache)
    call = ask(registry, retries=llm.Retries(attempts=1, longer=False))
    try:
        call("x")
    except llm.CallFailed:
        pass
    assert call("x").text == "good"
    assert len(model.requests) == 2


def test_an_answer_that_a_reask_made_is_kept_and_one_of_a_fallback_not(cache: llm.Cache) -> None:
    registry, _ = made({"titel": 1}, {"title": "Emma"}, failure("auth"), failure("auth"), cache=cache)
    registry.add("spare", ScriptedModel([{"title": "of the spare"}, {"title": "of the spare again"}]))
    call = ask(registry, output=Book, retries=llm.Retries(repair=False, fallback=["spare/m"]))
    assert call("x").value.title == "Emma"
    again = call("x")
    assert again.is_cached
    assert len(again.messages) == 2
    assert again.saved.requests == 2
    assert [call("y").value.title for _ in range(2)] == ["of the spare", "of the spare again"]


def test_samples_are_kept_where_they_are_wanted_alone(cache: llm.Cache, tmp_path: Path) -> None:
    registry, _ = made("a", "b", "c", cache=cache)
    for params in ({"temperature": 1.0}, {"temperature": None}, {"extra": {"temperature": 1}}):
        assert not ask(registry, **params)("x").is_cached
    with llm.Cache(tmp_path / "sampled", sampled=True) as sampled:
        registry, _ = made("a", cache=sampled)
        assert [ask(registry, temperature=1.0)("x").text for _ in range(2)] == ["a", "a"]


def test_one_call_can_do_without_or_have_its_own(cache: llm.Cache) -> None:
    registry, _ = made("a", "b", "c", cache=cache)
    call = ask(registry)
    assert [call("x").text, call.with_(cache=False)("x").text, call("x").text] == ["a", "b", "a"]
    assert call.with_(cache=llm.Cache())("x").text == "c"


def test_a_context_without_a_form_in_json_keeps_nothing(cache: llm.Cache, caplog: pytest.LogCaptureFixture) -> None:
    registry, _ = made("a", "b", cache=cache)
    call = ask(registry, validation={"lock": threading.Lock()})
    assert [call("x").text for _ in range(2)] == ["a", "b"]
    assert "has no form in JSON" in caplog.text


def test_an_answer_is_old_after_its_time(tmp_path: Path) -> None:
    for path in (None, tmp_path / "c"):
        now = [1000.0]
        with llm.Cache(path, ttl_s=10, now=partial(now.__getitem__, 0)) as cache:
            registry, _ = made("a", "b", cache=cache)
            texts = []
            for at in (1000.0, 1009.0, 1011.0, 1012.0):
                now[0] = at
                texts.append(ask(registry)("x").text)
        assert texts == ["a", "a", "b", "b"]


def test_what_the_type_no_longer_takes_is_asked_again(cache: llm.Cache) -> None:
    """The schema is the same; what a validator takes is another matter."""
    allowed = {"Emma"}

    def checked(value: str) -> str:
        if value not in allowed:
            raise ValueError("not in the library")
        return value

    registry, model = made({"value": "Emma"}, {"value": "Persuasion"}, cache=cache)
    call = ask(registry, output=Annotated[str, AfterValidator(checked)])
    assert call("x").value == "Emma"
    allowed.clear()
    allowed.add("Persuasion")
    assert call("x").value == "Persuasion"
    assert len(model.requests) == 2
    assert call("x").is_cached


def test_memory_is_bounded_and_the_least_used_leaves_first() -> None:
    store = MemoryStore(10_000)
    for at in range(200):
        store.put(str(at), b"x" * 800, float(at))
        store.get("0", 0.0)
        assert store.num_bytes() <= 10_000
    assert store.get("0", 0.0) is not None
    assert store.get("199", 0.0) is not None
    assert store.get("150", 0.0) is None
    store.put("too large", b"x" * 20_000, 0.0)
    assert store.get("too large", 0.0) is None
    assert store.num_bytes() <= 10_000


def test_a_file_is_bounded(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "c", 200_000)
    for at in range(300):
        store.put(str(at), b"x" * 3_000, float(at))
    assert store.num_bytes() <= 200_000
    assert store.get("299", 0.0) is not None
    assert store.get("0", 0.0) is None
    store.close()


def test_a_file_is_its_owners_alone_and_holds_no_prompt(tmp_path: Path) -> None:
    with llm.Cache(tmp_path / "c") as cache:
        registry, _ = made("the answer", cache=cache)
        ask(registry)("the-secret-topic")
        assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600
    assert b"the-secret-topic" not in (tmp_path / "c").read_bytes()


def test_a_file_that_is_none_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 200)
    with pytest.raises(llm.UsageError, match="no file of kept answers"):
        llm.Cache(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    with pytest.raises(llm.UsageError, match="version"):
        llm.Cache(tmp_path / "other")
    with pytest.raises(llm.UsageError, match="max_mib"):
        llm.Cache(max_mib=0)


def test_an_entry_that_cannot_be_read_is_dropped(tmp_path: Path) -> None:
    with llm.Cache(tmp_path / "c") as cache:
        registry, _ = made("a", "b", "c", cache=cache)
        ask(registry)("x")
        other = sqlite3.connect(tmp_path / "c")
        for damaged, text in ((b"{", "b"), (json.dumps({"message": {}}).encode(), "c")):
            other.execute("UPDATE answers SET value = ?", (damaged,))
            other.commit()
            assert ask(registry)("x").text == text
            assert ask(registry)("x").is_cached
        other.close()


def test_many_threads_and_another_process_use_one_file(tmp_path: Path) -> None:
    words = f"""
from diptych.agents.llm.cache_store import FileStore
store = FileStore({str(tmp_path / "c")!r}, 10_000_000)
for at in range(200):
    store.put(f"theirs {{at}}", b"x" * 100, 1.0)
print(sum(store.get(f"theirs {{at}}", 0.0) is not None for at in range(200)))
store.close()
"""
    store = FileStore(tmp_path / "c", 10_000_000)

    def put_fifty(own: int) -> None:
        for at in range(50):
            store.put(f"{own} {at}", b"y", 1.0)

    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True) as other:
        threads = [threading.Thread(target=put_fifty, args=(own,)) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told, _ = other.communicate(timeout=60)
    assert told.strip() == "200"
    assert sum(store.get(f"{own} {at}", 0.0) == b"y" for own in range(4) for at in range(50)) == 200
    assert sum(store.get(f"theirs {at}", 0.0) is not None for at in range(200)) == 200
    store.close()


def test_a_file_out_of_reach_costs_no_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = llm.Cache(tmp_path / "c")
    registry, _ = made("a", "b", cache=cache)
    cache.close()
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    assert [ask(registry)("x").text for _ in range(2)] == ["a", "b"]
    assert "out of reach" in caplog.text
