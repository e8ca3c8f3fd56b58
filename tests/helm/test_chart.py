"""What the chart renders is what the operator, Ray Serve and Diptych's own configuration accept."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from diptych.cluster.config import DEFAULT_MODEL, DiptychConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
MODELS = {
    "small": {"layout": "colocated", "decode": {"engines": 2, "max_running": 8}, "kv": {"memory_mib": 256}},
    "org/big": {"source": "/models/big", "prefill": {"kv": {"memory_mib": 64}}, "max_context_tokens": None},
}
FULL = {
    "image": {"repository": "r.example.com/d", "digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
    "imagePullSecrets": ["pull"],
    "ray": {"upgrade": "None"},
    "head": {"nodeSelector": {"disk": "ssd"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    "worker": {"cpu": "1500m", "memory": "8192Mi", "drainSeconds": 5},
    "models": {"claimName": "weights", "path": "/models"},
    "serviceAccount": {"annotations": {"a": "b"}},
    "runAsUser": 2000,
    "diptych": {
        "models": MODELS,
        "router": {"limits": {"body_bytes": 8_388_608}, "tenants": {"a": {"weight": 2.5}}},
        "ray": {"engine_timeout_s": 900},
        "transfer": {"transport": "grpc"},
    },
}

Refuse = Callable[..., str]


# ---- the CRD ----------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """An OpenAPI schema of a CRD as JSON Schema in which an unknown field is an error, as for kubectl --validate."""
    if not isinstance(schema, dict):
        return schema
    plain = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        plain.pop("type", None)
        plain["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in plain:
        plain["properties"] = {name: strict(value) for name, value in plain["properties"].items()}
        plain.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    for key in ("items", "additionalProperties"):
        plain |= {key: strict(plain[key])} if key in plain else {}
    return plain


@cache
def rayservice_of(version: str) -> jsonschema.Draft202012Validator:
    text = gzip.decompress((Path(__file__).parent / "crds" / f"rayservices-{version}.yaml.gz").read_bytes())
    crd = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (served,) = [found for found in crd["spec"]["versions"] if found["name"] == "v1"]
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("version", ["1.6.2", "1.7.0"])
@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_the_operators_crd_accepts_the_rayservice(render: Any, version: str, values: dict[str, Any]) -> None:
    errors = [error.message for error in rayservice_of(version).iter_errors(render(values)["RayService"])]
    assert not errors


def test_the_crd_test_would_see_a_mistake(render: Any) -> None:
    service = render()["RayService"]
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    worker["replicass"] = worker.pop("replicas")
    worker["template"]["spec"]["containers"][0]["imagePullPolicyy"] = "Always"
    assert len(list(rayservice_of("1.7.0").iter_errors(service))) == 2


# ---- Serve and Diptych ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's modules, while they are loaded
@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_ray_serve_accepts_its_configuration(render: Any, values: dict[str, Any]) -> None:
    from ray.serve import Deployment
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(render(values)["RayService"]["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1", "the API has no authentication"
    (application,) = schema.applications
    assert (application.name, application.import_path) == ("diptych", "diptych.cluster.entry:build")
    import diptych.cluster.entry as entry

    deployments = {value.name for value in vars(entry).values() if isinstance(value, Deployment)}
    assert {deployment.name for deployment in application.deployments} == deployments, "one would run on the head"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_the_builder_takes_the_rendered_file(render: Any, values: dict[str, Any], tmp_path: Path) -> None:
    from diptych.cluster.entry import build

    config_of(render(values), tmp_path)
    build({"config": str(tmp_path / "diptych.yaml")})


def config_of(objects: dict[str, Any], folder: Path) -> DiptychConfig:
    file = folder / "diptych.yaml"
    file.write_text(objects["ConfigMap"]["data"]["diptych.yaml"])
    return load_config(file)


def test_the_default_configuration_is_the_built_in_model_on_loopback(render: Any, tmp_path: Path) -> None:
    config = config_of(render(), tmp_path)
    assert list(config.models) == [DEFAULT_MODEL]
    assert (config.router.host, config.router.port) == ("127.0.0.1", 8001)
    assert config.run_dir == Path("/tmp/diptych")


def test_every_value_of_the_configuration_arrives(render: Any, tmp_path: Path) -> None:
    config = config_of(render(FULL), tmp_path)
    expected = load_config(None, [f"{key}={json.dumps(value)}" for key, value in FULL["diptych"].items()])  # type: ignore[attr-defined]
    assert config.models == expected.models
    assert config.router.limits == expected.router.limits
    assert config.router.tenants == expected.router.tenants
    assert config.ray.engine_timeout_s == 900
    assert config.transfer.transport == "grpc"
    assert config.router.host == "127.0.0.1"


def test_files_and_resources_are_named_alike_on_both_sides(render: Any) -> None:
    objects = render()
    serve = yaml.safe_load(objects["RayService"]["spec"]["serveConfigV2"])["applications"][0]
    folder, _, file = serve["args"]["config"].rpartition("/")
    assert file in objects["ConfigMap"]["data"]
    cluster = objects["RayService"]["spec"]["rayClusterConfig"]
    for pod in pods(objects):
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts[folder]]["configMap"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    has = json.loads(json.loads(cluster["workerGroupSpecs"][0]["rayStartParams"]["resources"]))
    for deployment in serve["deployments"]:
        assert set(deployment["ray_actor_options"]["resources"]) == set(has)
    assert "resources" not in cluster["headGroupSpec"]["rayStartParams"]


# ---- what outlives a pod ----------------------------------------------------------------------


def test_the_store_is_on_the_claim_of_the_worker_alone(render: Any, tmp_path: Path) -> None:
    """The head has no router, and a ReadWriteOnce claim on it would tie it to the worker's node."""
    for values, kind in (({}, "emptyDir"), ({"data": {"claimName": "kept"}}, "persistentVolumeClaim")):
        objects = render(values)
        head, worker = pods(objects)
        assert "data" not in {volume["name"] for volume in head["volumes"]}
        (volume,) = [volume for volume in worker["volumes"] if volume["name"] == "data"]
        assert kind in volume
        (mount,) = [mount for mount in worker["containers"][0]["volumeMounts"] if mount["name"] == "data"]
        config = config_of(objects, tmp_path)
        assert Path(mount["mountPath"]) in config.data_dir.parents
        assert not mount.get("readOnly")
        assert not list(rayservice_of("1.7.0").iter_errors(objects["RayService"]))


