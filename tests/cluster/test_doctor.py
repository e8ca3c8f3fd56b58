from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from diptych.cluster import doctor, doctor_cluster, doctor_machine
from diptych.cluster.bench.shapes import write_shape
from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.cluster.control import cards
from diptych.cluster.control.cards import Card, Cards
from diptych.cluster.control.memory import MIB
from diptych.cluster.doctor_machine import Finding, State
from diptych.cluster.models import ModelFacts, ModelFolder
from diptych.cluster.store.schema import prepare_store

FACTS = ModelFacts(
    name="m",
    architecture="LlamaForCausalLM",
    layers=30,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_context_tokens=8192,
    weights_bytes=1,
    num_parameters=100 * MIB,
    eos_token_ids=(2,),
    bos_token_id=1,
    dtype="bfloat16",
    chat_template=None,
)
FOLDERS = {DEFAULT_MODEL: ModelFolder(Path("/m"), FACTS)}


GIB = 1 << 30
TWO_CARDS = Cards((Card("A", 2 * GIB, GIB), Card("B", 4 * GIB)), "580.1")
ONE_CARD = Cards(TWO_CARDS.cards[:1], "580.1")
NO_DRIVER = Cards(why_none="there is no driver")


def useless(why: str) -> Cards:
    return Cards((), "580.1", why, is_hidden=True)


@pytest.mark.parametrize(
    ("finding", "state", "words"),
    [
        (doctor_machine.system("Linux", (3, 11)), State.OK, "Python 3.11"),
        (doctor_machine.system("Linux", (3, 10)), State.STOP, "Python 3.10 is older than 3.11"),
        (doctor_machine.system("Darwin", (3, 12)), State.STOP, "Darwin"),
        (doctor_machine.imports(["json", "socket"]), State.OK, "json"),
        (doctor_machine.imports(["json", "no_such_module"]), State.STOP, "no_such_module"),
        (doctor_machine.bfloat16(True), State.OK, "bfloat16"),
        (doctor_machine.bfloat16(False), State.SLOW, "float32"),
        (
            doctor_machine.gpu(NO_DRIVER, NO_DRIVER)[-1],
            State.OK,
            "none: there is no driver; engines compute on the CPU",
        ),
        (doctor_machine.gpu(TWO_CARDS, TWO_CARDS)[-1], State.OK, "A with 1.0 of 2.0 GiB free, B with 0.0 of 4.0 GiB"),
        (doctor_machine.gpu(TWO_CARDS, TWO_CARDS)[-1], State.OK, "driver 580.1"),
        (doctor_machine.gpu(TWO_CARDS, ONE_CARD)[-1], State.OK, "CUDA_VISIBLE_DEVICES hides 1"),
        (doctor_machine.gpu(TWO_CARDS, Cards((), why_none="you hide them"))[-1], State.OK, "you hide them, so engines"),
        (doctor_machine.gpu(TWO_CARDS, useless("the package triton is missing"))[-1], State.SLOW, "triton is missing"),
        (doctor_machine.cores(8, None), State.OK, "8 usable"),
        (doctor_machine.cores(8, 2.0), State.SLOW, "may use the time of 2"),
        (doctor_machine.files(256), State.STOP, "256"),
        (doctor_machine.files(20000), State.OK, "20000"),
        (doctor_machine.shared_memory(Path("/no/such/place")), State.SLOW, "0 MiB free"),
    ],
)
def test_a_machines_finding_says_what_it_is_about(finding: Finding, state: State, words: str) -> None:
    assert finding.state is state
    assert words in finding.told
    assert finding.remedy or state is not State.STOP, "a stop comes with a remedy"


