"""A prefill and a decode engine as processes in namespaces of their own, a router in this process, and a wire between.

this process: router          10.231.1.1 --veth-- 10.231.1.2  prefill engine   listens here, with mutual TLS
                              10.231.2.1 --veth-- 10.231.2.2  decode engine
the KV path, decode engine to 10.231.1.2:   tun 10.231.9.2 == cable.py == tun 10.231.9.1
a stranger in a third namespace:    10.231.3.2 --veth-- 10.231.3.1, from which it reaches 10.231.1.2
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cable import Cable
from engine_process import INFO, STATUS
from namespaces import Namespace, remove_stale
from rest import held_in

from diptych.cluster.config import RouterSettings, SecuritySettings, TlsSettings
from diptych.cluster.router.call import Explanation
from diptych.cluster.router.router import GenerateCall, Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.cluster.security import trust_of
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.echo import BAD, NUM_WORDS
from diptych.protos.errors import DiptychError
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.trust import ROUTER
from diptych.protos.types import GENERATING, Role, SamplingParams

PREFILL_HOST, DECODE_HOST, PORT = "10.231.1.2", "10.231.2.2", 7000
START_S, WAIT_S = 60.0, 30.0
SETTINGS = {
    "source": "echo",
    "kv": {"memory_mib": 8, "block_tokens": 16},
    "prefill": {"step_tokens": 256, "threads": 1},
    "decode": {"step_tokens": 256, "threads": 1},
}
TRANSFER = {"transport": "auto", "slot_kib": 64, "slots": 8}


class EngineProcess:
    """One engine; `status` may be asked from any thread."""

    def __init__(self, space: Namespace, order: dict[str, Any], log: IO[bytes]) -> None:
        program = Path(__file__).with_name("engine_process.py")
        command = space.command([sys.executable, str(program)])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._lock = threading.Lock()
        self._tell(json.dumps(order))

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine has ended with {self.process.wait(5)}"
        return line

    def info(self) -> EngineInfo:
        """Once, when it listens."""
        return INFO.validate_json(self._hear())

    def status(self) -> EngineStatus:
        """As of now, over a pipe: no network is in its way."""
        with self._lock:
            self._tell("status")
            return STATUS.validate_json(self._hear())

    def counter(self, name: str) -> float:
        """One of them."""
        return self.status().counters[name]

    def stop(self) -> None:
        """Let it end; kill it when it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(15)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass
class Answer:
    """One request. `error`: the code of what ended it."""

    seconds: float
    right: bool = False
    bad: bool = False  # other tokens than the model's: the one thing that must never be
    error: str = ""
    explanation: Explanation | None = None

    @property
    def transport(self) -> str:
        """What its KV came over; empty when the decode engine computed it."""
        return self.explanation.transport if self.explanation is not None else ""


@dataclass
class NetRig:
    """Running; made by `net_rig`."""

    router: Router
    engines: dict[Role, EngineProcess]
    infos: dict[Role, EngineInfo]
    spaces: dict[str, Namespace]
    cable: Cable
    authority: Path
    secret: bytes
    log: Path
    rng: random.Random = field(default_factory=lambda: random.Random(3))

    async def ask(self, num_prompt: int = 300, max_tokens: int = 8, timeout_s: float = 60.0) -> Answer:
        """A fresh prompt; every token is compared with the model's."""
        prompt = tuple(self.rng.randrange(NUM_WORDS) for _ in range(num_prompt))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        call = GenerateCall(model="echo", prompt=prompt, sampling=sampling, timeout_s=timeout_s)
        tokens: list[int] = []
        began = time.monotonic()
        answer = Answer(0.0)
        try:
            async for delta in self.router.generate(call):
                tokens += delta.tokens
                answer.explanation = delta.finish or answer.explanation
        except DiptychError as exc:
            answer.error = exc.code
        answer.seconds = time.monotonic() - began
        wanted = expected_tokens(prompt, max_tokens)
        answer.bad = tokens != wanted[: len(tokens)] or BAD in tokens
        answer.right = not answer.error and tokens == wanted
        return answer

    async def ask_for(self, seconds: float, *, every_s: float = 0.1, num_prompt: int = 300) -> list[Answer]:
        """An open loop: a request every so often, however long each takes; all of their answers."""
        tasks: list[asyncio.Task[Answer]] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            tasks.append(asyncio.create_task(self.ask(num_prompt)))
            await asyncio.sleep(every_s)
        return list(await asyncio.gather(*tasks))

    async def status(self, role: Role) -> EngineStatus:
        """Of one engine."""
        return await asyncio.to_thread(self.engines[role].status)

    async def count(self, role: Role, name: str) -> float:
        """One counter of an engine."""
        return (await self.status(role)).counters[name]

    async def transferred(self, within_s: float) -> float:
        """Seconds until an answer's KV comes over the wire again. Raises TimeoutError."""
        began = time.monotonic()
        async with asyncio.timeout(within_s):
            while not (await self.ask()).transport:  # noqa: ASYNC110 - a question at a time
                await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def quiet(self, within_s: float = 35.0) -> None:
        """Until nothing runs, waits or is held, in pools and ring; TimeoutError says that something leaks."""
        async with asyncio.timeout(within_s):
            while True:
                readings = [await self.status(role) for role in GENERATING]
                if not any(map(held_in, readings)):
                    break
                await asyncio.sleep(0.1)
        assert all(reading.counters["kv_thread_faults_total"] == 0 for reading in readings)


