"""`make docs`: write helm/values.schema.json and the table of values in helm/README.md. tests/helm compares them.

What stands below `diptych` comes from the classes behind `diptych.yaml`, so the chart knows every key that they know.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from diptych.cluster.config import MODEL_NAME, DiptychConfig
from diptych.protos.providers.quirks import Quirks

CHART = Path(__file__).resolve().parents[1] / "helm"
SCHEMA, README = CHART / "values.schema.json", CHART / "README.md"
BEGIN, END = "<!-- values: made by `make docs` -->", "<!-- end of values -->"

# What the chart decides by itself, because it follows from the pods, or what has no meaning in them.
CHARTS_OWN = {
    # All processes of a release share a pod, so their channels are unix sockets and the secret never leaves it.
    "": {"run_dir", "cache_dir", "data_dir", "telemetry", "security", "faults"},
    "engines": {"host"},
    "store": {"password_file"},
    "router": {"host", "port", "serve_port"},
    "ray": {"address", "start_timeout_s", "object_store_mib"},
}
DROPPED = {"title", "default", "format", "discriminator"}


def text(meaning: str, pattern: str = "", **more: Any) -> dict[str, Any]:
    """A string."""
    return {"type": "string", "description": meaning, **({"pattern": pattern} if pattern else {}), **more}


def group(meaning: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {"type": "object", "description": meaning, "properties": properties, "additionalProperties": False}


def texts(meaning: str) -> dict[str, Any]:
    """An object whose keys the user chooses."""
    return {"type": "object", "description": meaning, "additionalProperties": {"type": "string"}}


def whole(meaning: str, low: int, high: int) -> dict[str, Any]:
    """A whole number within bounds."""
    return {"type": "integer", "description": meaning, "minimum": low, "maximum": high}


def quantity(meaning: str) -> dict[str, Any]:
    """Memory."""
    return text(f"{meaning}, such as 512Mi or 6Gi", "^[1-9][0-9]{0,8}(Mi|Gi)$")


def placing(what: str) -> dict[str, dict[str, Any]]:
    """Where the pod may run."""
    toleration = group(
        "a toleration",
        key=text("taint"),
        operator={"enum": ["Exists", "Equal"], "description": "comparison"},
        value=text("of the taint"),
        effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"], "description": "of the taint"},
        tolerationSeconds=whole("before eviction", 0, 1 << 31),
    )
    return {
        "nodeSelector": texts(f"labels of the nodes for {what}"),
        "tolerations": {"type": "array", "description": f"taints that {what} tolerates", "items": toleration},
    }


def chart_schema() -> dict[str, Any]:
    """values.schema.json."""
    cpu = text("cores requested, such as 500m or 2; there is no limit", "^([1-9][0-9]{0,5}m|[1-9][0-9]{0,3})$")
    properties = {
        "global": {"type": "object", "description": "of a parent chart; not used here"},
        "image": group(
            "of head and worker: Diptych, Ray, bash and wget",
            repository=text("required; there is no published image"),
            tag=text("empty: the chart's appVersion", "^[A-Za-z0-9_.-]{0,128}$"),
            digest=text("wins over the tag", "^(sha256:[0-9a-f]{64})?$"),
            pullPolicy={"enum": ["Always", "IfNotPresent", "Never"], "description": "when it is pulled"},
        ),
        "imagePullSecrets": {
            "type": "array",
            "description": "names of Secrets for the registry",
            "items": {"type": "string", "minLength": 1},
        },
        "ray": group(
            "the Ray cluster",
            version=text("must be the version in the image", r"^2\.[0-9]+\.[0-9]+$"),
            upgrade={
                "enum": ["NewCluster", "None"],
                "description": "NewCluster: a changed pod template starts a second cluster before the first one ends; "
                "None: it is not applied",
            },
        ),
        "head": group("Ray's head; no engine runs here", cpu=cpu, memory=quantity("requested, and the limit"))
        | {"description": "Ray's head; no engine runs here"},
        "worker": group(
            "the one pod of router and engines",
            cpu=cpu,
            memory=quantity("requested, and the limit"),
            sharedMemory=quantity("of the pod's memory for KV transfers and Ray's objects"),
            drainSeconds=whole(
                "running requests may take this long when the pod ends; it is killed 30 s later", 0, 3600
            ),
            gpus=whole("NVIDIA cards of the pod (nvidia.com/gpu); engines share them", 0, 16),
        ),
        "models": group(
            "models that are not in the image",
            claimName=text("an existing PersistentVolumeClaim with model folders, mounted read only; empty: none"),
            path=text("where it is mounted", "^/[A-Za-z0-9/_.-]+$"),
        ),
        "data": group(
            "what outlives a pod: API keys, files, batches, responses",
            claimName=text(
                "an existing PersistentVolumeClaim for the database's file and the contents of files; empty: they end "
                "with the pod"
            ),
            passwordSecret=text("an existing Secret whose key `password` is that of diptych.store.url; empty: none"),
        ),
        "providers": group(
            "keys of outside providers that diptych.providers names",
            keysSecret=text("an existing Secret with their variables, such as GROQ_API_KEY; empty: none"),
        ),
        "serviceAccount": group(
            "of the pods; it has no rights, and its token is not mounted",
            create={"type": "boolean", "description": "make one"},
            name=text("empty: the release's name, or `default` where none is made"),
            annotations=texts("of the one that is made"),
        ),
        "runAsUser": whole("user and group of all processes", 1, (1 << 31) - 1),
        "diptych": config_schema(),
    }
    for pool, what in (("head", "the head"), ("worker", "the worker")):
        properties[pool]["properties"] |= placing(what)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart diptych",
        **group("every key; others are refused", **properties),
    }


def config_schema() -> dict[str, Any]:
    """The tree of diptych.yaml without what the chart decides, without references."""
    whole_tree = DiptychConfig.model_json_schema()
    definitions = whole_tree.pop("$defs")

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:  # Helm 3 ignores what stands beside a reference, and so they are written out
            target = definitions[node["$ref"].rpartition("/")[2]]
            return plain({**target, **{key: value for key, value in node.items() if key != "$ref"}})
        kept = {key: value for key, value in node.items() if key not in DROPPED}
        if "properties" in kept:
            kept["properties"] = {name: plain(value) for name, value in kept["properties"].items()}
        return {key: value if key == "properties" else plain(value) for key, value in kept.items()}

    tree: dict[str, Any] = plain(whole_tree)
    tree["description"] = "diptych.yaml: the tree of docs/configuration.md without what the chart decides"
    for path, names in CHARTS_OWN.items():
        node = tree["properties"][path] if path else tree
        for name in names:
            del node["properties"][name]
    quirks = tree["properties"]["providers"]["additionalProperties"]["properties"]["quirks"]
    words = "see docs/providers.md; checked when the configuration is read"
    quirks |= {
        "additionalProperties": False,
        "properties": {quirk.name: {"description": words} for quirk in dataclasses.fields(Quirks)},
    }
    models = tree["properties"]["models"]
    models |= {
        "description": "models by name; empty: the built-in one",
        "propertyNames": {"pattern": f"^({MODEL_NAME.pattern})$"},
    }
    models.pop("minProperties", None)
    return tree


def rows(schema: dict[str, Any], values: Any, path: str = "") -> list[str]:
    """A row of the README's table for every value of the chart; diptych.yaml has a page of its own."""
    lines = []
    for name, child in schema["properties"].items():
        where = f"{path}.{name}" if path else name
        if where == "global":
            continue
        if "properties" in child and where != "diptych":
            lines += rows(child, values[name], where)
            continue
        lines.append(f"| `{where}` | `{json.dumps(values[name])}` | {child['description']} |")
    return lines


def table() -> str:
    """All values as Markdown."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows(chart_schema(), values)])


def readme(page: str) -> str:
    """The README with its table made anew."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    """Write both."""
    SCHEMA.write_text(json.dumps(chart_schema(), indent=2) + "\n", encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
