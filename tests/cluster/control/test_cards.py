"""Which cards an engine could use: what the driver shows, less what is hidden or cannot be computed on."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.control import cards
from diptych.cluster.control.cards import Card

TWO = (Card("A", 10, 9, "GPU-aaaa-1", (9, 0)), Card("B", 20, 19, "GPU-bbbb-2", (10, 0)))


class FakeNvml:
    """The driver's library, with two cards. `broken` calls give an error code."""

    def __init__(self, broken: str = "", count: int = 2) -> None:
        self.broken, self.count, self.ended = broken, count, 0
        self.capabilities = [card.capability for card in TWO]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == self.broken:
                return 999
            return int(getattr(self, f"_{name.removeprefix('nvml')}")(*args) or 0)

        if name.startswith("nvml"):
            return call
        raise AttributeError(name)

    def _Init_v2(self) -> None:
        pass

    def _Shutdown(self) -> None:
        self.ended += 1

    def _SystemGetDriverVersion(self, text: Any, size: int) -> None:
        text.value = b"580.1"

    def _DeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = self.count

    def _DeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> None:
        handle._obj.value = index + 1

    def _DeviceGetName(self, handle: Any, text: Any, size: int) -> None:
        text.value = TWO[handle.value - 1].name.encode()

    def _DeviceGetUUID(self, handle: Any, text: Any, size: int) -> None:
        text.value = TWO[handle.value - 1].uuid.encode()

    def _DeviceGetMemoryInfo(self, handle: Any, memory: Any) -> None:
        memory._obj.total, memory._obj.free = TWO[handle.value - 1].total, TWO[handle.value - 1].free

    def _DeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = self.capabilities[handle.value - 1]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(cards, "why_unusable", lambda: "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_the_drivers_cards_are_told_with_their_memory_and_nvml_is_let_go(nvml: FakeNvml) -> None:
    found = cards.find()
    assert found == cards.Cards(TWO, "580.1")
    assert (found.count, nvml.ended) == (2, 1)


def test_a_card_that_is_too_small_for_the_kernels_is_refused_by_name_unless_it_is_hidden(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.capabilities[1] = (8, 9)
    found = cards.find()
    assert (found.count, found.is_hidden) == (0, True)
    assert "B has compute capability 8.9" in found.why_none
    assert "CUDA_VISIBLE_DEVICES=GPU-aaaa-1 hides" in found.why_none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [card.name for card in cards.find().cards] == ["A"]
    nvml.broken = "nvmlDeviceGetCudaComputeCapability"
    assert cards.find().count == 1, "what the driver does not tell the engine finds out"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("nvmlInit_v2", "does not answer (NVML error 999)"),
        ("nvmlSystemGetDriverVersion", "does not tell its version"),
        ("nvmlDeviceGetHandleByIndex_v2", "finds no card"),
    ],
)
def test_a_broken_driver_is_no_card_and_is_told(nvml: FakeNvml, broken: str, words: str) -> None:
    nvml.broken = broken
    found = cards.find()
    assert (found.count, found.is_hidden) == (0, False)
    assert words in found.why_none


def test_no_driver_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cards.find().why_none == "there is no NVIDIA driver on this machine"
    assert not cards.find().is_hidden


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (None, "AB"),
        ("", ""),
        ("-1", ""),
        ("1", "B"),
        ("1,0", "BA"),
        (" 0 , 1 ", "AB"),
        ("0,7,1", "A"),
        ("GPU-bbbb", "B"),
        ("GPU-cccc,0", ""),
        ("NoDevFiles", ""),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(listed: str | None, names: str) -> None:
    assert "".join(card.name for card in cards.visible(TWO, listed)) == names


def test_a_part_of_a_card_is_one_without_known_memory() -> None:
    assert cards.visible(TWO, "MIG-x/1/0") == (Card("MIG-x/1/0"),)


def test_hidden_is_a_wish_and_unusable_is_a_pity(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (cards.find().count, cards.find().is_hidden) == (0, False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(cards, "why_unusable", lambda: "no compiler")
    found = cards.find()
    assert (found.count, found.is_hidden, found.why_none) == (0, True, "no compiler")


def test_a_compiler_and_pythons_headers_are_what_triton_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC names no-such-compiler, which is not there" in cards.why_no_compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is neither gcc nor clang" in cards.why_no_compiler()
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o700)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h is missing" in cards.why_no_compiler()
    (tmp_path / "Python.h").touch()
    assert cards.why_no_compiler() == ""


def test_torch_without_cuda_and_a_missing_triton_are_told_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cards, "why_no_compiler", lambda: "")
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    there = {"torch": package}

    class Spec:
        origin = str(package / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec() if name in there else None)
    assert cards.why_unusable() == "the installed torch was built without CUDA"
    (package / "lib").mkdir()
    (package / "lib" / "libtorch_cuda.so").touch()
    assert "pip install 'diptych[gpu]'" in cards.why_unusable()
    there["triton"] = package
    assert cards.why_unusable() == ""
    there.clear()
    assert "torch is missing" in cards.why_unusable()
