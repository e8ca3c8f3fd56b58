"""One real cluster on Ray: a prompt computed in one process, an answer generated in another, and nothing left over."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from reference import TIE, TextReference
from serving import Cluster

from diptych.cluster.models import ModelFolder

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 20

pytestmark = pytest.mark.ray


def engines(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The /info entry of the engine of each role."""
    return {role: engine for engine in cluster.get("/info")["engines"] for role in engine["roles"]}


def engines_at_rest(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The same, once two readings farther apart than the engines' reports are equal."""
    before, now = None, engines(cluster)
    while before is None or any(before[role]["steps"] != now[role]["steps"] for role in now):
        time.sleep(0.6)
        before, now = now, engines(cluster)
    return now


def bytes_across(cluster: Cluster) -> dict[str, float]:
    """KV bytes that each role has sent or received, from /metrics."""
    pattern = r'^diptych_engine_kv_transfer_bytes_total\{.*role="(\w+)"\} (\S+)$'
    return {role: float(value) for role, value in re.findall(pattern, cluster.text("/metrics"), re.MULTILINE)}


@pytest.fixture(scope="module")
def reference(default_model: ModelFolder) -> Iterator[TextReference]:
    """On one thread: several of them wait for each other by spinning, which takes minutes where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TextReference(default_model.path)
    torch.set_num_threads(before)


def check_text(reference: TextReference, prompt: list[int], text: str) -> None:
    """`text` is the reference's greedy continuation, or leaves it at a tie."""
    expected = reference.generate(prompt, NUM_TOKENS)
    if text == reference.tokenizer.decode(expected, skip_special_tokens=True):
        return
    same = 0
    while text.startswith(reference.tokenizer.decode(expected[: same + 1], skip_special_tokens=True)):
        same += 1
    gap = reference.gap(prompt + expected[:same])
    assert gap <= TIE, f"prompt of {len(prompt)} tokens: {text!r} leaves the reference at token {same}, gap {gap:.2e}"


def complete(cluster: Cluster, prompt: list[int]) -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    return str(cluster.post("/v1/completions", body)["choices"][0]["text"])


def test_prompt_and_answer_are_computed_in_two_processes_and_the_kv_crosses(cluster: Cluster) -> None:
    by_role = engines_at_rest(cluster)
    pids = {role: by_role[role]["pid"] for role in ("prefill", "decode")}
    assert pids["prefill"] != pids["decode"]
    assert all(psutil.pid_exists(pid) for pid in pids.values())
    assert cluster.process.pid not in pids.values()

    before = bytes_across(cluster)
    steps = {role: by_role[role]["steps"] for role in pids}
    answer = cluster.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 32,
        },
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    prompt_tokens = answer["usage"]["prompt_tokens"]
    assert prompt_tokens > 16

    def crossed() -> bool:
        now = bytes_across(cluster)
        return all(now[role] > before.get(role, 0) for role in ("prefill", "decode"))

    def stepped() -> bool:
        after = {role: engine["steps"] - steps[role] for role, engine in engines(cluster).items()}
        return after["prefill"] >= 1 and after["decode"] == answer["usage"]["completion_tokens"] - 1

    wait_until(crossed, "no byte crossed the hinge")
    wait_until(stepped, "the decode engine did not make every token but the first")


