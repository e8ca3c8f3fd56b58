"""POST /v1/batches and the rest of batches over HTTP: what can be asked, by whom, and how much of it."""

from __future__ import annotations

from typing import Any

import pytest

from diptych.cluster.batches.testing import CHAT, Bench, Scripted, line

NO_BATCH = "batch_" + "0" * 32


async def test_another_tenant_sees_and_touches_nothing(bench: Bench) -> None:
    """Row S24: an id of another is as unknown as one that never was, to the last byte."""
    mine = await bench.make([line("a")])
    other = {"x-tenant": "b"}
    assert (await bench.http.get("/v1/batches", headers=other)).json()["data"] == []
    for method, path in (("GET", ""), ("POST", "/cancel")):
        theirs = await bench.http.request(method, f"/v1/batches/{mine['id']}{path}", headers=other)
        never = await bench.http.request(method, f"/v1/batches/{NO_BATCH}{path}", headers=other)
        assert theirs.status_code == never.status_code == 404
        assert theirs.text.replace(mine["id"], NO_BATCH) == never.text
    reply = await bench.http.get("/v1/batches", params={"after": mine["id"]}, headers=other)
    assert reply.status_code == 404
    assert (await bench.batch(mine["id"]))["status"] == "validating"
    told = await bench.over(mine["id"], bench.runner())
    for file_id in (told["output_file_id"], told["input_file_id"]):
        assert (await bench.http.get(f"/v1/files/{file_id}", headers=other)).status_code == 404
    assert (await bench.http.get("/v1/files", headers=other)).json()["data"] == []


@pytest.mark.parametrize("name", ["../x", "..%2fx", "a%00b", "$(id)", "x", "' OR 1=1 --", NO_BATCH + "0", "%0a"])
async def test_ids_are_never_paths(bench: Bench, name: str) -> None:
    """Row S25."""
    for method, path in (("GET", ""), ("POST", "/cancel")):
        reply = await bench.http.request(method, f"/v1/batches/{name}{path}")
        assert reply.status_code in (400, 404, 405), reply.text


async def test_pages_hold_all_batches_the_newest_first(bench: Bench) -> None:
    ids = [(await bench.make([line("a")]))["id"] for _ in range(5)]
    first = (await bench.http.get("/v1/batches", params={"limit": 2})).json()
    assert [one["id"] for one in first["data"]] == ids[:2:-1]
    assert first["has_more"]
    rest = (await bench.http.get("/v1/batches", params={"limit": 3, "after": first["last_id"]})).json()
    assert [one["id"] for one in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]
    assert len((await bench.http.get("/v1/batches")).json()["data"]) == 5
    for wrong in ({"limit": 101}, {"limit": 0}, {"order": "asc"}):
        assert (await bench.http.get("/v1/batches", params=wrong)).status_code == 400


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
        ({"completion_window": "1s"}, 400, "completion_window"),
        ({"input_file_id": "file-" + "0" * 32}, 404, "input_file_id"),
        ({"input_file_id": "../../etc/passwd"}, 404, "input_file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"model": "echo"}, 400, "model"),
    ],
)
async def test_what_is_wrong_is_named(bench: Bench, change: dict[str, Any], status: int, param: str) -> None:
    file = await bench.upload([line("a")])
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", **change}
    reply = await bench.http.post("/v1/batches", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


async def test_a_file_for_something_else_is_no_input(bench: Bench) -> None:
    file = await bench.upload([line("a")], purpose="user_data")
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    reply = await bench.http.post("/v1/batches", json=body)
    assert reply.status_code == 400
    assert "user_data" in reply.json()["error"]["message"]


async def test_unfinished_batches_of_a_tenant_are_bounded(bench: Bench) -> None:
    file = await bench.upload([line("a")])
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    most = bench.door.router.settings.batches.tenant_batches
    ids = [(await bench.http.post("/v1/batches", json=body)).json()["id"] for _ in range(most)]
    reply = await bench.http.post("/v1/batches", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) > 0
    await bench.http.post(f"/v1/batches/{ids[0]}/cancel")
    await bench.over(ids[0], bench.runner(**{CHAT: Scripted()}))
    assert (await bench.http.post("/v1/batches", json=body)).status_code == 200


async def test_results_expire_as_asked(bench: Bench) -> None:
    asked = {"anchor": "created_at", "seconds": 3600}
    batch = await bench.make([line("a")], output_expires_after=asked)
    told = await bench.over(batch["id"], bench.runner())
    kept = (await bench.http.get(f"/v1/files/{told['output_file_id']}")).json()
    assert kept["expires_at"] == kept["created_at"] + 3600