def test_a_missing_c_compiler_is_a_note_with_its_reason_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = doctor_machine.native_code()
    assert finding.state is State.SLOW
    assert "CC names no-such-compiler, which is not there" in finding.told
    assert "install gcc" in finding.remedy
    broken = doctor_machine.native_code("no_such_module")
    assert broken.state is State.SLOW
    assert "no_such_module" in broken.told


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        ("print('2.11 for CUDA 13.0 2')", State.OK, "2.11 for CUDA 13.0 finds 2 of 2 cards (driver 580.1)"),
        ("print('2.11 for CUDA 13.0 1')", State.STOP, "finds 1 of 2 cards"),
        ("raise OSError('libcudart.so is missing')", State.STOP, "OSError: libcudart.so is missing"),
        ("print('what?')", State.STOP, "it said 'what?'"),
    ],
)
def test_torch_is_asked_for_the_cards_that_the_driver_shows(code: str, state: State, words: str) -> None:
    [finding] = doctor_machine.torch_on(TWO_CARDS, code)
    assert (finding.state, bool(finding.remedy)) == (state, state is State.STOP)
    assert words in finding.told


def test_this_torch_answers_what_it_is_asked() -> None:
    [finding] = doctor_machine.torch_on(TWO_CARDS)
    assert f"finds {torch.cuda.device_count()} of 2 cards" in finding.told


def test_every_reason_against_a_card_has_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    reasons = [cards.why_no_compiler(), "the installed torch was built without CUDA"]
    reasons.append("the package triton is missing: pip install 'diptych[gpu]'")
    monkeypatch.setenv("CC", "true")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    reasons.append(cards.why_no_compiler())
    for reason in reasons:
        use = doctor_machine.gpu(TWO_CARDS, useless(reason))[-1]
        assert (use.state, bool(use.remedy)) == (State.SLOW, True), reason


def test_a_model_that_no_card_holds_stops_with_its_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_shape("llama-8b", tmp_path)
    for free, state in ((140 * GIB, State.OK), (8 * GIB, State.STOP)):
        monkeypatch.setattr(cards, "find", lambda free=free: Cards((Card("A", 141 * GIB, free),)))
        monkeypatch.setattr("diptych.cluster.control.host.available_memory", lambda: (100 * GIB, "free memory"))
        finding = doctor_cluster.memory(load_config(), {DEFAULT_MODEL: folder})
        assert finding.state is state
        assert ("memory plan of the card" if state is State.STOP else "2 engines fit on cards") in finding.told


def test_a_c_compiler_that_works_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stands_in.py").write_text("def why_missing(): return None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor_machine.native_code("stands_in").state is State.OK


def test_a_package_that_is_missing_or_too_old_stops_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["numpy>=2", "numpy>=999", "no-such-package>=1", "alsomissing; extra == 'gpu'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    missing = doctor_machine.packages()
    assert {finding.state for finding in missing} == {State.STOP}
    assert [finding.remedy for finding in missing] == ["pip install 'numpy>=999'", "pip install 'no-such-package>=1'"]


def test_the_installation_that_runs_the_tests_is_complete() -> None:
    assert [finding.state for finding in doctor_machine.packages()] == [State.OK]


def test_a_cgroups_share_of_cpu_time_is_read(tmp_path: Path) -> None:
    assert doctor_machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor_machine.cpu_quota(tmp_path) == 1.5


def test_a_taken_port_stops_and_a_free_choice_is_not_looked_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        [finding] = doctor_cluster.ports(load_config(None, [f"router.port={port}"]))
    assert finding.state is State.STOP
    assert str(port) in finding.told
    assert "router.port" in finding.remedy
    assert doctor_cluster.ports(load_config(None, ["router.port=0"])) == []


def test_memory_that_does_not_suffice_stops_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((100_000 * MIB, State.OK), (1000 * MIB, State.STOP)):
        monkeypatch.setattr("diptych.cluster.control.host.available_memory", lambda free=free: (free, "free memory"))
        finding = doctor_cluster.memory(load_config(), FOLDERS)
        assert finding.state is state
        assert f"{free // MIB}" in finding.told.replace(",", "")


def test_more_engines_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert doctor_cluster.engines(load_config()).state is State.SLOW
    assert doctor_cluster.engines(load_config(None, [f"models.{DEFAULT_MODEL}.layout=colocated"])).state is State.OK


def test_a_run_dir_must_be_private_and_hold_sockets(tmp_path: Path) -> None:
    private = tmp_path / "own"
    assert doctor_cluster.run_dir(private).state in (State.OK, State.STOP), "too long a path for sockets is told"
    private.mkdir(mode=0o755)
    finding = doctor_cluster.run_dir(private)
    assert finding.state is State.STOP
    assert "chmod 700" in finding.remedy
    assert doctor_cluster.run_dir(Path("/proc/none/run")).state is State.STOP


def test_a_cache_that_cannot_be_written_is_noted_as_such() -> None:
    finding = doctor_cluster.disk("cache_dir", Path("/proc/none"))
    assert finding.state is State.SLOW
    assert "read-only" in finding.told


def test_more_context_than_the_model_has_stops_with_both_numbers() -> None:
    finding = doctor_cluster.memory(load_config(None, [f"models.{DEFAULT_MODEL}.max_context_tokens=9000"]), FOLDERS)
    assert finding.state is State.STOP
    assert f"models.{DEFAULT_MODEL}.max_context_tokens is 9000, and this model has 8192 positions" in finding.told


def test_no_two_findings_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cluster, "models", lambda config: (FOLDERS, []))
    names = [finding.name for finding in doctor_cluster.examine(load_config(None, ["router.port=0"]))]
    assert len(names) == len(set(names))


