"""Batches through an engine's session, where something goes wrong. The echo model computes nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cluster.bench import offline as verb
from diptych.cluster.bench.offline import OfflineOptions
from diptych.cluster.bench.session_client import Batch, SessionClient
from diptych.cluster.engine.offline import OfflineEngines
from diptych.protos.errors import EngineFault
from diptych.protos.trust import SECRET_BYTES
from diptych.protos.types import Role

SECRET = os.urandom(SECRET_BYTES)


@pytest.fixture
def engines() -> Iterator[OfflineEngines]:
    overrides = ["models.probe.source=echo", "models.probe.kv.memory_mib=8", "models.probe.max_context_tokens=256"]
    options = OfflineOptions(overrides=overrides, model="probe", workloads=["1x1x1"])
    with tempfile.TemporaryDirectory(prefix="dt-", dir="/tmp") as name:  # unix socket paths hold 107 bytes
        folder = Path(name)
        model, settings, config = verb._settings(options)
        specs = verb._specs(model, settings, config, verb._model(model, settings, config, folder), folder)
        made = OfflineEngines(specs, has_sessions=True)
        made.start()
        yield made
        made.stop()


def batch(*prompts: list[int], num_tokens: int = 5) -> Batch:
    return Batch(prompts, num_tokens, b"salt")


def test_a_session_ends_and_the_bare_engine_goes_on_and_a_second_session_too(engines: OfflineEngines) -> None:
    for _ in range(2):
        with engines.sessions(SECRET) as info, SessionClient(info, SECRET, lambda: engines.lost) as client:
            for _ in range(2):
                received = client.run(batch([1, 2, 3], [4, 5]))
                assert [one.num_tokens for one in received] == [5, 5]
                assert all(0 < one.first_token_s <= one.last_token_s for one in received)
        answers = engines.generate([[1, 2, 3]] * 3, 5, salt=b"")
        assert [answer.num_tokens for answer in answers] == [5] * 3


def test_what_the_engine_refuses_is_the_batches_failure_and_the_next_batch_is_whole(engines: OfflineEngines) -> None:
    with engines.sessions(SECRET) as info, SessionClient(info, SECRET, lambda: engines.lost) as client:
        with pytest.raises(EngineFault, match="256"):
            client.run(batch([1, 2], list(range(300))))
        assert [one.num_tokens for one in client.run(batch([1, 2]))] == [5]


def test_an_engine_that_dies_ends_the_batch_with_its_error(
    engines: OfflineEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect() -> bool:
        raise RuntimeError("a defect")

    with engines.sessions(SECRET) as info, SessionClient(info, SECRET, lambda: engines.lost) as client:
        monkeypatch.setattr(engines._parts[Role.DECODE].workers[Role.DECODE], "step", defect)
        with pytest.raises(RuntimeError, match="a defect"):
            client.run(batch([1, 2, 3]))


def test_a_client_that_is_killed_is_told(engines: OfflineEngines) -> None:
    with engines.sessions(SECRET) as info, SessionClient(info, SECRET, lambda: engines.lost) as client:
        client._process.kill()
        with pytest.raises(EngineFault, match="client has ended"):
            client.run(batch([1, 2, 3]))


def test_another_secret_opens_no_session(engines: OfflineEngines) -> None:
    told: list[BaseException] = []

    def lost() -> BaseException | None:
        """What the engine counted, in place of half a minute of waiting."""
        (parts,) = engines._parts.values()
        if sum(refused.total for refused in parts.refused.values()):
            told.append(EngineFault("it was refused"))
        return told[0] if told else None

    with engines.sessions(SECRET) as info, pytest.raises(EngineFault, match="it was refused"):
        SessionClient(info, os.urandom(SECRET_BYTES), lost).__enter__()
