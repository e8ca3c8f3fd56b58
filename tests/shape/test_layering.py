"""A floor imports only what stands in its row of the architecture's table; torch and ray stay where they belong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from sources import ALL_FOLDERS, FLOORS, ROOT, imported_modules, python_files

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "protos": (),
    "kernels": ("protos",),
    "kvtransfer": ("protos", "kernels"),
    "prefill": ("protos", "kvtransfer"),
    "decode": ("protos", "kvtransfer"),
    "cluster": ("protos", "kvtransfer"),
    "agents": ("protos",),
}
# What has neither ray nor torch and talks to others' servers: one client, one table of keys and prices for all floors.
AGENTS_TOO = ("diptych.cluster.providers", "diptych.cluster.gateway", "diptych.cluster.client")
ENGINE = "cluster/engine/"  # the one place where the floors are put together
TORCH_IN = ("kernels/", "kvtransfer/arena.py", "kvtransfer/ring.py", "kvtransfer/transports/", ENGINE)
TORCH_MODULES = ("diptych.kvtransfer.arena", "diptych.kvtransfer.ring", "diptych.kvtransfer.transports")
RAY_IN = ("cluster/engine/actor.py", "cluster/control/", "cluster/entry.py", "cluster/cli.py", "agents/runtime/")
PROTOS_THIRD_PARTY = {"pydantic", "google", "grpc"}


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "diptych" and len(parts) > 1 else None


@pytest.mark.parametrize("path", python_files(*FLOORS), ids=str)
def test_a_floor_imports_only_the_floors_of_its_row(path: Path) -> None:
    own = path.parts[0]
    allowed = {own, *MAY_IMPORT[own], *(FLOORS[:5] if str(path).startswith(ENGINE) else ())}
    shared = AGENTS_TOO if own == "agents" else ()
    if str(path) in ("cluster/cli.py", "cluster/batch_verbs.py") or path.parts[:2] == ("cluster", "package"):
        shared = ("diptych.agents",)  # `diptych run` and `batch`; `diptych.llm`, published from here
    wrong = [
        f"{path}:{line} imports {m}"
        for line, m in imported_modules(path)
        if floor_of(m) not in {None, *allowed} and not m.startswith(shared)
    ]
    assert not wrong, f"{own}/ may import {sorted(allowed)}: {wrong}"


@pytest.mark.parametrize("path", python_files(*FLOORS), ids=str)
def test_torch_and_ray_are_imported_only_where_they_belong(path: Path) -> None:
    name = str(path)
    for line, module in imported_modules(path):
        top = module.split(".")[0]
        if top in {"torch", "triton", "transformers"}:
            assert name.startswith(TORCH_IN), f"{name}:{line}: {top} belongs in {TORCH_IN}"
        if top == "ray":
            assert name.startswith(RAY_IN), f"{name}:{line}: ray belongs in {RAY_IN}"
        if path.parts[0] == "cluster" and not name.startswith(ENGINE):
            assert not module.startswith(TORCH_MODULES), f"{name}:{line}: {module} brings in torch"
        if path.parts[0] == "protos" and top not in {"diptych", *PROTOS_THIRD_PARTY}:
            assert top in sys.stdlib_module_names, (
                f"{name}:{line}: protos/ uses the standard library, pydantic, protobuf"
            )


@pytest.mark.parametrize("path", python_files(*ALL_FOLDERS), ids=str)
def test_no_bare_import_of_a_top_level_folder(path: Path) -> None:
    """`import cluster` would load a second copy of the module when the root is on sys.path."""
    bare = [f"{path}:{line} imports {m}" for line, m in imported_modules(path) if m.split(".")[0] in FLOORS]
    assert not bare, f"write diptych.<folder>: {bare}"


@pytest.mark.parametrize("folder", FLOORS)
def test_no_init_lies_directly_in_a_top_level_folder(folder: str) -> None:
    """A regular package named kernels or agents at the root would shadow the ones that other libraries import."""
    assert not (ROOT / folder / "__init__.py").exists()
