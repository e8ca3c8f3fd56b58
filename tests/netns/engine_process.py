"""One echo engine as a plain process. The first line of stdin is a JSON object that says which; its info comes out as
JSON. Then each line `status` is answered with the engine's status, and the end of stdin ends it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from diptych.cluster.config import ModelSettings, SecuritySettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import resolve
from diptych.cluster.security import engine_name, trust_of
from diptych.protos.settings import TransferSettings
from diptych.protos.status import EngineInfo, EngineStatus
from diptych.protos.types import EngineId, Role

INFO, STATUS = TypeAdapter(EngineInfo), TypeAdapter(EngineStatus)


def make(order: dict[str, Any]) -> Engine:
    folder = resolve("echo", Path(order["cache"]))
    role = Role(order["role"])
    security = SecuritySettings.model_validate(order["security"])
    spec = EngineSpec(
        engine_id=EngineId(f"{role.value}-0"),
        epoch=order["epoch"],
        roles=frozenset({role}),
        model="echo",
        settings=ModelSettings.model_validate(order["settings"]),
        transfer=TransferSettings.model_validate(order["transfer"]),
        folder=folder.path,
        facts=folder.facts,
        dtype="float32",
        run_dir=Path(order["run_dir"]),
        host=order["host"],
        port=order["port"],
        security=security,
        cores=1,
    )
    trust = trust_of(security, bytes.fromhex(order["secret"]), engine_name(spec.roles))
    return Engine(spec, on_failure=fail, trust=trust)


def fail(error: BaseException) -> None:
    logging.getLogger(__name__).critical("the engine ends: %r", error)
    os._exit(70)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    engine = make(json.loads(sys.stdin.readline()))
    print(INFO.dump_json(engine.start().info).decode(), flush=True)
    for _ in sys.stdin:
        print(STATUS.dump_json(engine.status()).decode(), flush=True)
    engine.stop()


if __name__ == "__main__":
    main()
