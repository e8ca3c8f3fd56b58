"""A prefill and a decode engine of the default model in this process, behind a real router over real gRPC; no Ray."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.cluster.config import ModelSettings, RouterSettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder
from diptych.cluster.router.router import Explanation, GenerateCall, Router
from diptych.protos.settings import KvSettings, PrefillSettings, TransferSettings
from diptych.protos.status import EngineInfo
from diptych.protos.types import GENERATING, EngineId, Role, SamplingParams

MODEL = "reference-model"
PATIENCE_S = 60.0  # on a busy machine nobody shall take the other for lost: what crosses is the subject here


@dataclass
class FixedDirectory:
    """A membership that never changes."""

    members: list[EngineInfo]

    async def engines(self) -> tuple[int, list[EngineInfo]]:
        return 1, self.members

    async def wait_change(self, version: int) -> tuple[int, list[EngineInfo]]:
        await asyncio.sleep(3600)
        return version, self.members

    async def settled(self) -> None:
        """It never changes."""


def raise_failure(error: BaseException) -> None:
    raise error


@dataclass
class EnginePair:
    """Start once, stop once; `transport` auto means `local` here, since both engines are in one process."""

    folder: ModelFolder
    transport: Literal["auto", "shm", "grpc"]
    step_tokens: int
    block_tokens: int = 16
    engines: dict[Role, Engine] = field(default_factory=dict)
    infos: list[EngineInfo] = field(default_factory=list)
    run_dir: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="diptych-test-")))

    def start(self) -> None:
        for role in GENERATING:
            spec = EngineSpec(
                engine_id=EngineId(f"{role.value}-0"),
                epoch=1,
                roles=frozenset({role}),
                model=MODEL,
                settings=ModelSettings(
                    dtype="float32",
                    kv=KvSettings(memory_mib=192, block_tokens=self.block_tokens),
                    prefill=PrefillSettings(step_tokens=self.step_tokens),
                ),
                transfer=TransferSettings(
                    transport=self.transport, slot_kib=1024, silence_s=PATIENCE_S, min_mib_s=0.001
                ),
                folder=self.folder.path,
                facts=self.folder.facts,
                dtype="float32",
                run_dir=self.run_dir,
                cores=1,
            )
            self.engines[role] = Engine(spec, on_failure=raise_failure)
            self.infos.append(self.engines[role].start().info)

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()
        self.engines.clear()  # a gigabyte each: the next pair needs the room
        gc.collect()
        shutil.rmtree(self.run_dir)

    @asynccontextmanager
    async def router(self) -> AsyncIterator[Router]:
        router = Router(directory=FixedDirectory(self.infos), settings=RouterSettings(silence_s=PATIENCE_S))
        await router.start()
        try:
            await both_pools_known(router)
            yield router
        finally:
            await router.stop()


async def both_pools_known(router: Router) -> None:
    while not all(router.view.live(MODEL, role) for role in GENERATING):  # noqa: ASYNC110  the view tells nobody
        await asyncio.sleep(0.02)


async def generate(router: Router, prompt: Sequence[int], sampling: SamplingParams) -> tuple[list[int], Explanation]:
    """All tokens of one request, and how it was answered."""
    tokens: list[int] = []
    async for delta in router.generate(GenerateCall(model=MODEL, prompt=tuple(prompt), sampling=sampling)):
        tokens += delta.tokens
        if delta.finish is not None:
            return tokens, delta.finish
    raise AssertionError("no finish")
