"""What people install holds what they import: built as a wheel, opened, compared with the sources."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sources import FLOORS, ROOT


@pytest.mark.slow
def test_the_wheel_holds_every_source_below_the_namespace_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)],
        check=True,
        timeout=600,
    )
    (wheel,) = tmp_path.glob("diptych-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", *FLOORS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [
        name
        for name in tracked.splitlines()
        if name.endswith((".py", ".pyi", ".proto", "py.typed", ".c", ".inc", ".yaml"))
    ]
    wanted = {f"diptych/{name}".replace("/cluster/package/", "/") for name in names}
    assert packed == wanted