def test_greedy_answers_equal_the_reference_alone_and_in_company(cluster: Cluster, reference: TextReference) -> None:
    prompts = reference.prompts(10, longest=120)
    for prompt in prompts[:4]:
        check_text(reference, prompt, complete(cluster, prompt))

    async def together() -> list[str]:
        async with httpx2.AsyncClient(base_url=cluster.url, timeout=300) as client:

            async def one(prompt: list[int]) -> str:
                body = {
                    "model": MODEL,
                    "prompt": prompt,
                    "max_tokens": NUM_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                return str(reply.json()["choices"][0]["text"])

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    for prompt, text in zip(prompts, asyncio.run(together()), strict=True):
        check_text(reference, prompt, text)


def test_two_hundred_requests_with_a_fifth_cancelled_leave_the_pools_at_their_baseline(cluster: Cluster) -> None:
    rng = random.Random(5)
    outcomes: list[str] = []

    async def one(client: httpx2.AsyncClient, index: int, gate: asyncio.Semaphore) -> None:
        body = {
            "model": MODEL,
            "prompt": [rng.randrange(20, 40_000) for _ in range(rng.choice([1, 5, 17, 40, 90]))],
            "max_tokens": rng.choice([1, 2, 8, 12]) if index % 5 else 400,
            "temperature": rng.choice([0, 1.0]),
            "seed": index,
            "ignore_eos": True,
            "stream": True,
        }
        patience = rng.uniform(0.0, 1.0) if index % 5 == 0 else None
        async with gate, client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            lines = reply.aiter_lines()
            try:
                async with asyncio.timeout(patience):
                    last = [line async for line in lines if line][-1]
                assert last == "data: [DONE]"
                outcomes.append("done")
            except TimeoutError:
                outcomes.append("cancelled")

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(32)
        async with httpx2.AsyncClient(base_url=cluster.url, timeout=300) as client, asyncio.TaskGroup() as group:
            for index in range(200):
                group.create_task(one(client, index, gate))

    asyncio.run(all_of_them())
    assert len(outcomes) == 200
    assert outcomes.count("cancelled") >= 20

    def settled() -> bool:
        found = cluster.get("/info")["engines"]
        return all(
            e["blocks"]["used"] == 0 and e["transfers"] == 0 and e["ring_slots_busy"] == 0 and e["running"] == 0
            for e in found
        )

    wait_until(settled, "blocks, transfers or slots are still held")
    for engine in cluster.get("/info")["engines"]:
        blocks = engine["blocks"]
        assert blocks["free"] + blocks["cached"] == blocks["total"]


def test_one_trace_runs_through_router_and_both_engines(cluster: Cluster) -> None:
    trace_id = os.urandom(16).hex()
    request = urllib.request.Request(
        cluster.url + "/v1/completions",
        json.dumps({"model": MODEL, "prompt": "Water boils at", "max_tokens": 4, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json", "traceparent": f"00-{trace_id}-{'ab' * 8}-01"},
    )
    urllib.request.urlopen(request, timeout=120).close()

    def spans() -> dict[str, set[str]]:
        """The files in which each span of the trace was found, by name."""
        found: dict[str, set[str]] = {}
        for file in cluster.log.parent.glob("spans.*.jsonl"):
            for span in map(json.loads, file.read_text().splitlines()):
                if span["context"]["trace_id"] == f"0x{trace_id}":
                    found.setdefault(span["name"], set()).add(file.name)
        return found

    wait_until(lambda: {"router", "queue", "prefill", "transfer", "decode"} <= spans().keys(), "spans are missing")
    assert len(set.union(*spans().values())) == 3, "router, prefill and decode write a file each"


def wait_until(condition: Any, message: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("chat_openai.py", "tokens in"),
        ("stream_curl.sh", "data: [DONE]"),
        ("ray_handle.py", "Paris"),
        ("ray_client.py", "temperature: should be"),
        ("python_client.py", "refused: temperature"),
        ("sampling.py", "scores"),
    ],
)
def test_the_examples_run(cluster: Cluster, example: str, expected: str) -> None:
    path = ROOT / "examples" / example
    command = [sys.executable, str(path)] if path.suffix == ".py" else ["bash", str(path)]
    done = subprocess.run(
        [*command, cluster.url], capture_output=True, text=True, timeout=240, cwd="/", env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout, done.stdout + done.stderr


def test_chat_and_status_speak_to_the_cluster(cluster: Cluster) -> None:
    diptych = str(Path(sys.executable).with_name("diptych"))
    chat = subprocess.run(
        [diptych, "chat", "--url", cluster.url],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    status = subprocess.run(
        [diptych, "status", "--url", cluster.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert status.returncode == 0, status.stderr
    for word in ("prefill", "decode", MODEL):
        assert word in status.stdout


def test_start_up_tells_where_the_time_and_the_memory_went(cluster: Cluster) -> None:
    printed = cluster.printed()
    for word in ("weights", "KV arena", "ready", "curl", "prefill", "decode", cluster.url):
        assert word in printed, printed
