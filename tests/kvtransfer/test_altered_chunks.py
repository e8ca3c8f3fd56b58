"""R09: transfer chunks are altered, cut, doubled and overtaken between two whole engines; every token is compared."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rest import at_rest

from diptych.cluster.config import LimitSettings, ModelSettings, RouterSettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import resolve
from diptych.cluster.router.router import GenerateCall, Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.echo import ECHO, NUM_WORDS
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import TransferSettings
from diptych.protos.types import GENERATING, EngineId, Role, SamplingParams

TRANSFERS = 500  # by each of two transports
AT_ONCE = 8
SETTINGS = ModelSettings.model_validate(
    {
        "source": ECHO,
        "kv": {"memory_mib": 8},
        "prefill": {"threads": 1, "step_tokens": 256},
        "decode": {"threads": 1, "step_tokens": 256},
    }
)
WAIT_S = 30


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@dataclass
class Engines:
    router: Router
    by_role: dict[Role, Engine]
    rng: random.Random = field(default_factory=lambda: random.Random(9))

    def count(self, role: Role, name: str) -> float:
        return self.by_role[role].status().counters.get(name, 0.0)

    def fired(self, role: Role, point: str) -> float:
        """Faults that happened there, in that engine."""
        return self.count(role, f"fault_{point.replace('.', '_')}_total")

    async def ask(self) -> bool:
        """Whether the answer to a fresh prompt is the model's."""
        prompt = tuple(self.rng.randrange(NUM_WORDS) for _ in range(self.rng.randrange(100, 700)))
        sampling = SamplingParams(max_tokens=4, temperature=0.0)
        tokens: list[int] = []
        async for delta in self.router.generate(GenerateCall(model=ECHO, prompt=prompt, sampling=sampling)):
            tokens += delta.tokens
        return tokens == expected_tokens(prompt, 4)

    async def ask_all(self, count: int) -> int:
        """How many of so many answers are right."""
        seats = asyncio.Semaphore(AT_ONCE)

        async def one() -> bool:
            async with seats:
                return await self.ask()

        return sum(await asyncio.gather(*(one() for _ in range(count))))

    async def quiet(self) -> None:
        """Nothing is held any more."""
        await at_rest(self.by_role.values(), WAIT_S)
        for role in GENERATING:
            assert self.count(role, "kv_thread_faults_total") == 0


@asynccontextmanager
async def engines(run_dir: Path, transport: str, rules: Sequence[dict[str, Any]] = ()) -> AsyncIterator[Engines]:
    folder = await asyncio.to_thread(resolve, ECHO, run_dir)
    made: dict[Role, Engine] = {}
    infos = []
    router: Router | None = None
    try:
        for role in GENERATING:
            spec = EngineSpec(
                engine_id=EngineId(f"{role.value}-0"),
                epoch=5,
                roles=frozenset({role}),
                model=ECHO,
                settings=SETTINGS,
                transfer=TransferSettings.model_validate({"transport": transport, "slot_kib": 64, "slots": 8}),
                folder=folder.path,
                facts=folder.facts,
                dtype="float32",
                run_dir=run_dir,
                cores=1,
                faults=FaultSettings.model_validate({"seed": 9, "rules": rules}),
            )
            made[role] = Engine(spec, on_failure=_fail)
            infos.append((await asyncio.to_thread(made[role].start)).info)
        settings = RouterSettings(limits=LimitSettings(request_timeout_s=60))
        router = Router(directory=StaticDirectory(infos), settings=settings)
        await router.start()
        async with asyncio.timeout(WAIT_S):
            while sum(session.is_ready for session in router.view.sessions()) < len(infos):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield Engines(router, made)
    finally:
        if router is not None:
            await router.stop()
        for engine in made.values():
            await asyncio.to_thread(engine.stop)


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_every_altered_chunk_is_found_and_no_token_is_wrong(transport: str, run_dir: Path) -> None:
    chunk = {"point": "hinge.fetch", "message": "chunk"}
    ready = {"point": "hinge.out", "message": "ready"}
    rules = [
        chunk | {"action": "corrupt", "probability": 0.06},
        chunk | {"action": "truncate", "probability": 0.06},
        ready | {"action": "duplicate", "probability": 0.1},
        ready | {"action": "reorder", "probability": 0.1, "delay_s": 0.02},
    ]
    async with engines(run_dir, transport, rules) as pair:
        right = await pair.ask_all(TRANSFERS)
        await pair.quiet()
        injected = pair.fired(Role.DECODE, "hinge.fetch")
        found = pair.count(Role.DECODE, "kv_checksum_failures_total")
        disordered = pair.fired(Role.PREFILL, "hinge.out")
        whole = pair.count(Role.DECODE, "kv_transfers_total")
        print(
            f"\nR09 {transport}: {right} of {TRANSFERS} right; {injected:g} chunks altered, {found:g} found; "
            f"{disordered:g} announcements doubled or late; {whole:g} transfers whole"
        )
        assert right == TRANSFERS
        assert found == injected > TRANSFERS / 20
        assert disordered > TRANSFERS / 10
        assert whole > TRANSFERS / 2


async def test_engines_of_two_protocols_refuse_each_other_and_answers_are_right(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.kvtransfer import layout

    digest = layout.compat_digest
    versions = iter([layout.PROTOCOL_VERSION, layout.PROTOCOL_VERSION + 1])

    def skewed(*args: Any, **more: Any) -> bytes:
        monkeypatch.setattr(layout, "PROTOCOL_VERSION", next(versions))
        return digest(*args, **more)

    monkeypatch.setattr("diptych.cluster.engine.compose.compat_digest", skewed)
    async with engines(run_dir, "shm") as pair:
        assert await pair.ask_all(5) == 5
        await pair.quiet()
        assert pair.count(Role.DECODE, "kv_transfer_failures_total") == 5
        assert pair.count(Role.DECODE, "kv_pairs_lost_total") == 0
        assert not any(pair.count(role, "kv_transfers_total") for role in GENERATING)
        assert pair.count(Role.DECODE, "kv_unreachable_peers") == 1
