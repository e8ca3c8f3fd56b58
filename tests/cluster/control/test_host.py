from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diptych.cluster.control import host
from diptych.cluster.control.launch import end_tree, spawn
from diptych.cluster.control.state import ClusterState, find_cluster, make_folder, write_state
from diptych.cluster.control.timeline import Timeline
from diptych.protos.errors import StartupError
from diptych.protos.testing import FakeClock

MIB = 1 << 20


def test_a_cgroup_limit_bounds_the_memory_and_reclaimable_cache_counts_as_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{90 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {30 * MIB}\n")
    free, bound = host.available_memory(tmp_path)
    assert free == 40 * MIB
    assert "cgroup" in bound


def test_without_a_limit_the_machines_free_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    free, bound = host.available_memory(tmp_path)
    assert free > 0
    assert "machine" in bound


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd bf16", True),
        ("model name\t: bf16 maker", False),
    ],
)
def test_bfloat16_is_native_only_where_the_cpu_says_so(tmp_path: Path, line: str, expected: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert host.has_native_bfloat16(cpuinfo) is expected
    assert not host.has_native_bfloat16(tmp_path / "absent")


def test_a_taken_port_is_not_free_and_free_ports_differ() -> None:
    ports = host.free_ports(3)
    assert len(set(ports)) == 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert not host.is_port_free("127.0.0.1", ports[0])
        assert host.is_reachable(f"127.0.0.1:{ports[0]}")
    assert host.is_port_free("127.0.0.1", ports[1])
    assert not host.is_reachable(f"127.0.0.1:{ports[1]}")


def state_of(folder: Path, pid: int, url: str = "http://u") -> ClusterState:
    return ClusterState(
        pid=pid,
        url=url,
        serve_url="s",
        ray_address="r",
        ray_client_address="ray://r",
        token_path="t",
        folder=str(folder),
        models=("m",),
    )


def test_a_running_cluster_is_found_and_a_dead_one_is_not(tmp_path: Path) -> None:
    assert find_cluster(tmp_path) is None
    run_dir = tmp_path / "run"
    folder = make_folder(run_dir)
    assert folder.stat().st_mode & 0o077 == 0
    assert find_cluster(run_dir) is None
    state = state_of(folder, os.getpid())
    write_state(state)
    assert find_cluster(run_dir) == state
    assert find_cluster(run_dir, "http://u") == state
    assert find_cluster(run_dir, "http://other") is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_state(state_of(folder, ended.pid))
    assert find_cluster(run_dir) is None


def test_a_killed_process_that_nobody_waited_for_serves_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None
        ended.stdout.read()
        deadline = time.monotonic() + 30
        while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
        write_state(state_of(folder, ended.pid))
        assert find_cluster(tmp_path / "run") is None


def test_folders_of_dead_processes_are_swept_and_others_kept(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    make_folder(run_dir)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (str(ended.pid), str(os.getppid()), "notes"):
        (run_dir / name).mkdir()
    make_folder(run_dir)
    assert {path.name for path in run_dir.iterdir()} == {str(os.getpid()), str(os.getppid()), "notes"}


def test_a_run_dir_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    """It holds the token and the engines' sockets; in /tmp somebody else could have made it first."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o755)
    with pytest.raises(StartupError, match="mode 700"):
        make_folder(run_dir)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(StartupError, match="mode 700"):
        make_folder(link)


def test_the_timeline_accounts_for_every_second() -> None:
    clock = FakeClock(110.0)
    said: list[str] = []
    timeline = Timeline(100.0, said.append, clock)
    timeline.add("command", 4.0)
    with timeline.stage("ray") as notes:
        clock.advance(5)
        notes.append("a note")
    clock.advance(1)
    table = timeline.table()
    seconds = [float(line.split()[-2 if "#" not in line else -3]) for line in table.splitlines() if " s" in line]
    assert sum(seconds[:-1]) == seconds[-1] == 16.0
    assert "a note" in table


CHILD_WITH_A_CHILD = """
import subprocess, sys, time
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print(child.pid, flush=True)
time.sleep(600)
"""


def grandchild_of(log: Path) -> psutil.Process:
    while not (text := log.read_text()).endswith("\n"):
        pass
    return psutil.Process(int(text))


def test_ending_a_tree_leaves_no_descendant_however_stubborn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = spawn([sys.executable, "-c", CHILD_WITH_A_CHILD], log, {})
    grandchild = grandchild_of(log)
    end_tree(process, grace_s=0.2)
    assert process.poll() is not None
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """A killed `diptych serve` cannot end Ray any more; the kernel must."""
    code = f"""
import sys, time
from pathlib import Path
from diptych.cluster.control.launch import spawn
command = [sys.executable, "-c", "import time; time.sleep(600)"]
print(spawn(command, Path({str(tmp_path / "log")!r}), {{}}).pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
