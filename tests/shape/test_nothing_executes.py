"""What comes from outside is data: no source executes or unpickles it, and sockets are made where they are guarded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import FLOORS, parse, python_files

SOURCES = python_files(*FLOORS)
# Modules that turn bytes into code or into any object.
EXECUTING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("torch", "load"),
    ("torch", "save"),
    ("np", "load"),
    ("numpy", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("yaml", "load_all"),
}
# Where sockets are made. All else goes through these.
GRPC_IN = {Path("protos/channels.py")}
LISTENERS_IN = {
    Path("cluster/api/address.py"),  # HTTP
    Path("cluster/api/listener.py"),
    Path("cluster/control/holder.py"),  # hands out the socket of HTTP
    Path("kvtransfer/transports/shm.py"),  # hands out the ring
}
PROBES_IN = {
    Path("cluster/control/host.py"),  # looks for free ports and closes them
    Path("cluster/doctor_cluster.py"),  # the same for unix sockets
}


def calls(path: Path) -> Iterator[tuple[int, str, str, ast.Call]]:
    """(line, what the function is called on, its name, the call)."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.lineno, "", node.func.id, node
            elif isinstance(node.func, ast.Attribute):
                yield node.lineno, ast.unparse(node.func.value), node.func.attr, node


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_can_execute_what_it_reads(path: Path) -> None:
    for node in ast.walk(parse(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not EXECUTING & {name.split(".")[0] for name in names}, f"{path}:{getattr(node, 'lineno', 0)}: {names}"
    for line, owner, name, call in calls(path):
        assert owner or name not in CALLS, f"{path}:{line}: {name}"
        assert (owner, name) not in ATTRIBUTES, f"{path}:{line}: {owner}.{name}"
        for keyword in call.keywords:
            said = (keyword.arg, ast.unparse(keyword.value))
            assert said not in {("shell", "True"), ("allow_pickle", "True"), ("trust_remote_code", "True")}, (
                path,
                line,
            )
        if (owner, name) == ("yaml", "load"):
            assert ast.unparse(call.args[1]).endswith("Loader"), f"{path}:{line}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "testing.py"], ids=str)
def test_channels_servers_and_sockets_are_made_where_they_are_guarded(path: Path) -> None:
    for line, owner, name, _ in calls(path):
        where = f"{path}:{line}: {owner}.{name}"
        if owner in {"grpc", "grpc.aio"} and (name.endswith("_channel") or name == "server"):
            assert path in GRPC_IN, where
        if name in {"add_insecure_port", "add_secure_port"}:
            assert path in GRPC_IN, where
        if name in {"bind", "listen", "start_server", "create_server", "start_unix_server", "create_unix_server"}:
            is_other = name == "listen" and owner == ""  # of protos/channels.py
            is_other |= name == "bind" and owner not in {"sock", "probe", "self._listener", "probes"}  # of Ray Serve
            assert is_other or path in LISTENERS_IN | PROBES_IN, where


def test_yaml_is_read_by_safe_loaders_only() -> None:
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Loader") and node.bases:
                assert [ast.unparse(base) for base in node.bases] in (["yaml.SafeLoader"], ["Protocol"]), (
                    path,
                    node.name,
                )
