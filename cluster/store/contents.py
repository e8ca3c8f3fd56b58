"""Contents of files: a folder of files with random names, which the rows in files.py and batches.py point to.

    draft (NAME.part) --- write ... --- finish: fsync, rename, fsync of the folder ---> NAME, then the row
Called by cluster/api and cluster/batches through `at_disk`. What no row points to is swept. Knows no client's name.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, ParamSpec, TypeVar

from diptych.protos.errors import CapacityError

_NAME: Final = re.compile(r"[0-9a-f]{32}")
_PART: Final = ".part"
DISK_THREADS: Final = 8
_THREADS: Final = ThreadPoolExecutor(DISK_THREADS, "contents")
CHECK_BYTES: Final = 16 << 20  # how much is written between two looks at the free room


P = ParamSpec("P")
T = TypeVar("T")


async def at_disk(work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """`work`, which may wait for a disk, in a thread for such: bodies are read in others, which a slow disk that many
    uploads wait for would else take up.
    """
    return await asyncio.get_running_loop().run_in_executor(_THREADS, partial(work, *given, **named))


class StorageFull(CapacityError):
    """The disk has no room for the contents of a file; nothing of it was kept."""

    code = "storage_full"
    http_status = 507


class ContentsLost(Exception):
    """A row's contents are not there, or are not what was written."""


@dataclass(frozen=True, slots=True)
class Content:
    """What was written: its name in the folder, its size, its hash."""

    name: str
    num_bytes: int
    sha256: str


class Contents:
    """The folder. Every method may block."""

    def __init__(self, folder: Path, *, keep_free_bytes: int = 0) -> None:
        self.folder = folder
        self._keep_free_bytes = keep_free_bytes

    def draft(self) -> Draft:
        """Begin to write. Raises StorageFull."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.check_room()
        with _told_when_full():
            return Draft(self, os.urandom(16).hex())

    def check_room(self) -> None:
        """Raises StorageFull where less is free than others need."""
        state = os.statvfs(self.folder)
        if state.f_bavail * state.f_frsize < self._keep_free_bytes:
            raise StorageFull("the server's disk is full: the file was not kept; try again later", 60.0)

    def open(self, name: str) -> BinaryIO:
        """To read. Raises ContentsLost."""
        try:
            handle = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise ContentsLost(f"the contents {name} cannot be read: {exc.strerror}") from exc
        return os.fdopen(handle, "rb")

    def remove(self, name: str) -> None:
        """Who has it open reads on. Once more is no mistake."""
        self._path(name).unlink(missing_ok=True)

    def older_than(self, seconds: float) -> Iterator[str]:
        """Names that were written so long ago; drafts of that age, which nobody finishes any more, are removed."""
        before = time.time() - seconds
        if not self.folder.is_dir():
            return
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    if entry.stat(follow_symlinks=False).st_mtime > before:
                        continue
                except FileNotFoundError:
                    continue
                if _NAME.fullmatch(entry.name):
                    yield entry.name
                elif _NAME.fullmatch(entry.name.removesuffix(_PART)):
                    (self.folder / entry.name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), name
        return self.folder / name


class Draft:
    """Contents on their way; ended by `finish` or `abandon`."""

    def __init__(self, contents: Contents, name: str) -> None:
        self.num_bytes = 0
        self._contents = contents
        self._name = name
        self._path = contents.folder / (name + _PART)
        self._hash = hashlib.sha256()
        self._unchecked = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file: BinaryIO | None = os.fdopen(os.open(self._path, flags, 0o600), "wb", buffering=1 << 20)

    def write(self, data: bytes) -> None:
        """Raises StorageFull."""
        assert self._file is not None
        with _told_when_full():
            self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)
        self._unchecked += len(data)
        if self._unchecked >= CHECK_BYTES:
            self._unchecked = 0
            self._contents.check_room()

    def finish(self) -> Content:
        """Now it survives the machine. Raises StorageFull."""
        assert self._file is not None
        with _told_when_full():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._path.rename(self._contents.folder / self._name)
            folder = os.open(self._contents.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return Content(self._name, self.num_bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        """Leave nothing behind. After `finish` it does nothing."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()  # writes what is buffered, which a full disk refuses
            except OSError:
                pass
            self._path.unlink(missing_ok=True)


class _told_when_full:
    """Turns the errors of a full disk into StorageFull."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("the server's disk is full: the file was not kept; try again later", 60.0) from exc
