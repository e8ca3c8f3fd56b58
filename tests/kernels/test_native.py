"""Building of native code, what is left without it, and memory in large pages."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.kernels.model import load_model
from diptych.kernels.native import build, pages
from diptych.kernels.ops.kv_write import launch as kv_write
from diptych.kernels.ops.kv_write import reference as kv_write_reference
from diptych.kernels.ops.linear.cpu import has_blocked_layout
from diptych.kernels.ops.ragged import Segment, build_batch
from diptych.kernels.ops.rms_norm import launch as rms_norm
from diptych.kernels.ops.rotate import launch as rotate
from diptych.kernels.ops.rotate import reference as rotate_reference
from diptych.kernels.testing import make_tiny_checkpoint

CACHED = (build.library, build._load, build.most_head_dim)
needs_native = pytest.mark.skipif(build.library() is None, reason=f"no native code: {build.why_missing()}")


@pytest.fixture
def forget() -> Iterator[Callable[[], None]]:
    """Lets a test load the native code anew; afterwards the usual one is back."""

    def now() -> None:
        for function in CACHED:
            function.cache_clear()

    yield now
    now()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own and a compiler that only copies what was built before: seconds less for each test."""
    ready = tmp_path / "ready.so"
    native = build.library()
    if native is None:
        pytest.skip(f"no native code: {build.why_missing()}")
    shutil.copy(native._name, ready)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        "if sys.argv[-1] == '--version': print('one'); sys.exit()\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"shutil.copy({str(ready)!r}, sys.argv[sys.argv.index('-o') + 1])\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def cached(place: Path) -> list[str]:
    """What lies in the cache."""
    folder = place / "cache" / "diptych" / "native"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CC": "false"}
    code = "import diptych.kernels.runner; from diptych.kernels.native import build; print(build._load.cache_info())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "misses=0" in done.stdout
    assert not any(tmp_path.iterdir())


def test_it_is_built_once_and_then_found(quick: Path, forget: Callable[[], None]) -> None:
    for _ in range(2):
        forget()
        assert build.why_missing() is None
        assert len((quick / "calls").read_text().splitlines()) == 2  # compiled and linked
    [name] = cached(quick)
    assert name.startswith("cpu-")
    assert name.endswith(".so")