def test_a_model_that_cannot_be_served_stops_and_the_others_are_still_told() -> None:
    config = load_config(None, ["models.bad.source=/no/such/model"])
    folders, findings = doctor_cluster.models(config)
    assert [finding.state for finding in findings if "bad" in finding.told] == [State.STOP]
    assert "bad" not in folders


def test_a_ray_cluster_that_nobody_runs_stops() -> None:
    assert doctor_cluster.ray_cluster("127.0.0.1:1").state is State.STOP


def test_the_exit_code_and_the_json_say_whether_something_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_machine, "examine", lambda: [Finding("bfloat16", State.SLOW, "none")])
    monkeypatch.setattr(doctor_cluster, "examine", lambda config: [Finding("port", State.OK, "free")])
    assert doctor.run_doctor(None, [], as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(finding["name"], finding["state"]) for finding in told] == [
        ("bfloat16", "note"),
        ("configuration", "ok"),
        ("port", "ok"),
    ]
    assert doctor.run_doctor(None, ["router.prot=1"]) == 1
    text = capsys.readouterr().out
    assert "router.prot is not a known key (did you mean port?)" in text
    assert "1 of these would stop `diptych serve`" in text


def test_the_store_is_looked_at_and_not_made(tmp_path: Path) -> None:
    """A database of a newer version, or a folder that cannot be written, would stop a start."""

    def store(*more: str) -> Finding:
        return doctor_cluster.store(load_config(overrides=[f"data_dir={tmp_path / 'data'}", *more]))

    first = store()
    assert (first.state, "does not exist yet" in first.told) == (State.OK, True)
    assert not (tmp_path / "data").exists()
    exposed = ["router.host=0.0.0.0"]
    assert "there is no key yet" in store(*exposed).told
    config = load_config(overrides=[f"data_dir={tmp_path / 'data'}"])
    prepare_store(config.store, config.data_dir)
    assert "is up to date" in store().told
    assert "no key opens the API" in store(*exposed).told
    (tmp_path / "data" / "diptych.db").write_bytes(b"rubbish" * 1000)
    spoilt = store()
    assert (spoilt.state, "not a database" in spoilt.told) == (State.STOP, True)
    assert spoilt.remedy
    assert store("data_dir=/proc/none").state is State.STOP
    missing = store("store.url=postgresql+nodriver://u@h/d")
    assert (missing.state, "is not installed" in missing.told) == (State.STOP, True)
