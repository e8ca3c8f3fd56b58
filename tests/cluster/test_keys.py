"""What is known of a key, from the file and from the store: who may write it, and that a change counts at once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection

from diptych.cluster.config import SecuritySettings, is_label, load_config
from diptych.cluster.key_file import add_key, key_line, read_keys
from diptych.cluster.key_verbs import place_of, run_create, run_list, run_revoke
from diptych.cluster.keys import (
    LOOK_S,
    MAX_KEY_BYTES,
    ApiKeys,
    Key,
    Override,
    Scope,
    check_exposed,
    key_of,
    make_key,
    row_of,
    time_of,
)
from diptych.cluster.security import check_security
from diptych.cluster.store import keys as rows
from diptych.cluster.store.database import Store
from diptych.cluster.store.schema import prepare_store
from diptych.cluster.store.testing import temporary_store
from diptych.protos.errors import StartupError, StoreUnavailable


def write(file: Path, *lines: str, mode: int = 0o600) -> Path:
    """As a careful operator does: whole or not at all."""
    partial = file.with_suffix(".new")
    partial.write_text("".join(f"{line}\n" for line in lines))
    partial.chmod(mode)
    partial.replace(file)
    return file


def holds(file: Path, text: bytes) -> bool:
    return file.exists() and text in file.read_bytes()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def holders(keys: ApiKeys, *shown: str) -> list[Key | None]:
    await keys.look()
    return [keys.holder(key.encode()) for key in shown]


def adding(key: Key) -> Callable[[Connection], None]:
    return lambda connection: rows.add(connection, row_of(key))


# ---- what opens ----


async def test_a_key_is_its_line_s(tmp_path: Path) -> None:
    (first, a), (second, b), (other, _) = make_key("a"), make_key("b", scopes=frozenset({Scope.ADMIN})), make_key("a")
    file = write(tmp_path / "k", "# two", key_line(a), "", key_line(b))
    keys = ApiKeys(file)
    assert await holders(keys, first, second, other) == [a, b, None]
    for wrong in (b"", b"x", first[:-1].encode(), first.encode() + b" ", first.upper().encode(), b"\xff\0" * 9):
        assert keys.holder(wrong) is None


async def test_what_is_kept_is_no_key(tmp_path: Path) -> None:
    """Who reads the file or the database cannot call the API."""
    shown, key = make_key("a")
    file = write(tmp_path / "k", key_line(key))
    assert shown not in file.read_text()
    keys = ApiKeys(file)
    assert keys.holder(key.sha256.encode()) is None
    assert keys.holder(bytes.fromhex(key.sha256)) is None
    assert key.sha256 not in repr(key)
    long = "k" * (MAX_KEY_BYTES + 1)
    digest = hashlib.sha256(long.encode()).hexdigest()
    assert ApiKeys(write(file, key_line(Key(id="x", sha256=digest, tenant="a")))).holder(long.encode()) is None
    async with temporary_store(data_dir=tmp_path) as store:
        await store.write(adding(key))
    for name in ("diptych.db", "diptych.db-wal"):
        assert not await asyncio.to_thread(holds, tmp_path / name, shown.encode())


def test_keys_differ_and_are_long() -> None:
    made = {make_key("a")[0] for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("dk_") and len(key) == 46 for key in made)


async def test_a_key_expires_by_the_wall_clock(tmp_path: Path) -> None:
    shown, key = make_key("a", expires_at=5000)
    now = Clock()
    keys = ApiKeys(write(tmp_path / "k", key_line(key)), now=now)
    assert keys.holder(shown.encode()) == key
    now.now = 4999.9
    assert keys.holder(shown.encode()) == key
    now.now = 5000
    assert keys.holder(shown.encode()) is None


async def test_a_key_that_both_sources_know_is_what_the_store_says(tmp_path: Path) -> None:
    """One that was revoked there does not come back with an old file."""
    shown, key = make_key("a")
    file = write(tmp_path / "k", key_line(key))
    async with temporary_store() as store:
        await store.write(adding(key))
        await store.write(lambda connection: rows.disable(connection, key.id))
        keys = ApiKeys(file, store)
        assert await holders(keys, shown) == [None]
        assert await holders(ApiKeys(file), shown) == [key]


async def test_keys_are_asked_for_once_there_was_one() -> None:
    """With the last key revoked nobody gets in, rather than everybody."""
    clock = Clock()
    shown, key = make_key("a")
    async with temporary_store() as store:
        keys = ApiKeys(None, store, clock=clock)
        await keys.start()
        assert not keys.is_asked
        await store.write(adding(key))
        clock.now += LOOK_S
        assert await holders(keys, shown) == [key]
        assert keys.is_asked
        await store.write(lambda connection: rows.disable(connection, key.id))
        clock.now += LOOK_S
        assert await holders(keys, shown) == [None]
        assert keys.is_asked
        assert ApiKeys().is_asked is False


# ---- changes ----


async def test_a_changed_file_counts_a_quarter_of_a_second_later(tmp_path: Path) -> None:
    clock, (old, was), (new, is_now) = Clock(), make_key("a"), make_key("a")
    file = write(tmp_path / "k", key_line(was))
    keys = ApiKeys(file, clock=clock)
    await keys.start()
    write(file, key_line(is_now))
    assert await holders(keys, old) == [was]
    clock.now += LOOK_S
    assert await holders(keys, old, new) == [None, is_now]
    assert keys.fault == ""


async def test_a_key_revoked_in_the_store_opens_nothing_at_any_router_a_quarter_of_a_second_later() -> None:
    """Also where a look was under way that had begun before: it may have seen the key alive."""
    clock = Clock()
    shown, key = make_key("a")
    async with temporary_store() as store:
        await store.write(adding(key))
        routers = [ApiKeys(None, store, clock=clock) for _ in range(3)]
        for router in routers:
            assert await holders(router, shown) == [key]
        clock.now += LOOK_S
        early = [asyncio.create_task(router.look()) for router in routers]
        await asyncio.sleep(0)
        await store.write(lambda connection: rows.disable(connection, key.id))
        clock.now += LOOK_S
        for router in routers:
            assert await holders(router, shown) == [None]
        await asyncio.gather(*early)


async def test_a_look_reads_only_what_changed() -> None:
    """With many keys, four times a second."""
    seen: list[int] = []

    class Counting(Store):
        async def read_first(self, job: Callable[[Connection], Any]) -> Any:
            number, found = await super().read_first(job)
            seen.append(len(found))
            return number, found

    clock = Clock()
    async with temporary_store() as store:
        store.__class__ = Counting
        keys = ApiKeys(None, store, clock=clock)
        made = [make_key("a")[1] for _ in range(5)]
        for key in made:
            await store.write(adding(key))
        for _ in range(3):
            clock.now += LOOK_S
            await keys.look()
        await store.write(lambda connection: rows.disable(connection, made[2].id))
        clock.now += LOOK_S
        await asyncio.gather(*(keys.look() for _ in range(20)))
        assert seen == [5, 0, 0, 1]


async def test_a_store_that_cannot_be_read_lets_nobody_new_in_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    shown, key = make_key("a")

    class Broken(Store):
        is_broken = False

        async def read_first(self, job: Callable[[Connection], Any]) -> Any:
            if self.is_broken:
                raise StoreUnavailable("broken")
            return await super().read_first(job)

    async with temporary_store() as store:
        store.__class__ = Broken
        await store.write(adding(key))
        keys = ApiKeys(None, store, clock=clock)
        await keys.start()
        store.is_broken = True  # type: ignore[attr-defined]
        for _ in range(3):
            clock.now += LOOK_S
            assert await holders(keys, shown) == [key]
        assert "those from before still hold" in keys.fault
        assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
        fresh = ApiKeys(None, store, clock=clock)
        for call in (fresh.start, fresh.look):
            with pytest.raises(StoreUnavailable):
                await call()
        store.is_broken = False  # type: ignore[attr-defined]
        clock.now += LOOK_S
        await fresh.look()
        await keys.look()
        assert (keys.fault, fresh.is_asked) == ("", True)


@pytest.mark.parametrize("change", ["gone", "open", "torn", "empty"])
async def test_a_file_that_was_spoilt_lets_nobody_in_and_is_told(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock, (old, was), (new, is_now) = Clock(), make_key("a"), make_key("b", scopes=frozenset(Scope))
    file = write(tmp_path / "k", key_line(was))
    keys = ApiKeys(file, clock=clock)
    line = key_line(is_now)
    match change:
        case "gone":
            file.unlink()
        case "open":
            write(file, line, mode=0o622)
        case "torn":
            write(file, line, line[:40])
        case "empty":
            write(file)
    for _ in range(3):
        clock.now += 1
        assert await holders(keys, new, old) == [None, was]
    assert "the keys from before still hold" in keys.fault
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    write(file, line)
    clock.now += 1
    assert await holders(keys, old, new) == [None, is_now]
    assert keys.fault == ""
    assert new not in caplog.text
    assert is_now.sha256 not in caplog.text


# ---- the file's lines ----

DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x", "line 2 of .*: not JSON"),
        ("[" * 100_000, "line 2 of .*: not JSON"),
        ("[]", "there are the fields concurrency, created_at, .*sha256, tags, tenant"),
        ({"admin": True}, "there are the fields"),
        ({"sha256": None}, "64 lower-case hexadecimal digits"),
        ({"sha256": "A" * 64}, "64 lower-case hexadecimal digits"),
        ({"tenant": None}, "tenant must be a text"),
        ({"tenant": ""}, "tenant must have"),
        ({"tenant": "a\nb"}, "tenant must have"),
        ({"name": " x"}, "name must have"),
        ({"id": ""}, "id must have"),
        ({"scopes": "admin"}, "scopes must be a list of inference, files, admin"),
        ({"scopes": ["root"]}, "scopes must be a list"),
        ({"scopes": [{}]}, "scopes must be a list"),
        ({"scopes": []}, "scopes must name at least one"),
        ({"requests_per_minute": 0}, "requests_per_minute must be a whole number from 1"),
        ({"requests_per_minute": True}, "requests_per_minute must be a whole number"),
        ({"concurrency": "9"}, "concurrency must be a whole number"),
        ({"concurrency": 10**9}, "concurrency must be a whole number from 1"),
        ({"expires_at": 5}, "expires_at must be a text such as"),
        ({"expires_at": "90d"}, "expires_at must be a text such as"),
        ({"expires_at": "soon"}, "expires_at: 'soon' is no time"),
        ({"expires_at": "2027-01-31T12:00:00"}, "names no zone"),
        ({"disabled": "no"}, "disabled must be true or false"),
        ({"disabled": 1}, "disabled must be true or false"),
        ({"may_override": "cache"}, "may_override must be a list of texts"),
        ({"may_override": ["root"]}, "may_override must be a list of target, strategy, cache, not 'root'"),
        ({"tags": "eu"}, "tags must be a list of texts"),
        ({"tags": ["e u"]}, "a tag must have 1 to 64 letters"),
        ({"tags": ["a", "a"]}, "tags must be at most 8 different ones"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: Any, words: str) -> None:
    if isinstance(line, dict):
        line = json.dumps({"sha256": DIGEST, "tenant": "a"} | line)
    file = write(tmp_path / "k", key_line(make_key("a")[1]), line)
    with pytest.raises(StartupError, match=words) as told:
        read_keys(file)
    assert DIGEST not in str(told.value)


labels = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=128).filter(is_label)
limits = st.none() | st.integers(1, 1_000_000)
times = st.none() | st.integers(0, 4_000_000_000)


@given(
    st.builds(
        Key,
        id=labels,
        sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
        tenant=labels,
        name=st.just("") | labels,
        scopes=st.frozensets(st.sampled_from(Scope), min_size=1),
        created_at=st.integers(0, 4_000_000_000),
        expires_at=times,
        requests_per_minute=limits,
        concurrency=limits,
        disabled=st.booleans(),
        may_override=st.frozensets(st.sampled_from(Override)),
        tags=st.permutations(["a", "B-1", "eu/west", "team=x.y", "n:7"]).map(lambda tags: tuple(tags[:3])),
    )
)
def test_a_line_and_a_row_say_all_of_a_key(tmp_path_factory: pytest.TempPathFactory, key: Key) -> None:
    assert key_of(row_of(key)) == key
    file = write(tmp_path_factory.getbasetemp() / "one", key_line(key))
    assert read_keys(file) == [key]


def test_a_row_of_a_later_version_opens_nothing_here() -> None:
    key = make_key("a")[1]
    assert key_of(row_of(key) | {"scopes": "inference robots"}).scopes == {Scope.INFERENCE}
    assert key_of(row_of(key) | {"may_override": "cache robots"}).may_override == {Override.CACHE}
    for change in ({"scopes": "robots"}, {"scopes": ""}, {"concurrency": 0}):
        assert key_of(row_of(key) | change).opens_until == -math.inf


def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    key = make_key("a")[1]
    line = key_line(key)
    for file, words in (
        (tmp_path / "none", "cannot read"),
        (write(tmp_path / "empty", "# none yet"), "holds no key"),
        (write(tmp_path / "twice", line, line), "the same key"),
        (write(tmp_path / "ids", line, line.replace(key.sha256, DIGEST)), "the same id"),
        (write(tmp_path / "open", line, mode=0o644), "can be read by other users"),
    ):
        with pytest.raises(StartupError, match=f"security.api_keys: .*{words}"):
            check_security(SecuritySettings(api_keys=file), [])
    check_security(SecuritySettings(api_keys=write(tmp_path / "good", line)), [])


def test_a_new_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        add_key(tmp_path / "k", key_line(make_key("a")[1]))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600


def test_times_are_told_in_three_ways() -> None:
    assert time_of("90d", 1000) == 1000 + 90 * 86_400
    assert time_of("12h", 1000) == 1000 + 12 * 3600
    assert time_of("2027-01-31", 0) == time_of("2027-01-31T00:00:00Z", 0) == time_of("2027-01-31T01:00:00+01:00", 0)
    for wrong in ("", "d", "0d", "-1d", "1w", "90", "tomorrow", "2027-01-31T12:00", "2027-13-01", "9" * 30 + "d"):
        with pytest.raises(ValueError, match=r"is no time|names no zone"):
            time_of(wrong, 0)


# ---- the verbs ----


def json_of(verb: Callable[..., int], place: list[str]) -> list[dict[str, Any]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert verb(None, as_json=True, place=place_of(None, place)) == 0
    told: list[dict[str, Any]] = json.loads(out.getvalue())
    return told


def create(tenant: str = "a", *, place: list[str] | None = None, **how: Any) -> int:
    usual: dict[str, Any] = {"name": "", "scopes": (), "expires": None, "limits": (None, None), "file": None}
    return run_create(tenant, **(usual | how), place=place_of(None, place))


def test_create_shows_the_key_once_and_list_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"data_dir={tmp_path}"]
    how: dict[str, Any] = {"expires": "90d", "limits": (60, 4), "routing": (["cache"], ["eu"])}
    assert create(place=place, name="ci", scopes=["admin"], **how) == 0
    told = capsys.readouterr()
    (shown,) = told.out.splitlines()
    assert shown not in told.err
    assert run_list(None, as_json=True, place=place_of(None, place)) == 0
    text = capsys.readouterr().out
    (listed,) = json.loads(text)
    assert (listed["tenant"], listed["name"], listed["scopes"], listed["state"]) == ("a", "ci", ["admin"], "opens")
    assert (listed["requests_per_minute"], listed["concurrency"]) == (60, 4)
    assert (listed["may_override"], listed["tags"]) == (["cache"], ["eu"])
    assert run_list("a", as_json=False, place=place_of(None, place)) == 0
    text += capsys.readouterr().out
    assert listed["id"] in text
    assert shown not in text
    assert hashlib.sha256(shown.encode()).hexdigest() not in text
    assert run_list("b", as_json=True, place=place_of(None, place)) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run_list("b", as_json=False, place=place_of(None, place)) == 0
    told = capsys.readouterr().out
    assert "no keys of b" in told
    assert "nobody is asked" not in told, "there is another's"
    for _ in range(2):
        assert run_revoke(listed["id"], place=place_of(None, place)) == 0
    assert run_list(None, as_json=True, place=place_of(None, place)) == 0
    assert '"state": "revoked"' in capsys.readouterr().out


def test_a_file_s_keys_are_listed_and_revoked_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.jsonl"
    assert create(file=file) == 0
    file.write_text(file.read_text().rstrip("\n"))  # an editor that leaves the last line open
    assert create("ops", scopes=["admin"], file=file) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = ApiKeys(file)
    found = [keys.holder(shown.encode()) for shown in (first, second)]
    assert [(key.tenant, key.scopes) for key in found if key] == [
        ("a", {Scope.INFERENCE, Scope.FILES}),
        ("ops", {Scope.ADMIN}),
    ]
    place = place_of(None, [f"data_dir={tmp_path}", f"security.api_keys={file}"])
    assert run_list(None, as_json=True, place=place) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {key["source"] for key in listed} == {str(file)}
    assert run_revoke(listed[0]["id"], place=place) == 1
    assert "take its line out" in capsys.readouterr().err
    assert run_revoke("key_none", place=place) == 1
    assert "there is no key 'key_none'" in capsys.readouterr().err


def test_create_refuses_what_cannot_be_and_where_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"data_dir={tmp_path / 'data'}"]
    for tenant in ("", " a", "a\n", "\u00e4", "x" * 129):
        assert create(tenant, place=place) == 1
    wrong: list[dict[str, Any]] = [
        {"name": "a\tb"},
        {"scopes": ["root"]},
        {"expires": "soon"},
        {"expires": "2001-01-01"},
        {"limits": (0, None)},
        {"limits": (None, -1)},
        {"routing": (("root",), ())},
        {"routing": ((), ("e u",))},
        {"file": tmp_path / "none" / "k"},
    ]
    for how in wrong:
        assert create(place=place, **how) == 1, how
    told = capsys.readouterr()
    assert told.out == ""
    assert "cannot write" in told.err
    assert not (tmp_path / "data").exists()
    assert create(place=["data_dir=/proc/none"]) == 1
    assert "cannot make the store" in capsys.readouterr().err


# ---- an API that other machines can reach ----


def test_an_api_that_others_can_reach_does_not_start_without_a_key_that_opens(tmp_path: Path) -> None:
    """Of either source; one that is revoked or has expired is none."""
    file = tmp_path / "keys.jsonl"
    place = [f"data_dir={tmp_path}", "router.host=0.0.0.0"]

    def check(*more: str) -> None:
        config = load_config(overrides=[*place, *more])
        prepare_store(config.store, config.data_dir)
        check_exposed(config)

    refusal = (
        r"router\.host 0\.0\.0\.0 is reachable from other machines, and no key opens .*`diptych keys create TENANT`"
    )
    with pytest.raises(StartupError, match=refusal):
        check()
    check("router.host=127.0.0.1")
    for key in (make_key("a", disabled=True)[1], make_key("a", expires_at=1)[1]):
        write(file, key_line(key))
        with pytest.raises(StartupError, match=refusal):
            check(f"security.api_keys={file}")
    write(file, key_line(make_key("a")[1]))
    check(f"security.api_keys={file}")
    assert create(place=place) == 0
    check()
    (row,) = json_of(run_list, place)
    assert run_revoke(row["id"], place=place_of(None, place)) == 0
    with pytest.raises(StartupError, match=refusal):
        check()


# ---- timing (row S23) ----


def auc(first: list[float], second: list[float]) -> float:
    """How often a value of the first is above one of the second; 0.5: nothing can be told."""
    ranked = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum, index = 0.0, 0
    while index < len(ranked):
        end = index
        while end < len(ranked) and ranked[end][0] == ranked[index][0]:
            end += 1
        rank_sum += sum(1 for _, which in ranked[index:end] if which == 0) * (index + end + 1) / 2
        index = end
    return (rank_sum - len(first) * (len(first) + 1) / 2) / (len(first) * len(second))


async def test_how_long_a_refusal_takes_tells_nothing_of_the_keys_that_exist() -> None:
    """20,000 timings, shuffled; the bound is the exam's. The keys shown begin as one that exists, or as none does."""
    async with temporary_store() as store:
        made = [make_key("a") for _ in range(50)]
        for _, key in made:
            await store.write(adding(key))
        keys = ApiKeys(None, store)
        await keys.start()
        shuffled = random.Random(7)
        took: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(20_000):
            is_near = shuffled.random() < 0.5
            random_key = make_key("a")[0].encode()
            near = made[shuffled.randrange(50)][0][:-1].encode() + random_key[-1:]
            shown = bytes(bytearray(near if is_near else random_key))
            began = time.perf_counter_ns()
            keys.holder(shown)
            took[is_near].append(time.perf_counter_ns() - began)
        told = auc(took[True], took[False])
        assert 0.45 <= told <= 0.55, told