@asynccontextmanager
async def net_rig(authority: Path, **transfer: Any) -> AsyncIterator[NetRig]:
    """Everything up, and one answer given whose KV came over the wire. Further keywords are transfer settings."""
    with ExitStack() as stack:
        spaces = stack.enter_context(_spaces())
        cable = _lay(spaces)
        stack.callback(cable.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dtn-", dir="/tmp")))
        log = stack.enter_context((folder / "engines.log").open("ab"))
        secret = os.urandom(32)
        security = SecuritySettings(tls=TlsSettings(**{
            name: authority / file for name, file in (("ca", "ca.crt"), ("cert", "{role}.crt"), ("key", "{role}.key"))
        }))  # fmt: skip
        engines: dict[Role, EngineProcess] = {}
        for role, host in ((Role.PREFILL, PREFILL_HOST), (Role.DECODE, DECODE_HOST)):
            order = {
                "role": role.value,
                "epoch": 5,
                "host": host,
                "port": PORT,
                "cache": str(folder),
                "run_dir": str(folder),
                "settings": SETTINGS,
                "transfer": TRANSFER | transfer,
                "security": security.model_dump(mode="json"),
                "secret": secret.hex(),
            }
            engines[role] = EngineProcess(spaces[role.value], order, log)
            stack.callback(engines[role].stop)
        async with asyncio.timeout(START_S):
            infos = {role: await asyncio.to_thread(engine.info) for role, engine in engines.items()}
        settings = RouterSettings()
        directory = StaticDirectory(list(infos.values()))
        router = Router(directory=directory, settings=settings, trust=trust_of(security, secret, ROUTER))
        await router.start()
        rig = NetRig(router, engines, infos, spaces, cable, authority, secret, folder / "engines.log")
        try:
            await until(lambda: sum(session.is_ready for session in router.view.sessions()) == len(infos))
            await rig.transferred(WAIT_S)
            yield rig
        except BaseException:
            print((folder / "engines.log").read_text()[-6000:])
            raise
        finally:
            await router.stop()


async def until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Poll until it holds. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what it looks at lives in other threads
            await asyncio.sleep(0.02)


@contextmanager
def _spaces() -> Iterator[dict[str, Namespace]]:
    """The three of them, one rig on the machine at a time: its addresses are fixed."""
    with ExitStack() as stack:
        lock = stack.enter_context(open(f"{tempfile.gettempdir()}/diptych-netns.lock", "w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_stale()
        spaces: dict[str, Namespace] = {}
        for name, short in (("prefill", "p"), ("decode", "d"), ("stranger", "s")):
            spaces[name] = Namespace(short)
            stack.callback(spaces[name].remove)
        spaces["prefill"].join("10.231.1.2/24", other=None, theirs="10.231.1.1/24")
        spaces["decode"].join("10.231.2.2/24", other=None, theirs="10.231.2.1/24")
        spaces["stranger"].join("10.231.3.2/24", other=spaces["prefill"], theirs="10.231.3.1/24")
        spaces["stranger"].ip("route", "add", PREFILL_HOST, "via", "10.231.3.1")
        yield spaces


def _lay(spaces: dict[str, Namespace]) -> Cable:
    """The KV path: the decode engine reaches the prefill engine's address over this wire alone. `to_b` is its way."""
    decode = spaces["decode"].tun("kv0", "10.231.9.2", "10.231.9.1")
    prefill = spaces["prefill"].tun("kv0", "10.231.9.1", "10.231.9.2")
    spaces["decode"].ip("route", "add", PREFILL_HOST, "dev", "kv0", "src", "10.231.9.2")
    return Cable(decode, prefill)
