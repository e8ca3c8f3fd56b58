"""The safetensors format: what we accept the safetensors library accepts, and what we write it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from diptych.cluster.models.tensors import MAX_HEADER_BYTES, read_header, write_bf16
from diptych.protos.errors import StartupError


def write_raw(path: Path, header: object, data_bytes: int) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data_bytes))


def tensor(begin: int, end: int, *, dtype: str = "F32", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


BAD: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 0, "not JSON"),
    "not an object": ([], 0, "not a JSON object"),
    "named twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', 0, "twice"),
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "overlaps"),
    "gap": ({"a": tensor(0, 8), "b": tensor(12, 16)}, 16, "gap"),
    "outside": ({"a": tensor(0, 8)}, 4, "truncated"),
    "trailing": ({"a": tensor(0, 8)}, 9, "follow its last tensor"),
    "backwards": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, 8, "damaged"),
    "negative": ({"a": tensor(-4, 0)}, 8, "nonsense"),
    "bool shape": ({"a": tensor(0, 4, shape=[True])}, 4, "nonsense"),
    "huge shape": ({"a": tensor(0, 4, shape=[2**62, 2**62])}, 4, "needs"),
    "many axes": ({"a": tensor(0, 4, shape=[1] * 1000)}, 4, "nonsense"),
    "dtype unknown": ({"a": tensor(0, 4, dtype="Q4")}, 4, "unknown dtype 'Q4'"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, 0, "lacks"),
    "wrong size": ({"a": tensor(0, 8, shape=[3])}, 8, "needs 12 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    header, data_bytes, reason = BAD[case]
    write_raw(tmp_path / "m.safetensors", header, data_bytes)
    with pytest.raises(StartupError, match=reason):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("length", "reason"), [(MAX_HEADER_BYTES + 1, "limit"), (100, "truncated"), (2**63, "limit")])
def test_a_header_length_is_never_believed(tmp_path: Path, length: int, reason: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(StartupError, match=reason):
        read_header(path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_accepted_the_library_reads_alike(tmp_path: Path, data: st.DataObject) -> None:
    """A difference between two parsers of one format is where attacks live."""
    path = tmp_path / "m.safetensors"
    write_raw(path, {"a": tensor(0, 8), "b": tensor(8, 20), "__metadata__": {"format": "pt"}}, 20)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b'0123456789{}[]",:a\x00\xff'))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1]))])
    try:
        found = read_header(path)
    except StartupError:
        return
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as exc:
        assert "metadata" in str(exc).lower()  # noqa: PT017  __metadata__ is dropped here and typed there
        return
    assert shapes == {name: entry.shape for name, entry in found.items()}


def test_a_written_file_is_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    values = {"w": np.arange(6, dtype="<u2").reshape(2, 3), "v": np.array([7], "<u2")}
    write_bf16(
        path, {name: value.shape for name, value in values.items()}, (memoryview(v.tobytes()) for v in values.values())
    )
    assert {name: entry.shape for name, entry in read_header(path).items()} == {"w": (2, 3), "v": (1,)}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        import torch

        assert file.get_tensor("w").view(torch.uint16).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.get_tensor("v").view(torch.uint16).tolist() == [7]