def test_a_database_server_s_password_comes_from_a_secret(render: Any, refuse: Refuse, tmp_path: Path) -> None:
    url = "postgresql+psycopg://diptych@db.example/diptych"
    objects = render({"data": {"passwordSecret": "db"}, "diptych": {"store": {"url": url, "max_waiting": 9}}})
    store = config_of(objects, tmp_path).store
    assert (store.url, store.max_waiting) == (url, 9)
    _, worker = pods(objects)
    (volume,) = [volume for volume in worker["volumes"] if volume["name"] == "store-password"]
    assert volume["secret"] == {"secretName": "db", "defaultMode": 0o440}
    (mount,) = [mount for mount in worker["containers"][0]["volumeMounts"] if mount["name"] == "store-password"]
    assert store.password_file == Path(mount["mountPath"]) / "password"
    assert "no database asks for it: set diptych.store.url" in refuse({"data": {"passwordSecret": "db"}})


def test_providers_keys_come_from_a_secret_and_stand_in_no_object(render: Any, refuse: Refuse, tmp_path: Path) -> None:
    objects = render({"providers": {"keysSecret": "keys"}, "diptych": {"providers": {"groq": {}}}})
    assert list(config_of(objects, tmp_path).providers) == ["groq"]
    for pod in pods(objects):
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert not any("envFrom" in pod["containers"][0] for pod in pods(render({})))
    assert "name one in diptych.providers" in refuse({"providers": {"keysSecret": "keys"}})


# ---- cards ------------------------------------------------------------------------------------


def with_a_card() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "values-one-gpu.yaml").read_text())
    return values


