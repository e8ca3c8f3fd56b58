"""A router is killed while it works on a background response: the next one on its store says what became of that.

Guards against a response that is in progress for ever, and against events that were shown and are not in the store.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import httpx2

from diptych.cluster.api.testing import front_door
from diptych.cluster.config import ResponsesSettings
from diptych.cluster.store.testing import temporary_store
from diptych.protos.responses_testing import EventReader

SETTINGS: dict[str, Any] = {"template": "{{ messages[-1]['content'] }}", "step_s": 0.01}
SERVED = f"""
import asyncio, sys
from pathlib import Path
from diptych.cluster.api.testing import front_door
from diptych.cluster.config import ResponsesSettings
from diptych.cluster.store.testing import temporary_store

async def main():
    async with temporary_store(data_dir=Path(sys.argv[1])) as store:
        async with front_door(store=store, responses=ResponsesSettings(lease_s=1), **{SETTINGS!r}) as door:
            print(door.listener.url, flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""
BODY = {"model": "echo", "input": "hello", "background": True, "max_output_tokens": 1900}


def told(text: str) -> list[dict[str, Any]]:
    return [json.loads(part.split("\ndata: ")[1]) for part in text.split("\n\n") if part]


async def test_a_killed_routers_response_has_failed_and_its_events_are_there(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVED, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        url = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()
        async with httpx2.AsyncClient(base_url=url, timeout=20) as http:
            silent = (await http.post("/v1/responses", json=BODY)).json()["id"]
            text = ""
            async with http.stream("POST", "/v1/responses", json=BODY | {"stream": True}) as reply:
                async for piece in reply.aiter_text():
                    text += piece
                    if text.count("output_text.delta") > 5:
                        break
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    seen = told(text[: text.rindex("\n\n") + 2])
    name = seen[0]["response"]["id"]
    async with (
        temporary_store(data_dir=tmp_path) as store,
        front_door(store=store, responses=ResponsesSettings(lease_s=1), **SETTINGS) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http,
    ):
        query = {"stream": "true", "starting_after": str(seen[-1]["sequence_number"])}
        rest = told((await http.get(f"/v1/responses/{name}", params=query)).text)  # until the lease has run out
        assert told((await http.get(f"/v1/responses/{name}?stream=true")).text) == seen + rest
        for number, event in enumerate(seen + rest):
            assert event["sequence_number"] == number
        last = rest[-1]
        assert (last["type"], last["response"]["error"]["type"]) == ("response.failed", "response_lost")
        for lost in (name, silent):
            body = (await http.get(f"/v1/responses/{lost}")).json()
            assert (body["status"], body["error"]["type"]) == ("failed", "response_lost")
            assert (await http.post(f"/v1/responses/{lost}/cancel")).json() == body
        reader = EventReader()
        for event in (seen + rest)[:-1]:
            reader.take(event)
        assert reader.last is None
        again = await http.post("/v1/responses", json=BODY | {"background": False, "max_output_tokens": 2})
        assert again.json()["status"] == "incomplete"
