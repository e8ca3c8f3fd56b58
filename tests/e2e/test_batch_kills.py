"""A batch of 1,000 requests on the shipped binary while routers and engines are killed: each is answered exactly once.

Guards against lines that are lost with a router, answered twice by its successor, or given up because engines died.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rig as rigs
from procfs import descendants, reap, send
from rig import Rig, RigError

from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.types import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # the rig knows it by its pid
]

NUM_LINES = int(os.environ.get("DIPTYCH_BATCH_LINES", "1000"))
TOKENS = 24
WITHIN_S = 420.0
COMPLETIONS = "/v1/completions"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    changes = {"router": {"drain_grace_s": 5}}
    running = rigs.start("echo", folder=tmp_path / "rig", prefill=1, decode=2, changes=changes)
    holder = [running]
    yield running
    rigs.stop(holder[0])


def prompt(number: int) -> list[int]:
    """Of line `number`: no two are alike."""
    rng = random.Random(number)
    return [rng.randrange(5, 200) for _ in range(rng.randrange(4, 40))]


def lines() -> bytes:
    """The input."""
    body = {"model": "echo", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    rows = [
        {"custom_id": f"c{i}", "method": "POST", "url": COMPLETIONS, "body": body | {"prompt": prompt(i)}}
        for i in range(NUM_LINES)
    ]
    return b"\n".join(json.dumps(row).encode() for row in rows)


def upload(rig: Rig, data: bytes) -> str:
    """The id of the file."""
    boundary = "0123456789abcdef"
    parts = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
    )
    form = parts.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}", **rig.headers("a")}
    request = urllib.request.Request(f"{rig.url}/v1/files", form, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["id"])


def read(rig: Rig, path: str) -> bytes:
    """As tenant a; waits for a router to be there."""
    deadline = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(rig.url + path, headers=rig.headers("a"))
            with urllib.request.urlopen(request, timeout=10) as reply:
                return bytes(reply.read())
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def begin(rig: Rig) -> str:
    """The id of the batch."""
    body = {"input_file_id": upload(rig, lines()), "endpoint": COMPLETIONS, "completion_window": "24h"}
    return str(rig.post("/v1/batches", body)["id"])


def follow(rig: Rig, batch_id: str, disturb: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The batch once it has ended; its counts never go back."""
    deadline, done = time.monotonic() + WITHIN_S, 0
    while time.monotonic() < deadline:
        batch: dict[str, Any] = json.loads(read(rig, f"/v1/batches/{batch_id}"))
        counts = batch["request_counts"]
        assert counts["completed"] >= done, "what was answered is answered"
        done = counts["completed"]
        if batch["status"] not in ("validating", "in_progress", "finalizing"):
            return batch
        disturb(batch)
        time.sleep(0.1)
    raise AssertionError(f"the batch does not end: {batch}")


def check(rig: Rig, batch: dict[str, Any]) -> None:
    """Every line has its one answer, and it is the right one."""
    errors = b"" if batch["error_file_id"] is None else read(rig, f"/v1/files/{batch['error_file_id']}/content")
    assert not errors, errors[:2000]
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert batch["usage"]["output_tokens"] == NUM_LINES * TOKENS
    rows = [json.loads(row) for row in read(rig, f"/v1/files/{batch['output_file_id']}/content").splitlines()]
    assert [row["custom_id"] for row in rows] == [f"c{i}" for i in range(NUM_LINES)]
    assert len({row["id"] for row in rows}) == NUM_LINES
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    for number, row in enumerate(rows):
        text = row["response"]["body"]["choices"][0]["text"]
        told = [int(word.removeprefix("t")) for word in text.split()]
        assert told == list(expected_tokens(prompt(number), TOKENS, greedy)), number


def test_each_line_is_answered_once_through_kills_of_routers_and_engines(rig: Rig) -> None:
    seed = int(os.environ.get("DIPTYCH_SEED", random.SystemRandom().randrange(1 << 30)))
    print("DIPTYCH_SEED", seed)
    rng = random.Random(seed)
    names = [
        "router-0",
        "decode-0",
        "router-0",
        "prefill-0",
        "decode-1",
        "router-0",
        "router-0",
        "decode-0",
        "router-0",
    ]
    moments = sorted(rng.uniform(0.02, 0.9) * NUM_LINES for _ in names)
    batch_id, killed = begin(rig), list[str]()

    def disturb(batch: dict[str, Any]) -> None:
        if len(killed) < len(names) and batch["request_counts"]["completed"] >= moments[len(killed)]:
            name = names[len(killed)]
            try:
                rig.kill(name, signal.SIGKILL)
            except (RigError, ProcessLookupError):  # its next life is not up yet
                return
            killed.append(name)

    batch = follow(rig, batch_id, disturb)
    assert killed == names
    check(rig, batch)


def test_a_cluster_that_is_killed_whole_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """All processes at once, twice: nothing is left but the disk."""
    running = rigs.start("echo", folder=tmp_path / "rig", prefill=1, decode=1)
    try:
        batch_id = begin(running)
        for share in (0.2, 0.5):
            wanted = int(share * NUM_LINES)
            follow_until(running, batch_id, wanted)
            for pid in [running.pid, *descendants(running.pid)]:
                send(pid, signal.SIGKILL)
            reap(running.pid)
            running = rigs.start("echo", folder=tmp_path / "rig", prefill=1, decode=1)
        check(running, follow(running, batch_id, lambda batch: None))
    finally:
        rigs.stop(running)


def follow_until(rig: Rig, batch_id: str, number: int) -> None:
    """Returns when so many are answered."""
    deadline = time.monotonic() + WITHIN_S
    while json.loads(read(rig, f"/v1/batches/{batch_id}"))["request_counts"]["completed"] < number:
        assert time.monotonic() < deadline
        time.sleep(0.1)