@pytest.mark.parametrize("what", ["compiler", "cpu", "flags", "source"])
def test_another_compiler_cpu_flag_or_source_has_a_file_of_its_own(
    what: str, quick: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    assert build.why_missing() is None
    if what == "compiler":
        (quick / "compiler").write_text((quick / "compiler").read_text().replace("'one'", "'two'"))
    elif what == "cpu":
        monkeypatch.setattr(build, "_cpu", lambda: "another")
    elif what == "flags":
        monkeypatch.setattr(build, "_flags", lambda: ("-O1",))
    else:
        source = quick / "source"
        shutil.copytree(build.SOURCE, source)
        (source / "cpu.c").write_text((source / "cpu.c").read_text() + "\n")
        monkeypatch.setattr(build, "SOURCE", source)
    forget()
    assert build.why_missing() is None
    assert len(cached(quick)) == 2


def test_flags_of_other_processors_leave_out_what_only_x86_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, has in (("x86_64", True), ("aarch64", False)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert ("-mprefer-vector-width=512" in build._flags()) is has


def test_the_library_appears_in_the_cache_at_once_and_whole(quick: Path, forget: Callable[[], None]) -> None:
    """The compiler writes elsewhere: a process that looks meanwhile, or is killed, leaves no half of a file."""
    forget()
    assert build.why_missing() is None
    outputs = [line.split("-o ")[1].split()[0] for line in (quick / "calls").read_text().splitlines()]
    assert {Path(output).parent.parent for output in outputs} == {quick / "cache" / "diptych" / "native"}
    assert not any(Path(output).parent.exists() for output in outputs)


@pytest.mark.slow
def test_processes_that_build_at_the_same_time_all_get_it(quick: Path) -> None:
    code = "import diptych.kernels.native.build as b; assert b.why_missing() is None, b.why_missing()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(cached(quick)) == 1


def test_a_cache_that_cannot_be_written_costs_time_only(
    quick: Path,
    forget: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (quick / "cache").write_text("a file stands where the folder should be")
    monkeypatch.setattr("tempfile.tempdir", str(quick))
    before = sorted(quick.iterdir())
    forget()
    with caplog.at_level(logging.WARNING):
        assert build.why_missing() is None
    assert "compiled at each start" in caplog.text
    assert [path for path in sorted(quick.iterdir()) if path.name != "calls"] == before, "nothing is left behind"
    x = torch.randn(3, 16)
    torch.testing.assert_close(rms_norm.rms_norm(x, torch.ones(16), 0.0), x / x.square().mean(-1, keepdim=True).sqrt())


def test_an_account_without_a_home_builds_too(
    quick: Path, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    forget()
    assert build.why_missing() is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "no C compiler was found (install gcc, or set CC)"),
        ("no-such-compiler -m64", "CC names no-such-compiler, which is not there"),
        ("false", "false failed: exit code 1"),
        ("'", "cannot be built"),
    ],
)
def test_without_a_compiler_the_reason_is_told_and_nothing_else_happens(
    command: str, words: str, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", command)
    if not command:
        monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    assert build.library() is None
    assert not build.has_linear()
    assert build.most_head_dim() == 0
    assert words in (build.why_missing() or "")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(quick: Path, forget: Callable[[], None]) -> None:
    (quick / "compiler").write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'cpu.c: no space' >&2; exit 3; }\n")
    forget()
    assert "cpu.c: no space" in (build.why_missing() or "")
    assert cached(quick) == []


def test_a_library_that_is_none_is_told(quick: Path, forget: Callable[[], None]) -> None:
    (quick / "ready.so").write_text("not a library")
    forget()
    assert "cannot be built or loaded" in (build.why_missing() or "")


def tiny_tokens(folder: Path, dtype: str) -> tuple[list[int], tuple[str, ...]]:
    """Twelve greedy tokens of two sequences after prompts of 9 and 1 tokens, and what was degraded."""
    model = load_model(folder, dtype=dtype)
    shape = (20, model.kv_heads, 4, model.head_dim)
    kind = getattr(torch, dtype)
    kv = {layer: (torch.zeros(shape, dtype=kind), torch.zeros(shape, dtype=kind)) for layer in model.layer_ids}
    ids, ends, told = [3, 8, 1, 40, 9, 9, 2, 77, 5, 6], [9, 1], []
    news = [9, 1]
    with torch.inference_mode():
        for _ in range(12):
            segments = [
                Segment(0, news[0], ends[0] - news[0], range(10)),
                Segment(news[0], news[1], ends[1] - news[1], range(10, 20)),
            ]
            batch = build_batch(segments, 4, torch.device("cpu"))
            kept = torch.tensor([news[0] - 1, sum(news) - 1])
            ids = model.forward(torch.tensor(ids), batch, kv, kept).argmax(-1).tolist()
            told += ids
            news, ends = [1, 1], [end + 1 for end in ends]
    return told, model.degraded


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_native_code_tells_the_same_tokens_and_says_that_it_is_slower(
    dtype: str, tied: bool, forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    native, degraded = tiny_tokens(folder, dtype)
    assert not any("native" in words for words in degraded)
    monkeypatch.setenv("CC", "no-such-compiler")
    forget()
    plain, degraded = tiny_tokens(folder, dtype)
    assert plain == native
    assert "decoding is slower, without native code: CC names no-such-compiler, which is not there" in degraded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [2, 6, 16, 64, 90])
def test_rotation_turns_views_of_a_wider_row_and_nothing_beside_them(dtype: torch.dtype, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    row = torch.randn(7, 9, dim, generator=generator).to(dtype)
    cos, sin = (torch.rand(7, dim, generator=generator).to(dtype) for _ in range(2))
    wide_cos = torch.cat((cos, cos), dim=1)[:, :dim]
    assert not wide_cos.is_contiguous()
    for given_cos in (cos, wide_cos):
        ours, defined = row.clone(), row.clone()
        rotate.rotate(ours[:, 2:6], given_cos, sin)
        rotate_reference.rotate(defined[:, 2:6], cos, sin)
        tolerance = 1e-6 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(ours, defined, atol=tolerance, rtol=tolerance)
        assert torch.equal(ours[:, :2], row[:, :2])
        assert torch.equal(ours[:, 6:], row[:, 6:])


def test_shapes_that_do_not_fit_are_refused_before_native_code_sees_them() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 3\)"):
        rotate.rotate(torch.ones(2, 1, 3), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 10\).*\(5,\)"):
        rms_norm.rms_norm(torch.ones(2, 10), torch.ones(5), 1e-5)


def test_a_norms_weight_may_be_a_view() -> None:
    x, weight = torch.randn(3, 8), torch.rand(16)[::2]
    # The definition computes a view, native code the rest: the last bit may differ.
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-5), rms_norm.rms_norm(x, weight.clone(), 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_keys_and_values_are_stored_from_views_of_any_layout(dtype: torch.dtype, kv_heads: int) -> None:
    segments = [Segment(0, 5, 2, (4, 1)), Segment(5, 1, 0, (0,)), Segment(6, 1, 7, (3, 5))]
    batch = build_batch(segments, 4, torch.device("cpu"))
    row = torch.randn(7, 3 * kv_heads + 1, 6).to(dtype)
    side = torch.randn(kv_heads, 7, 6).to(dtype).transpose(0, 1)
    for k, v in ((row[:, :kv_heads], row[:, -kv_heads:]), (side, row[:, :kv_heads])):
        ours, defined = (torch.full((2, 6, kv_heads, 4, 6), 7.0, dtype=dtype) for _ in range(2))
        kv_write.kv_write(k, v, ours[0], ours[1], batch)
        kv_write_reference.kv_write(k, v, defined[0], defined[1], batch)
        assert torch.equal(ours, defined)


@needs_native
@pytest.mark.parametrize("block", [-1, 6, 1 << 40])
def test_a_block_out_of_the_arena_is_refused_and_nothing_is_stored(block: int) -> None:
    batch = build_batch([Segment(0, 4, 0, (2,)), Segment(4, 4, 0, (block,))], 4, torch.device("cpu"))
    k, arena = torch.ones(8, 2, 6), torch.zeros(2, 6, 2, 4, 6)
    with pytest.raises(IndexError, match="a block that the arena does not have"):
        kv_write.kv_write(k, k, arena[0], arena[1], batch)
    assert not arena.any()


def test_large_pages_hold_no_more_than_was_asked_for_and_change_nothing() -> None:
    assert pages.use_large_pages({}) == 0
    tensor = torch.arange(3 << 20, dtype=torch.int32)
    start, size = tensor.data_ptr(), tensor.nbytes
    odd = {start + 5: 1, start + 4097: (5 << 20) + 3, start + size - 7: 7}
    for memory in ({start: size}, {start + 9: 0}, odd, {start: 1}):
        assert 0 <= pages.use_large_pages(memory) <= sum(memory.values())
    assert torch.equal(tensor, torch.arange(3 << 20, dtype=torch.int32))


def test_memory_that_cannot_lie_in_large_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages.use_large_pages({1 << 46: 4096}) == 0  # nothing is mapped there
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert pages.use_large_pages({1 << 46: 4096}) == 0


@pytest.mark.skipif(not has_blocked_layout(), reason="no oneDNN for bfloat16 here")
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_weights_were_packed_lets_go_of_its_file(tied: bool, tmp_path: Path) -> None:
    """One bias or norm that stays a view of the mapped file keeps all of it in memory, a second copy of the weights."""
    folder = make_tiny_checkpoint(
        tmp_path / "model", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, vocab_size=128
    )
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    model = load_model(folder, dtype="bfloat16")
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert model.weights_bytes > 0
