from __future__ import annotations

from pathlib import Path

import pytest

from diptych.cluster.config import DEFAULT_MODEL, DiptychConfig, load_config
from diptych.protos.errors import StartupError
from diptych.protos.types import GENERATING, Role


def refusal(*overrides: str) -> str:
    with pytest.raises(StartupError) as caught:
        load_config(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("router.prot=1", "router.prot is not a known key (did you mean port?)"),
        ("rooter={}", "rooter is not a known key (did you mean router?)"),
        ("router.limits.body=1", "router.limits.body is not a known key (did you mean body_bytes?)"),
        ("models.x.kv.block_token=3", "models.x.kv.block_token is not a known key (did you mean block_tokens?)"),
        ("transfer.slot=3", "transfer.slot is not a known key (did you mean slots?)"),
        ("router.port=abc", "router.port: should be a whole number, not 'abc'"),
        ("router.port=70000", "router.port: should be less than or equal to 65535, not 70000"),
        ("router.port=-1", "router.port: should be greater than or equal to 0, not -1"),
        ("router=3", "router: should be a group of keys, not 3"),
        ("models.x.dtype=int4", "models.x.dtype: should be 'auto', 'float32' or 'bfloat16', not 'int4'"),
        ("models.x.kv.memory_mib=0", "models.x.kv.memory_mib: should be greater than or equal to 1, not 0"),
        ("models.x.decode.engines=0", "models.x.decode.engines: should be greater than or equal to 1, not 0"),
        ("models.x.prefill.engines=0", "models.x.prefill.engines: should be greater than or equal to 1, not 0"),
        ("models.x.prefill.dtype=float32", "models.x.prefill.dtype is not a known key"),
        (
            "models.x.decode.kv.block_token=3",
            "models.x.decode.kv.block_token is not a known key (did you mean block_tokens?)",
        ),
        (
            "models.x={layout: colocated, prefill: {engines: 1}}",
            "models.x.prefill: the layout colocated has no prefill pool",
        ),
        ("models.x.device=gpu", "models.x.device: should be 'auto', 'cpu' or 'cuda', not 'gpu'"),
        ("models.x={source: echo, device: cuda}", "models.x.device: the model echo computes nothing that a card could"),
        (
            "models.x={device: cpu, gpu_share: 0.5}",
            "models.x.gpu_share: an engine on the CPU has no card; remove this key",
        ),
        (
            "models.x={device: cpu, deterministic: true}",
            "models.x.deterministic: a CPU's products of matrices depend on how many rows are computed at once",
        ),
        ("models.x.gpu_share=1.5", "models.x.gpu_share: should be less than or equal to 1, not 1.5"),
        ("models.x.gpu_share=0", "models.x.gpu_share: should be greater than 0, not 0"),
        ("models.x.deterministic=2", "models.x.deterministic: should be true or false, not 2"),
        ("models.x.attention=fa3", "models.x.attention is not a known key"),
        ("models.x.decode.pace=fast", "models.x.decode.pace: should be 'latency' or 'throughput', not 'fast'"),
        (
            "models.x.decode.itl_target_s=0.1",
            "models.x.decode.itl_limit_s: 0.05 is less than itl_target_s, which is 0.1; raise the one or",
        ),
        ("models.x.decode.itl_target_s=0", "models.x.decode.itl_target_s: should be greater than 0, not 0"),
        ("models.x.decode.step_tokens=0", "models.x.decode.step_tokens: should be greater than or equal to 1, not 0"),
        ("models.x={layout: both}", "models.x.layout: should be 'disaggregated' or 'colocated', not 'both'"),
        ("router.tenants={'': {}}", "router.tenants: the name '' must have 1 to 128 printable ASCII characters"),
        ("router.tenants={' a': {}}", "router.tenants: the name ' a' must have 1 to 128 printable ASCII characters"),
        ("router.tenants={caf\u00e9: {}}", "router.tenants: the name 'caf\u00e9' must have"),
        ('router.tenants={"a\\tb": {}}', "router.tenants: the name 'a\\tb' must have"),
        (f"router.tenants={{{'x' * 129}: {{}}}}", f"router.tenants: the name '{'x' * 129}' must have"),
        ("router.tenants.a.wait=2", "router.tenants.a.wait is not a known key (did you mean weight?)"),
        ("transfer.lease_s=0", "transfer.lease_s: should be greater than 0, not 0"),
        ("transfer.transport=pigeon", "transfer.transport: should be 'auto', 'shm' or 'grpc', not 'pigeon'"),
        ("ray.address=auto", "ray.address: 'auto' is not host:port"),
        ("ray.address=ray://head:10001", "ray.address: 'ray://head:10001' is not host:port"),
        ("models={}", "models: should have at least 1 entry, not {}"),
        ("run_dir=/a/very/long/path/that/goes/on/and/on/and/on", "run_dir: "),
        ('models."a b"={}', "models: 'a b' is not a model name"),
        ("faults.rules=3", "faults.rules: should be a list, not 3"),
        ("faults.rules=[{point: engine.step, action: kill}]", "faults.rules.0: a fault needs nth or a probability"),
        (
            "faults.rules=[{point: hinge.out, action: corrupt, nth: [1]}]",
            "faults.rules.0: corrupt cannot happen at hinge.out; what can: delay,",
        ),
        (
            "faults.rules=[{point: hinge.out, action: drop, nth: [1], delay: 1}]",
            "faults.rules.0.delay is not a known key (did you mean delay_s?)",
        ),
        ("faults.rules=[{point: engine.step, action: kill, nth: [0]}]", "faults.rules.0.nth.0: should be greater"),
        ("router.retry_budget=1.5", "router.retry_budget: should be less than or equal to 1, not 1.5"),
        ("models={1: {}}", "models: the name 1 is not a text; write it in quotes"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_path(override: str, sentence: str) -> None:
    assert refusal(override).startswith(f"configuration: {sentence}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5"])
def test_an_address_that_others_can_reach_is_known_as_one(host: str) -> None:
    """Whether it has a key is looked at before a start."""
    assert load_config(None, [f"router.host='{host}'"]).router.leaves_host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_addresses_are_accepted(host: str) -> None:
    router = load_config(None, [f"router.host='{host}'"]).router
    assert (router.host, router.leaves_host) == (host, False)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("router.port", "--set router.port: write a key path, '=' and a value"),
        ("=3", "--set =3: write a key path, '=' and a value"),
        ("router.port=[", "--set router.port: '[' is not a YAML value"),
    ],
)
def test_a_malformed_override_is_refused_and_quoted(override: str, sentence: str) -> None:
    assert refusal(override).startswith(sentence)


