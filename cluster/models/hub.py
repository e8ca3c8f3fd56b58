"""A name such as org/model on the Hugging Face hub -> the folder of its snapshot in the hub's own cache.

Fetched are safetensors, JSON files and chat templates at the top of the repository; never pickles, never code.
huggingface_hub decides where the cache is and who may read a repository (HF_HOME, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diptych.protos.errors import StartupError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_KINDS = (".safetensors", ".json", ".jinja")
_FOREIGN = "consolidated"  # Mistral's own format lies beside the usual one and doubles the download
_ALTERNATIVES = (
    "Without a hub, serve what lies here: the built-in smollm2-135m-instruct, a folder with config.json, *.safetensors "
    "and tokenizer.json, a .gguf file of the llama architecture, or a model that Hugging Face's cache holds already."
)


class _Listing(NamedTuple):
    commit: str
    files: list[str]
    size_bytes: int


def snapshot(name: str, progress: Callable[[str], None]) -> Path:
    """The folder of the newest snapshot of `name`: downloaded, or the cached one where no hub can be reached.

    Raises StartupError that says what to do instead.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(hub, name, "HF_HUB_OFFLINE is set")
    try:
        listing = _list(hub, name)
    except _refusals() as exc:
        raise StartupError(_refused(name, exc)) from exc
    except Exception as exc:  # whatever its HTTP library raises when there is no network
        if not _is_network(exc):
            raise
        return _cached(hub, name, f"no hub can be reached ({_words(exc)})")
    if not any(file.endswith(".safetensors") for file in listing.files):
        raise StartupError(
            f"{name} holds no *.safetensors on the hub. Weights in other formats are not read: pickles run code when "
            "they are loaded. Choose a repository with safetensors."
        )
    progress(f"fetching {name} from the hub: {listing.size_bytes / 1e6:,.0f} MB, less what the cache holds")
    try:
        folder = hub.snapshot_download(
            name, revision=listing.commit, allow_patterns=[_literal(f) for f in listing.files]
        )
    except Exception as exc:
        if not isinstance(exc, OSError) and not _is_network(exc):
            raise
        raise StartupError(
            f"{name} could not be fetched from the hub: {_words(exc)}. What came is kept: start again to go on. "
            f"{_ALTERNATIVES}"
        ) from exc
    return Path(folder)


def _list(hub: Any, name: str) -> _Listing:
    info = hub.HfApi().model_info(name, files_metadata=True)
    wanted = [entry for entry in info.siblings or () if _is_wanted(entry.rfilename)]
    return _Listing(info.sha, [entry.rfilename for entry in wanted], sum(entry.size or 0 for entry in wanted))


def _is_wanted(file: str) -> bool:
    return "/" not in file and file.endswith(_KINDS) and not file.startswith(_FOREIGN)


def _literal(file: str) -> str:
    """As a pattern that matches this file alone."""
    return re.sub(r"([*?[])", r"[\1]", file)


def _cached(hub: Any, name: str, why: str) -> Path:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=[f"*{kind}" for kind in _KINDS]))
    except HFValidationError as exc:
        raise StartupError(_refused(name, exc)) from exc
    except LocalEntryNotFoundError as exc:
        raise StartupError(
            f"{name} looks like a name on a model hub; {why}, and Hugging Face's cache does not hold it. "
            f"{_ALTERNATIVES}"
        ) from exc


def _refusals() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    return HFValidationError, RepositoryNotFoundError


def _refused(name: str, exc: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(exc, GatedRepoError):
        return f"{name} is gated: accept its terms on the hub, then `hf auth login` or set HF_TOKEN. {_ALTERNATIVES}"
    if isinstance(exc, RepositoryNotFoundError):
        return (
            f"There is no {name} on the hub, or it is private: check its spelling, or `hf auth login` for a private "
            f"one. {_ALTERNATIVES}"
        )
    return f"{name} is no name that the hub could have: {_words(exc)}. {_ALTERNATIVES}"


def _is_network(exc: Exception) -> bool:
    """A failure of the way to the hub, not of ours: the library's own errors, and those of its HTTP client."""
    modules: Sequence[str] = [cls.__module__.split(".")[0] for cls in type(exc).__mro__]
    return isinstance(exc, OSError) or bool({"httpx", "httpx2", "huggingface_hub"} & set(modules))


def _words(exc: Exception) -> str:
    return " ".join((str(exc) or type(exc).__name__).split())[:200]
