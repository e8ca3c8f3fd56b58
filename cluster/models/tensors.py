"""The safetensors file format, read with distrust and written as a stream. Knows nothing of models.

| 8 bytes: length n, little-endian | n bytes: JSON header | data: tensors back to back, no gap, no overlap |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.protos.errors import StartupError

MAX_HEADER_BYTES = 100 * 1024 * 1024  # what the safetensors library allows too
_LENGTH_BYTES = 8
_MAX_SHAPE_AXES = 16

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors header; `begin` and `end` are byte offsets from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Of the tensor; 1 for a scalar."""
        return math.prod(self.shape)


class _Bad(Exception):
    """What is wrong with the header; the caller adds the file's name."""


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name. Raises StartupError unless header and file size agree to the byte."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = _header_length(start, size_bytes)
            raw = file.read(length)
    except OSError as exc:
        raise StartupError(
            f"{path} cannot be read ({exc.strerror}). Check that it exists and its permissions."
        ) from exc
    except _Bad as exc:
        raise StartupError(f"{path} {exc}") from None
    try:
        return _parse_header(raw, size_bytes - _LENGTH_BYTES - length)
    except _Bad as exc:
        raise StartupError(f"{path} {exc}") from None


def _header_length(start: bytes, size_bytes: int) -> int:
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _Bad(
            "is a pickle archive under the name of a safetensors file. Unpickling runs code from the file, so it is "
            "not read: get the safetensors version of this model."
        )
    if start.startswith(b"version "):
        raise _Bad("is a git-lfs pointer, not the file itself. Run `git lfs pull` in its folder.")
    if len(start) < _LENGTH_BYTES:
        raise _Bad(f"is truncated: it has {size_bytes} bytes. Copy or download it again.")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise _Bad(f"is not a safetensors file: its header would be {length} bytes (limit {MAX_HEADER_BYTES}).")
    if _LENGTH_BYTES + length > size_bytes:
        raise _Bad(
            f"is truncated: its header needs {length} bytes, the file has {size_bytes}. Copy or download it again."
        )
    return length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Bad("names a tensor or field twice in its header. Get the file again from a trusted place.")
    return found


def _parse_header(raw: bytes, data_bytes: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _Bad("has a header that is not JSON: the file is damaged. Copy or download it again.") from None
    if not isinstance(header, dict):
        raise _Bad("has a header that is not a JSON object: the file is damaged. Copy or download it again.")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value) for name, value in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            trouble = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise _Bad(
                f"is damaged: tensor {name} {trouble} (offset {entry.begin}, expected {at}). Get the file again."
            )
        at = entry.end
    if at > data_bytes:
        raise _Bad(
            f"is truncated: its tensors need {at} bytes of data, the file has {data_bytes}. Copy or download it again."
        )
    if at < data_bytes:
        raise _Bad(f"is damaged: {data_bytes - at} bytes follow its last tensor. Copy or download it again.")
    return entries


def _entry(name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _Bad(f"is damaged: tensor {name} lacks dtype, shape or data_offsets. Get the file again.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Bad(f"holds tensor {name} of the unknown dtype {dtype!r}; known are {', '.join(sorted(_BITS))}.")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > _MAX_SHAPE_AXES:
        raise _Bad(f"is damaged: tensor {name} has a nonsense shape or offset. Get the file again.")
    entry = TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])
    wanted = entry.num_elements * _BITS[dtype] // 8
    if entry.end - entry.begin != wanted:
        raise _Bad(
            f"is damaged: tensor {name} ({dtype}, {shape}) needs {wanted} bytes and is given {entry.end - entry.begin}."
        )
    return entry


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def write_bf16(path: Path, shapes: Mapping[str, Sequence[int]], pieces: Iterable[memoryview]) -> None:
    """Write one file of bfloat16 tensors in the order of `shapes`; `pieces` joined are their data, little-endian.

    Holds one piece in memory at a time. The file is on the disk when this returns.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
        written = sum(file.write(piece) for piece in pieces)
        assert written == at, f"{written} bytes for tensors of {at}"
