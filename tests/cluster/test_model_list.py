from __future__ import annotations

import json
from pathlib import Path

from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.cluster.model_list import converted, render, served


def test_every_kind_of_model_is_listed(tmp_path: Path) -> None:
    done = tmp_path / "models" / "tiny-1234"
    done.mkdir(parents=True)
    (done / "source.json").write_text(json.dumps({"file": "tiny.gguf"}))
    (done / "model.safetensors").write_bytes(bytes(3_000_000))
    half = tmp_path / "models" / ".tiny-5678.tmp-x"
    half.mkdir()
    (half / "source.json").write_text(json.dumps({"file": "half.gguf"}))
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "source.json").write_text("{")
    [(name, size, origin)] = converted(tmp_path)
    assert (name, origin) == ("tiny-1234", "tiny.gguf")
    assert size > 3_000_000
    config = load_config(None, [f"cache_dir={tmp_path}", "models.mine.source=/m", "models.mine.layout=colocated"])
    text = render(config, ("http://u", ["mine"]))
    for words in (DEFAULT_MODEL, "mine: /m, colocated: 1 decode", "tiny-1234: 3 MB", "served now, at http://u\n  mine"):
        assert words in text


def test_without_a_cluster_nothing_is_served(tmp_path: Path) -> None:
    assert served(tmp_path, None) == ("", [])
    assert served(tmp_path, "http://127.0.0.1:1") == ("http://127.0.0.1:1", [])
