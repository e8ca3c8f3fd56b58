"""`diptych providers list` and `test` tell what there is and what is wrong, with the remedy and never with a key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import provider_wire as w
import pytest

from diptych.cluster.config import DiptychConfig, check_config
from diptych.cluster.providers.verbs import REMEDIES, run_list, run_test
from diptych.protos.errors import StartupError
from diptych.protos.failures import FailureKind


def place(**providers: object) -> Callable[[], DiptychConfig]:
    return lambda: check_config({"models": {"echo": {"source": "echo"}}, "providers": providers}, "test")


async def asked(target: str, told: w.Wire, *, as_json: bool = False, key: str = "env:LAB_KEY") -> int:
    lab = {"base_url": f"http://127.0.0.1:{told.port}/v1", "api_key": key}
    return await asyncio.to_thread(run_test, target, timeout_s=5.0, as_json=as_json, place=place(lab=lab))


def test_the_list_says_whose_key_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GROQ_API_KEY", w.KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("CLOUDFLARE_ACCOUNT_ID", raising=False)
    lab = {"base_url": "http://10.0.0.7:8000/v1", "api_key": "file:/nowhere/key"}
    assert run_list(as_json=True, place=place(lab=lab, groq={})) == 0
    out = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(out)}
    assert (rows["groq"]["has_key"], rows["groq"]["configured"], rows["groq"]["key"]) == (True, True, "$GROQ_API_KEY")
    assert (rows["openai"]["has_key"], rows["openai"]["configured"]) == (False, False)
    assert (rows["lab"]["key"], rows["lab"]["has_key"]) == ("/nowhere/key", False)
    assert run_list(as_json=False, place=place(groq={})) == 0
    table = capsys.readouterr().out
    assert "$GROQ_API_KEY (set)" in table
    assert "$OPENAI_API_KEY (-)" in table
    assert "`ollama serve`" in table
    needs = next(line for line in table.splitlines() if line.strip().startswith("cloudflare "))
    assert "the Cloudflare account's id" in needs  # without it the key alone helps nobody
    assert w.KEY not in out + table


async def test_an_answer_shows_its_time_and_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAB_KEY", w.KEY)
    async with w.wire(w.answers(w.REPLY, x_request_id="r1")) as told:
        assert await asked("lab/a/model", told) == 0
        line = capsys.readouterr().out
        assert line.startswith("lab/a/model: answered by m after ")
        assert "3 tokens in, 1 out" in line
        assert await asked("lab/m", told, as_json=True) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["usage"] == {"input_tokens": 3, "output_tokens": 1}
        assert found["request_id"] == "r1"
        sent = json.loads(told.seen[0].body)
        assert (sent["model"], sent["max_completion_tokens"]) == ("a/model", 1)


async def test_a_failure_shows_its_kind_and_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAB_KEY", w.KEY)
    error = w.answers({"error": {"message": f"wrong key {w.KEY}"}}, "401 Unauthorized")
    async with w.wire(error) as told:
        assert await asked("lab/m", told) == 1
        text = capsys.readouterr().out
        assert text.startswith("lab/m: auth, status 401 after ")
        assert REMEDIES[FailureKind.AUTH] in text
        assert w.KEY not in text
        assert await asked("lab/m", told, as_json=True) == 1
        assert json.loads(capsys.readouterr().out)["failure"]["kind"] == "auth"


async def test_what_cannot_be_asked_is_told_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LAB_KEY", raising=False)
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    async with w.wire(w.answers(w.REPLY)) as told:
        for target, words in (("groq/x", "$GROQ_API_KEY"), ("grok/x", "did you mean groq"), ("lab/m", "$LAB_KEY")):
            assert await asked(target, told) == 1
            assert words in capsys.readouterr().err
        assert not told.seen


def test_every_kind_of_failure_has_a_remedy() -> None:
    assert REMEDIES.keys() == set(FailureKind)


WRITTEN = [
    ({"api_key": w.KEY}, r"providers\.groq\.api_key: should say where the key is"),
    ({"api_key": [w.KEY]}, r"providers\.groq\.api_key: should say where the key is"),
    (w.KEY, r"providers\.groq: should be a group of keys"),
    ({"headers": [w.KEY]}, r"providers\.groq\.headers: should be a group of keys"),
    ({"headers": {"authorization": w.KEY}}, r"providers\.groq\.headers: 'authorization' cannot be set here"),
    ({"region": w.KEY + "!"}, r"providers\.groq\.region: .* should be a name"),
    ({"base_url": f"https://x:{w.KEY}@x/v1"}, r"providers\.groq\.base_url: should hold no name or password"),
]


@pytest.mark.parametrize(("row", "words"), WRITTEN)
def test_a_key_in_the_configuration_is_not_repeated_anywhere(row: object, words: str) -> None:
    with pytest.raises(StartupError, match=words) as caught:
        place(groq=row)()
    texts = [str(caught.value), repr(caught.value), str(caught.value.__cause__), repr(caught.value.__cause__)]
    assert not any(w.KEY in text for text in texts)
