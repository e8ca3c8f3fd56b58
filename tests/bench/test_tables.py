"""Tables from results that are made up here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Render = Callable[..., str]

ROOT = Path(__file__).resolve().parents[2]


PEERS = {
    "offline": {
        "fast 1.0 llama-8b": {
            "startup_s": 100.0,
            "latency-b1": {"output_tok_s": 200.0},
            "prefill-8k": {"s": 0.4, "output_tok_s": 2.5},
        },
        "slow 2.0 llama-8b": {"latency-b1": {"output_tok_s": 20.0}},
    },
    "http": {"about": "a sentence", "128/256 one at a time": {"output_tok_s": 200, "ttft_p50": 20.0, "tpot_p50": 5.0}},
    "kernels": {"cublas 1x4096x6144": {"us": 15.5}, "fa3 decode 64x8192": {"us": 500.0}},
    "floors": {"llama-8b": {"latency-b1": 285}},
}
RUN = {"card": {"name": "NVIDIA H200"}, "date": "2026-01-02T03:04Z", "commit": "0123456789abcdef", "dirty": False}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, content in PEERS.items():
        write(tmp_path / "peers", f"x_{name}", content)
    return tmp_path


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def render(table: ModuleType, files: Path) -> Render:
    """Of these result files, beside PEERS."""

    def rendered(*results: Path) -> str:
        return str(table.render(table.Results(results), table.Peers(files / "peers", "x")))

    return rendered


def row(text: str, begin: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {begin}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_figures_stand_beside_the_first_peer_with_their_ratio_and_spread(files: Path, render: Render) -> None:
    mine = {
        "latency-b1": {"output_tok_s": 230.0, "s": 1.1, "spread_s": [1.09, 1.1234]},
        "prefill-8k": {"output_tok_s": 5.0, "s": 0.2, "spread_s": [0.2, 0.2]},
    }
    path = write(files, "2026-01-02_x_llama-8b", RUN | mine | {"section": "llama-8b", "kind": "offline"})
    text = render(path)
    assert row(text, "llama-8b latency-b1") == [
        *("llama-8b latency-b1, tok/s", "200", "**230**", "1.15", "285", "1.09 .. 1.123"),
    ]
    assert row(text, "llama-8b prefill-8k")[1:4] == ["0.4", "**0.2**", "2.00"], "half the time is twice as fast"
    assert row(text, "llama-8b decode-64")[1:4] == ["-", "-", "-"]
    assert "fast 1.0" in text
    assert "slow 2.0" not in text
    assert "NVIDIA H200, 2026-01-02, 0123456" in text


def test_the_newest_file_of_a_section_counts_and_changed_sources_are_told(files: Path, render: Render) -> None:
    def run(date: str, value: float, **more: Any) -> Path:
        content = RUN | {"section": "llama-8b", "latency-b1": {"output_tok_s": value, "spread_s": [1, 2]}} | more
        return write(files, f"{date}_x_llama-8b", content)

    new, old = run("2026-01-03", 300.0, dirty=True), run("2026-01-02", 100.0)
    second = write(
        files, "2026-01-03_x_llama-8b_2", json.loads(new.read_text()) | {"latency-b1": {"output_tok_s": 301.0}}
    )
    assert row(render(new, old), "llama-8b latency-b1")[2] == "**300**"
    assert row(render(second, new, old), "llama-8b latency-b1")[2] == "**301**"
    assert "0123456 and changes" in render(new, old)


def test_http_kernels_session_and_start_have_tables_of_their_own(files: Path, render: Render) -> None:
    http = {"section": "http_x", "kind": "http", "row": "128/256 one at a time", "output_tok_s": 220.0, "failed": 2}
    http |= {"ttft_ms": {"p50": 10.0}, "itl_ms": {"p99": 9.0}}
    kernels = {
        "section": "kernels",
        "kind": "kernels",
        "ceilings": {"copy_gb_s": 1},
        "linear llama-8b qkv x1": {"us": 14.0, "gb_s": 3500.0, "of_ceiling": 0.82, "peers": {"cublas": {"us": 16.0}}},
        "paged_attention decode 64 x 8192": {"us": 510.0, "gb_s": 4210.0, "of_ceiling": 0.98},
        "moe 1 tokens, odd": {"us": 1.0, "gb_s": 1.0, "of_ceiling": 0.1, "peers": {"t": {"error": "no"}}},
        "silu_mul 1x1": {"error": "broken"},
    }
    session = {"section": "session", "decode-64": {"output_tok_s": 1000.0}}
    session["decode-64 through session"] = {"output_tok_s": 980.0, "of_engine": 0.98}
    start = {"section": "start_cold", "startup_s": 12.5}
    paths = [write(files, f"2026-01-02_x_{at}", one) for at, one in enumerate((http, kernels, session, start))]
    text = render(*paths)
    assert "| 128/256 one at a time | output tok/s | 200 | **220** | 1.10 |" in text
    assert "| 128/256 one at a time | first token p50, ms | 20 | **10** | 2.00 |" in text
    assert "| 128/256 one at a time | requests that failed | - | 2 | - |" in text
    assert "between tokens" not in text, "the peer has no such figure in this row"
    assert row(text, "linear llama-8b qkv x1")[1:] == ["14", "3,500 GB/s, 82%", "16 (cublas)", "15.5 (cublas)"]
    assert row(text, "paged_attention decode 64 x 8192")[3:] == ["-", "500 (fa3)"]
    assert "odd" not in text
    assert "silu_mul" not in text
    assert row(text, "decode-64")[1:] == ["1,000", "980", "98.0%"]
    assert row(text, "no kernel compiled before")[1:] == ["100", "12.5"]


def test_some_tables_alone_in_the_order_asked_for(table: ModuleType, files: Path) -> None:
    start = write(files, "2026-01-02_x_start", {"section": "start_cold", "startup_s": 12.5})
    session = {"section": "session", "decode-64": {"output_tok_s": 1000.0}}
    session["decode-64 through session"] = {"output_tok_s": 980.0, "of_engine": 0.98}
    results = table.Results([start, write(files, "2026-01-02_x_session", session)])
    text = table.render(results, table.Peers(files, "x"), ("start", "session"))
    assert 0 <= text.index("start-up of a bare engine") < text.index("gRPC session")
    assert "bare engine (" not in text.replace("start-up of a bare engine", "")


def test_kernels_without_a_peer_are_shown_when_all_are_wanted(table: ModuleType, files: Path) -> None:
    case = {"us": 3.0, "gb_s": 100.0, "of_ceiling": 0.5}
    path = write(files, "2026-01-02_x_kernels", {"section": "kernels", "step_inputs 512 rows": case})
    results, peers = table.Results([path]), table.Peers(files / "peers", "x")
    assert "step_inputs" not in table.render(results, peers)
    assert row(table.render(results, peers, every=True), "step_inputs 512 rows")[1:] == ["3", "100 GB/s, 50%", "-", "-"]


def test_a_profile_is_shown_by_kernel_with_its_idle_time(table: ModuleType) -> None:
    kernels = [{"name": f"k{at}", "count": 2.0, "us": 50.0 - at, "share": 0.05} for at in range(12)]
    found = {"steps": 20, "first_step": 4, "step_us": 1000.0, "idle_share": 0.1, "kernels": kernels}
    lines = list(table.step_tables({"decode-64": found, "none": {"steps": 0}}))
    assert lines[0].startswith("| decode-64: a step of 1,000 us, mean of 20 |")
    assert row("\n".join(lines), "`k0`") == ["`k0`", "2", "50", "5.0%"]
    assert row("\n".join(lines), "2 others") == ["2 others", "", "79", "10.0%"]
    assert row("\n".join(lines), "idle") == ["idle", "", "100", "10.0%"]


def test_two_sections_are_compared_by_speed(files: Path, render: Render) -> None:
    fast = {"section": "llama-8b", "decode-64": {"output_tok_s": 1000.0}, "prefill-8k": {"s": 0.2}}
    slow = {"section": "llama-8b_generic", "decode-64": {"output_tok_s": 500.0}, "prefill-8k": {"s": 0.5}}
    exact = {"section": "deterministic", "decode-64": {"output_tok_s": 800.0}}
    paths = [write(files, f"2026-01-02_x_{at}", one) for at, one in enumerate((fast, slow, exact))]
    text = render(*paths)
    assert "| decode-64, tok/s | 500 | 1,000 | 0.50 |" in text
    assert "| prefill-8k, s | 0.5 | 0.2 | 0.40 |" in text
    assert "| decode-64, tok/s | 800 | 1,000 | 0.80 |" in text


def test_what_failed_is_said(files: Path, render: Render) -> None:
    path = write(files, "2026-01-02_x_tests", {"section": "tests", "why_failed": "not over after 240 s"})
    assert "- tests: not over after 240 s" in render(path)


def test_files_that_the_script_did_not_write_are_left_alone(files: Path, render: Render) -> None:
    other = [write(files, "2026-01-02_x_other", {"a": 1}), write(files, "2026-01-02_x_list", [1])]
    assert render(*other) == render()


def test_a_tables_place_in_a_page_is_filled_again_and_again(table: ModuleType) -> None:
    page = "before\n<!-- figures: x -->\nold\n<!-- end of figures -->\nafter\n"
    once = table.replace_between(page, "x", "| new |\n")
    assert once == "before\n<!-- figures: x -->\n| new |\n<!-- end of figures -->\nafter\n"
    assert table.replace_between(once, "x", "| new |\n") == once
    with pytest.raises(ValueError, match="figures: y"):
        table.replace_between(page, "y", "")


def test_every_kernel_that_was_measured_of_a_peer_is_found_by_one_of_our_cases(table: ModuleType) -> None:
    """Or a renamed case would silently lose its neighbour."""
    import torch

    from diptych.kernels.ops.cases import benches

    known = {table.peer_kernel(f"{op} {case.name}") for op in OPS for case in benches()[op].cases(torch.device("meta"))}
    peers = json.loads((ROOT / "bench" / "peers" / "h200_kernels.json").read_text())
    # transformers' forms run beside ours; FlashAttention's batch of 4 rows is no case of ours.
    wanted = {name for name in peers if name != "about" and not name.startswith("transformers")}
    assert {name for name in wanted - known if not name.startswith("cublas 4x")} == set()


OPS = ("paged_attention", "linear", "moe", "add_norm", "silu_mul")