def test_a_path_through_a_value_is_refused() -> None:
    assert (
        refusal("router.port=1", "router.port.x=1")
        == "--set router.port.x: router.port is a value, not a group of keys"
    )


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal("router.port=x", "transfer.slots=1")
    assert "router.port" in message
    assert "transfer.slots" in message


def test_without_a_file_the_built_in_model_is_served() -> None:
    config = load_config()
    assert list(config.models) == [DEFAULT_MODEL]
    assert config.models[DEFAULT_MODEL].source == DEFAULT_MODEL
    assert config == DiptychConfig()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "diptych.yaml"
    file.write_text("models: {tiny: {source: /models/tiny, kv: {memory_mib: 64}}}\nrouter: {port: 9000}\n")
    config = load_config(file, ["models.tiny.kv.block_tokens=32", "router.port=9001"])
    assert config.models["tiny"].kv.memory_mib == 64
    assert config.models["tiny"].kv.block_tokens == 32
    assert config.router.port == 9001


def test_a_key_with_dots_can_be_quoted() -> None:
    assert load_config(None, ['models."qwen2.5-0.5b".dtype=float32']).models["qwen2.5-0.5b"].dtype == "float32"


def test_model_option_names_a_folder_a_configured_model_or_a_built_in_one(tmp_path: Path) -> None:
    folder = tmp_path / "My Model"
    folder.mkdir()
    [(name, settings)] = load_config(None, model=str(folder)).models.items()
    assert (name, settings.source) == ("my-model", str(folder))
    file = tmp_path / "d.yaml"
    file.write_text("models: {a: {source: /a}, b: {source: /b}}\n")
    assert {n: m.source for n, m in load_config(file, model="b").models.items()} == {"b": "/b"}
    assert load_config(None, model="other").models["other"].source == "other"
    assert load_config(None, model="/no/such").models["such"].source == "/no/such"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("router: [", "not valid YAML"),
        ("models:\n  a: {}\n  a: {}\n", "not valid YAML: the key a appears twice .line 3, column 3.$"),
        ("- a", "top level"),
        ("router: {port: x}", "router.port"),
        ("\xff", "router|YAML|level"),
        ("router: {port: 1}\nmodels: {}\nrouter: {port: 2}\n", "the key router appears twice"),
        ("router: {port: 1, port: 2}\n", "the key port appears twice"),
        ("models:\n  a: {source: /a}\n  a: {source: /b}\n", "the key a appears twice"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(StartupError, match=sentence) as caught:
        load_config(file)
    assert str(file) in str(caught.value)


def test_one_source_may_be_served_under_two_names() -> None:
    config = load_config(None, ["models.a.source=/m", "models.b.source=/m", "models.b.layout=colocated"])
    assert {name: len(settings.pools()) for name, settings in config.models.items() if name in "ab"} == {"a": 2, "b": 1}


def test_a_pool_without_settings_of_its_own_has_the_models_arena() -> None:
    model = load_config(None, ["models.x.kv.memory_mib=64", "models.x.decode.kv.memory_mib=128"]).models["x"]
    assert model.pool_kv(Role.PREFILL).memory_mib == 64
    assert model.pool_kv(Role.DECODE).memory_mib == 128


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot read the configuration"):
        load_config(tmp_path / "no.yaml")


def test_a_file_that_cannot_be_read_is_named_once_and_with_the_cause(tmp_path: Path) -> None:
    missing, binary = tmp_path / "none.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"models: \xff\xfe")
    with pytest.raises(StartupError) as told:
        load_config(missing)
    assert str(told.value) == f"cannot read the configuration {missing}: No such file or directory"
    with pytest.raises(StartupError) as told:
        load_config(binary)
    assert str(told.value) == f"cannot read the configuration {binary}: byte 8 is not UTF-8 text"


@pytest.mark.parametrize(
    "key", ["router.limits.max_running", "models.smollm2-135m-instruct.decode.engines", "router.port"]
)
def test_true_is_no_number(key: str) -> None:
    quoted = key.replace("smollm2-135m-instruct", '"smollm2-135m-instruct"')
    with pytest.raises(StartupError, match=f"{key.rpartition('.')[2]} should be a number, not true"):
        load_config(None, [f"{quoted}=true"])


def test_the_model_without_weights_has_none_that_could_be_random() -> None:
    with pytest.raises(StartupError, match=r"models\.echo\.weights: the model echo has no weights"):
        load_config(None, ["models.echo.weights=random"], "echo")
    assert not load_config(None, ["models.smollm2-135m-instruct.weights=random"]).models[DEFAULT_MODEL].has_weights
    with pytest.raises(StartupError, match="weights"):
        load_config(None, ["models.smollm2-135m-instruct.weights=made-up"])


def test_what_is_null_suits_the_device_and_what_is_given_stays() -> None:
    model = load_config(None, ["models.x={}", "models.y.decode={step_tokens: 7}", "models.y.prefill={step_tokens: 9}"])
    plain, given = model.models["x"], model.models["y"]
    sizes = {
        device: (
            plain.decode.on(device).max_running,
            plain.decode.on(device).step_tokens,
            plain.prefill.on(device).step_tokens,
        )
        for device in ("cpu", "cuda")
    }
    assert sizes == {"cpu": (64, 512, 512), "cuda": (512, 8192, 8192)}
    assert (given.decode.on("cuda").step_tokens, given.decode.on("cuda").max_running) == (7, 512)
    assert given.prefill.on("cuda").step_tokens == 9
    assert given.decode.on("cpu").watermark == given.decode.watermark


def test_kv_gib_is_the_arena_of_every_engine_whatever_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: {a: , b: {kv: {memory_mib: 3, block_tokens: 8}, decode: {kv: {memory_mib: 4}}}}\n")
    models = load_config(file, kv_gib=1.5).models
    assert {model.pool_kv(role).memory_mib for model in models.values() for role in GENERATING} == {1536}
    assert models["b"].kv.block_tokens == 8
    assert models["b"].prefill.kv is None
    assert load_config(file, ["models.b.kv.memory_mib=5"], kv_gib=2).models["b"].kv.memory_mib == 2048
    with pytest.raises(StartupError, match=r"models\.b\.kv: should be a group of keys, not 3"):
        load_config(file, ["models.b.kv=3"], kv_gib=2)
    with pytest.raises(StartupError, match="models: should be a group of keys, not 3"):
        load_config(None, ["models=3"], kv_gib=2)