def test_the_example_for_one_card_asks_kubernetes_and_ray_for_it(render: Any, tmp_path: Path) -> None:
    objects = render(with_a_card())
    assert not list(rayservice_of("1.7.0").iter_errors(objects["RayService"]))
    head, worker = pods(objects)
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    group = objects["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["rayStartParams"]["num-gpus"] == "1"
    [model] = config_of(objects, tmp_path).models.values()
    assert (model.device, model.layout) == ("cuda", "colocated")


def test_without_cards_nothing_asks_for_one(render: Any) -> None:
    objects = render()
    assert "nvidia" not in json.dumps(objects)
    group = objects["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["rayStartParams"]["num-gpus"] == "0"


def test_an_engine_on_the_cpu_beside_a_card_counts_its_arena(refuse: Refuse) -> None:
    model = {"device": "cpu", "layout": "colocated", "kv": {"memory_mib": 8000}}
    values = {"worker": {"gpus": 1}, "diptych": {"models": {"m": model}}}
    assert "the engines need 8840 MiB" in refuse(values)


# ---- security ---------------------------------------------------------------------------------


def pods(objects: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = objects["RayService"]["spec"]["rayClusterConfig"]
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield part["template"]["spec"]


@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_every_pod_keeps_to_the_restricted_standard(render: Any, values: dict[str, Any]) -> None:
    found = list(pods(render(values)))
    assert len(found) == 2
    for pod in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(not {"hostPath"} & set(volume) for volume in pod["volumes"])
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert "command" not in container, "the operator's own start command is needed"


@pytest.mark.parametrize("values", [{}, FULL], ids=["default", "full"])
def test_nothing_is_opened_and_no_rights_are_given(render: Any, values: dict[str, Any]) -> None:
    """Roles, Services and Ingresses would each be a way in or out that the README says is not there."""
    objects = render(values)
    assert set(objects) == {"RayService", "ConfigMap", "ServiceAccount"}
    cluster = objects["RayService"]["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert "ports" not in json.dumps(list(pods(objects)))


def test_an_account_of_somebody_elses_is_used_as_it_is(render: Any) -> None:
    objects = render({"serviceAccount": {"create": False, "name": "theirs"}})
    assert set(objects) == {"RayService", "ConfigMap"}
    assert {pod["serviceAccountName"] for pod in pods(objects)} == {"theirs"}


# ---- upgrades ---------------------------------------------------------------------------------


def test_the_charts_version_alone_changes_no_pod_and_the_configuration_does(
    helm: Any, render: Any, tmp_path: Path
) -> None:
    """The operator builds a second cluster for any change of a pod template, be it a label."""
    copy = tmp_path / "copy"
    shutil.copytree(CHART, copy)
    meta = yaml.safe_load((copy / "Chart.yaml").read_text())
    (copy / "Chart.yaml").write_text(yaml.safe_dump(meta | {"version": "9.9.9", "appVersion": "9.9.9"}))
    image = {"image": {"repository": "registry.example.com/diptych", "tag": "v1"}}
    before = render(image)["RayService"]["spec"]
    done = helm("template", "llm", str(copy), "--set", "image.repository=registry.example.com/diptych,image.tag=v1")
    (after,) = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "RayService"]
    assert after["metadata"]["labels"]["helm.sh/chart"] == "diptych-9.9.9"
    assert after["spec"] == before
    changed = render(image | {"diptych": {"router": {"max_attempts": 5}}})["RayService"]["spec"]
    assert changed["rayClusterConfig"] != before["rayClusterConfig"]
    assert changed["serveConfigV2"] == before["serveConfigV2"]


@pytest.mark.parametrize("seconds", [0, 60, 600])
def test_a_pod_is_not_killed_before_its_requests_had_their_time(render: Any, seconds: int) -> None:
    _, worker = pods(render({"worker": {"drainSeconds": seconds}}))
    environment = {item["name"]: item["value"] for item in worker["containers"][0]["env"]}
    assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(seconds)
    assert worker["terminationGracePeriodSeconds"] == seconds + 30


# ---- refusals ---------------------------------------------------------------------------------


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("imag", {}, "imag"),
        ("image.tagg", "x", "tagg"),
        ("image.tag", 3, "string"),
        ("worker.memory", "6G", "pattern"),
        ("worker.memory", 6, "string"),
        ("worker.replicas", 2, "replicas"),
        ("worker.drainSeconds", "60", "integer"),
        ("worker.gpus", -1, "gpus"),
        ("diptych.models.a.device", "gpu", "cuda"),
        ("head.tolerations", [{"keyy": "a"}], "keyy"),
        ("ray.upgrade", "Rolling", "NewCluster"),
        ("runAsUser", 0, "runAsUser"),
        ("diptych.model", {}, "model"),
        ("diptych.router.host", "0.0.0.0", "host"),
        ("diptych.router.prot", 1, "prot"),
        ("diptych.run_dir", "/x", "run_dir"),
        ("diptych.data_dir", "/x", "data_dir"),
        ("diptych.store.password_file", "/x", "password_file"),
        ("diptych.models.a.kv.block_tokens", 0, "block_tokens"),
        ("diptych.models.a.dtype", "int4", "bfloat16"),
        ("diptych.models.-bad", {}, "pattern"),
        ("diptych.models.a.decode.engines", "two", "integer"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused_by_name(refuse: Refuse, path: str, value: Any, words: str) -> None:
    said = refuse(nested(path, value))
    assert "schema" in said
    assert words in said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"image": {"repository": ""}}, "image.repository is empty: there is no published image"),
        (
            {"diptych": {"models": {"m": {"layout": "colocated", "prefill": {"engines": 2}}}}},
            "diptych.models.m: the layout colocated has no prefill pool",
        ),
        ({"diptych": {"models": {"m": {"decode": {"engines": 9}}}}}, "the engines need 10820 MiB before any weights"),
        ({"diptych": {"models": {"m": {"kv": {"memory_mib": 4096}}}}}, "worker.memory is 6Gi (6144 MiB)"),
        (
            {"diptych": {"models": {"m": {"device": "cuda"}}}},
            "m.device is cuda, and the pod has no card: set worker.gpus",
        ),
        ({"worker": {"gpus": 1}}, "the engines need 6444 MiB before any weights"),
        ({"worker": {"memory": "1Gi"}}, "worker.memory is 1Gi (1024 MiB)"),
        ({"worker": {"sharedMemory": "6Gi"}}, "worker.sharedMemory 6Gi is part of worker.memory 6Gi"),
        ({"diptych": {"models": {"m": {"source": "/models/m"}}}}, "set models.claimName"),
        ({"serviceAccount": {"create": False, "annotations": {"a": "b"}}}, "set serviceAccount.create"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_a_sentence(
    refuse: Refuse, values: dict[str, Any], sentence: str
) -> None:
    assert sentence in refuse(values)


def test_names_that_the_operator_could_not_use_are_refused(refuse: Refuse, render: Any) -> None:
    assert "too long" in refuse(release="a" * 33)
    assert render(release="a" * 32)["RayService"]["metadata"]["name"] == "a" * 32 + "-diptych"
    assert render(release="my-diptych")["RayService"]["metadata"]["name"] == "my-diptych"
    assert "begin with a letter" in refuse(release="1a")


def test_an_old_kubernetes_is_refused(template: Any) -> None:
    done = template(None, "--kube-version", "1.28.0")
    assert done.returncode != 0
    assert "kubeVersion: >=1.29.0-0" in done.stderr


# ---- the chart itself -------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about(helm: Any) -> None:
    done = helm("lint", str(CHART), "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout


def test_the_notes_name_what_there_is(helm: Any, render: Any) -> None:
    if helm("version", "--short").stdout.startswith("v3."):
        pytest.skip("helm 3 renders notes with a cluster only")
    done = helm("install", "llm", str(CHART), "--namespace", "ns", "--set", "image.repository=x", "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    objects = render()
    assert f"{objects['RayService']['metadata']['name']} is a RayService" in notes
    port = yaml.safe_load(objects["ConfigMap"]["data"]["diptych.yaml"])["router"]["port"]
    assert f'worker)" {port}\n' in notes
    assert f"curl http://127.0.0.1:{port}/v1/models" in notes
    assert all("--namespace ns" in line for line in notes.splitlines() if line.startswith("  kubectl"))


def test_the_charts_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (project, project)


def test_rays_version_is_the_one_that_was_tried() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f"\nray=={values['ray']['version']}\n" in (ROOT / "constraints.txt").read_text()


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helm_schema", ROOT / "tools" / "helm_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_schema_and_table_are_made_from_the_present_classes() -> None:
    made = generator()
    assert json.loads((CHART / "values.schema.json").read_text()) == made.chart_schema(), "run `make docs`"
    page = (CHART / "README.md").read_text()
    assert made.readme(page) == page, "run `make docs`"


def objects_in(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield path, schema
        for key, value in schema.items():
            yield from objects_in(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for item in schema:
            yield from objects_in(item, path)


def test_the_schema_is_closed_described_and_readable_by_helm_3() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert "$ref" not in json.dumps(schema), "helm 3 ignores what stands beside one"
    found = list(objects_in(schema))
    assert len(found) > 20
    for path, node in found:
        if path == ".properties.global":
            continue
        assert node.get("additionalProperties") is not None, path
        assert node["additionalProperties"] is not True, path
        for name, child in node.get("properties", {}).items():
            assert child.get("description"), f"{path}.{name} is not described"


def test_the_readme_names_every_file_of_the_chart() -> None:
    page = (CHART / "README.md").read_text()
    for file in (CHART / "templates").iterdir():
        assert file.name in page, file.name
