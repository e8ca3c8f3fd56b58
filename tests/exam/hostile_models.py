"""Writes hostile models into a folder: `NAME: (how to write it, what the refusal must say)`, each of 64 KiB at most.

As a program: `hostile_models.py FOLDER` takes each in turn as `diptych serve` does before it starts anything, and
prints a JSON line: name, the refusal, seconds of CPU with those of children, bytes of memory that it took.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}
SHAPES = {
    "model.embed_tokens.weight": [10, 8],
    "model.layers.0.mlp.up_proj.weight": [4, 8],
    "model.norm.weight": [8],
}
TOUCH = "import pathlib; pathlib.Path({!r}).touch()"


class Bomb:
    """Whoever unpickles it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self._command = f"touch {canary}"

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self._command,)


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def good_weights() -> bytes:
    header, at = {}, 0
    for name, shape in SHAPES.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return safetensors(header, bytes(at))


def folder(
    where: Path, *, config: dict[str, object] | None = None, files: dict[str, bytes | None] | None = None
) -> Path:
    """A model that would be served, with these differences; None leaves a file out. Code lies beside it."""
    where.mkdir()
    code = TOUCH.format(str(where.parent / CANARY)).encode()
    whole: dict[str, bytes | None] = {
        "config.json": json.dumps(CONFIG | (config or {})).encode(),
        "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}).encode(),
        "model.safetensors": good_weights(),
        "m.py": code,
        "modeling_llama.py": code,
        "__init__.py": code,
        "json.py": code,
        "jinja2.py": code,
    }
    for name, data in (whole | (files or {})).items():
        if data is not None:
            (where / name).write_bytes(data)
    return where


def gguf(where: Path, *, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> Path:
    path = where.with_suffix(".gguf")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest)
    return path


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def json_of(**keys: object) -> dict[str, bytes | None]:
    return {"tokenizer_config.json": json.dumps(keys).encode()}


def template(source: str) -> Callable[[Path], Path]:
    return lambda where: folder(where, files={"chat_template.jinja": source.encode()})


def pickled(where: Path) -> Path:
    return folder(
        where, files={"model.safetensors": None, "pytorch_model.bin": pickle.dumps(Bomb(where.parent / CANARY))}
    )


def as_safetensors(where: Path) -> Path:
    return folder(where, files={"model.safetensors": pickle.dumps(Bomb(where.parent / CANARY))})


def archive(where: Path) -> Path:
    made = folder(where)
    with zipfile.ZipFile(made / "model.safetensors", "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(Bomb(where.parent / CANARY)))
    return made


def weights(data: bytes) -> Callable[[Path], Path]:
    return lambda where: folder(where, files={"model.safetensors": data})


def sibling(where: Path) -> Path:
    """An index that leads to weights of another model beside it."""
    other = folder(where.with_name(where.name + "-other"))
    index = {"weight_map": dict.fromkeys(SHAPES, f"../{other.name}/model.safetensors")}
    return folder(where, files={"model.safetensors.index.json": json.dumps(index).encode()})


HUGE = {"a": {"dtype": "F16", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 2]}}
OVERLAP = {name: {"dtype": "F16", "shape": [2], "data_offsets": [at, at + 4]} for name, at in (("a", 0), ("b", 2))}
WALK = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
HIDDEN = "{% if messages|length > 99 %}{{ cycler.__init__.__globals__.os.system('true') }}{% endif %}"
BY_FILTER = "{{ messages[0]|attr('__class__') }}"
BY_ITEM = "{{ ''['__class__'] }}"
REPEATED = "{{ 'a' * 400000000 }}"
DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WORDY = "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"

CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "auto_map": (lambda p: folder(p, config={"auto_map": {"AutoModelForCausalLM": "m.Model"}}), "never run"),
    "auto_map of a sibling": (lambda p: folder(p, config={"auto_map": {"AutoConfig": "o/r--m.C"}}), "never run"),
    "auto_map inside": (lambda p: folder(p, config={"text_config": {"auto_map": {"AutoModel": "m.M"}}}), "never run"),
    "auto_map of the tokenizer": (lambda p: folder(p, files=json_of(auto_map={"AutoTokenizer": ["m.T"]})), "never run"),
    "trust in the config": (lambda p: folder(p, config={"trust_remote_code": True}), "never run"),
    "trust in the tokenizer": (lambda p: folder(p, files=json_of(trust_remote_code=True)), "never run"),
    "attention of a sibling": (lambda p: folder(p, config={"_attn_implementation": "o/kernels"}), "never run"),
    "weights of a sibling": (sibling, "same folder"),
    "pickled weights": (pickled, "pytorch_model.bin"),
    "a pickle called safetensors": (as_safetensors, "safetensors"),
    "an archive called safetensors": (archive, "pickle archive"),
    "a header of 2^63 bytes": (weights(struct.pack("<Q", 1 << 63) + b"{}"), "header"),
    "a header longer than the file": (weights(struct.pack("<Q", 90 << 20) + b"{}"), "truncated"),
    "a header 60,000 deep": (weights(safetensors(b"[" * 60_000)), "header"),
    "a tensor of 2^124 numbers": (weights(safetensors(HUGE, bytes(2))), "needs"),
    "tensors that overlap": (weights(safetensors(OVERLAP, bytes(6))), "damaged"),
    "GGUF with 2^60 keys": (lambda p: gguf(p, pairs=1 << 60), "gguf"),
    "GGUF with 2^60 tensors": (lambda p: gguf(p, tensors=1 << 60), "gguf"),
    "GGUF with a text of 2^62": (lambda p: gguf(p, pairs=1, rest=struct.pack("<Q", 1 << 62) + b"x"), "gguf"),
    "GGUF with an array of 2^40": (
        lambda p: gguf(p, pairs=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 40)),
        "gguf",
    ),
    "GGUF with arrays 4,000 deep": (
        lambda p: gguf(p, pairs=1, rest=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 4_000),
        "gguf",
    ),
    "template that walks the classes": (template(WALK), "inner attribute of Python"),
    "template that walks them some day": (template(HIDDEN), "inner attribute of Python"),
    "template that walks by a filter": (template(BY_FILTER), "inner attribute of Python"),
    "template that walks by an item": (template(BY_ITEM), "inner attribute of Python"),
    "template of 22 bytes that makes 400 MB": (template(REPEATED), "no template may"),
    "template that doubles a text": (template(DOUBLED), "template takes more than"),
    "template without an end": (template(ENDLESS), "of computing"),
    "template that writes 10 GB": (template(WORDY), "too much text"),
    "template 20,000 deep": (template("{{" + "(" * 20_000), "template"),
    "template that is broken": (template("{% for %}"), "template is broken"),
}  # fmt: skip


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("no VmHWM")


def cpu_s() -> float:
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def main() -> None:
    """Every case of the folder, which is also the current one: its modules must not be taken for libraries."""
    from diptych.cluster.api.served import ServedModel
    from diptych.cluster.models import resolve
    from diptych.protos.errors import StartupError

    root = Path(sys.argv[1])
    for name, path in json.loads((root / "cases.json").read_text()).items():
        os.chdir(path if Path(path).is_dir() else root)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, cpu, began = peak_bytes(), cpu_s(), time.monotonic()
        why = ""
        try:
            ServedModel.load("m", resolve(path, root / "cache"))
        except StartupError as exc:
            why = str(exc)
        told = {"name": name, "why": why, "cpu_s": cpu_s() - cpu, "wall_s": time.monotonic() - began}
        print(json.dumps(told | {"bytes": peak_bytes() - before}), flush=True)


if __name__ == "__main__":
    main()
