"""The tree of `diptych.yaml`: one file, one default per key, unknown keys refused, errors name the key path.

Read by `diptych serve` alone; every component receives its own branch, never the root. No torch, no ray.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from diptych.cluster.formats.format import REASONING_FORMATS, TOOL_FORMATS
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.providers.fetch_settings import FetchSettings
from diptych.cluster.providers.settings import NamedProviders
from diptych.cluster.router_settings import LABEL_RULE as LABEL_RULE
from diptych.cluster.router_settings import MAX_LABEL_CHARS as MAX_LABEL_CHARS
from diptych.cluster.router_settings import LimitSettings as LimitSettings
from diptych.cluster.router_settings import PlacementSettings as PlacementSettings
from diptych.cluster.router_settings import ResponsesSettings as ResponsesSettings
from diptych.cluster.router_settings import RouterSettings as RouterSettings
from diptych.cluster.router_settings import TenantSettings as TenantSettings
from diptych.cluster.router_settings import is_label as is_label
from diptych.cluster.security_settings import SecuritySettings as SecuritySettings
from diptych.cluster.security_settings import TlsSettings as TlsSettings
from diptych.cluster.store.settings import StoreSettings
from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import (
    DecodePoolSettings,
    EchoSettings,
    EmbedPoolSettings,
    KvSettings,
    PrefillPoolSettings,
    Seconds,
    Settings,
    TransferSettings,
)
from diptych.protos.types import Role

DEFAULT_MODEL = "smollm2-135m-instruct"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
# A unix socket path holds 107 bytes; Ray's longest one takes 68 below its temporary folder's parent.
RUN_DIR_MAX_CHARS = 36

# pydantic's words where they say too much or speak of Python
_WORDING = {
    "int_parsing": "should be a whole number",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "string_type": "should be a text",
    "path_type": "should be a path",
    "model_type": "should be a group of keys",
    "tuple_type": "should be a list",
    "dict_type": "should be a group of keys",
    "too_short": "should have at least {min_length} entry",
}


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/diptych`, or `~/.cache/diptych`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych"


def api_key() -> str:
    """The key that the command and the Python client show, from DIPTYCH_API_KEY; empty where there is none."""
    return os.environ.get("DIPTYCH_API_KEY", "").strip()


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/diptych`, or `~/.local/share/diptych`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "diptych"


def default_run_dir() -> Path:
    """A short private folder for sockets, state and Ray's session; Ray's own sockets leave little room for its name."""
    return Path(tempfile.gettempdir()) / f"diptych-{os.getuid()}"


class ModelSettings(Settings):
    """One served model and its two pools."""

    source: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="a built-in model, a folder, a GGUF file, or a name on the Hugging Face hub",
    )
    weights: Literal["checkpoint", "random"] = Field(
        "checkpoint",
        description="random: read none and make them up, to measure a model by its shape; a folder then needs "
        "config.json and tokenizer.json alone",
    )
    echo: EchoSettings = EchoSettings()
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what engines compute on; auto: cuda, an NVIDIA card, where there is one that torch can use"
    )
    gpu_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="part of a card, and of its memory, that an engine gets; null: a whole one, or where there are "
        "fewer cards than engines, equal parts",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a card and where the CPU has it"
    )
    deterministic: bool = Field(
        False,
        description="on a card: the bits of an answer depend on its request alone, not on what is computed beside it; "
        "slower",
    )
    max_context_tokens: int | None = Field(None, ge=2, description="prompt and output; null: what the model allows")
    tool_format: str = Field(
        "auto",
        description="how the model writes tool calls; auto: by its chat template and tokens, none: tools are refused "
        "where the template knows them",
    )
    reasoning_format: str = Field(
        "auto", description="how it sets its reasoning apart; auto: as for tools, none: reasoning is content"
    )
    seed: int | None = Field(None, ge=0, description="of requests that name none; null: a fresh one each time")
    task: Literal["auto", "generate", "embed", "rerank"] = Field(
        "auto",
        description="what it answers; embed: vectors of texts, rerank: scores of pairs by its own head, both by one "
        "pool of engines without KV; auto: what its folder was made for",
    )
    layout: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="colocated: decode engines alone, which compute the prompts too, in the same steps",
    )
    kv: KvSettings = Field(KvSettings(), description="of each engine, unless its pool says otherwise")
    prefill: PrefillPoolSettings = PrefillPoolSettings()
    decode: DecodePoolSettings = DecodePoolSettings()
    embed: EmbedPoolSettings = Field(EmbedPoolSettings(), description="of a model that embeds or ranks texts")

    @field_validator("task")
    @classmethod
    def _has_texts(cls, task: str, info: ValidationInfo) -> str:
        if task in ("embed", "rerank") and info.data.get("source") == ECHO:
            raise ValueError(f"the model {ECHO} generates and does nothing else; remove this key")
        return task

    @field_validator("tool_format", "reasoning_format")
    @classmethod
    def _is_format(cls, name: str, info: ValidationInfo) -> str:
        known = TOOL_FORMATS if info.field_name == "tool_format" else REASONING_FORMATS
        if name not in {"auto", "none", *known}:
            raise ValueError(f"there is no format {name!r}; choose auto, none or one of {', '.join(sorted(known))}")
        return name

    @field_validator("weights")
    @classmethod
    def _has_weights(cls, weights: str, info: ValidationInfo) -> str:
        if weights == "random" and info.data.get("source") == ECHO:
            raise ValueError(f"the model {ECHO} has no weights; remove this key")
        return weights

    @field_validator("echo")
    @classmethod
    def _is_echo(cls, echo: EchoSettings, info: ValidationInfo) -> EchoSettings:
        if info.data.get("source") != ECHO and echo != EchoSettings():
            raise ValueError(f"these keys are for the model {ECHO}; remove them, or write source: {ECHO}")
        return echo

    @field_validator("device")
    @classmethod
    def _computes(cls, device: str, info: ValidationInfo) -> str:
        if device == "cuda" and info.data.get("source") == ECHO:
            raise ValueError(f"the model {ECHO} computes nothing that a card could; remove this key")
        return device

    @field_validator("gpu_share", "deterministic")
    @classmethod
    def _has_a_card(cls, value: float | bool | None, info: ValidationInfo) -> float | bool | None:
        if value and info.data.get("device") == "cpu":
            why = (
                "an engine on the CPU has no card"
                if info.field_name == "gpu_share"
                else "a CPU's products of matrices depend on how many rows are computed at once"
            )
            raise ValueError(f"{why}; remove this key, or write device: cuda")
        return value

    @field_validator("prefill")
    @classmethod
    def _has_a_pool(cls, prefill: PrefillPoolSettings, info: ValidationInfo) -> PrefillPoolSettings:
        # Called for a `prefill` that somebody wrote, not for the default.
        if info.data.get("layout") == "colocated":
            raise ValueError(
                "the layout colocated has no prefill pool; remove these keys, or write layout: disaggregated"
            )
        return prefill

    @property
    def has_weights(self) -> bool:
        """Whether weights are read from files."""
        return self.weights == "checkpoint"

    @property
    def computed(self) -> tuple[str, ...]:
        """What an answer depends on besides the model's files; see models/identity.py."""
        return self.dtype, self.device, self.tool_format, self.reasoning_format

    def without_sizes(self) -> ModelSettings:
        """What an engine is told: how many there are must not tell it from those of another size."""
        one = {"engines": 1}
        return self.model_copy(update={role.value: getattr(self, role.value).model_copy(update=one) for role in Role})

    def pools(self) -> dict[Role, int]:
        """Engines of each pool that the task and the layout have; a task that nobody has settled is to generate."""
        if self.task in ("embed", "rerank"):
            return {Role.EMBED: self.embed.engines}
        if self.layout == "colocated":
            return {Role.DECODE: self.decode.engines}
        return {Role.PREFILL: self.prefill.engines, Role.DECODE: self.decode.engines}

    def pool_kv(self, role: Role) -> KvSettings:
        """The arena of an engine of one pool."""
        return (self.prefill.kv if role is Role.PREFILL else self.decode.kv) or self.kv


class RaySettings(Settings):
    """Which Ray cluster to use."""

    address: str | None = Field(None, description="host:port of a cluster to join; null: start our own")
    start_timeout_s: Seconds = Field(60.0, description="time for our own Ray to come up")
    engine_timeout_s: Seconds = Field(300.0, description="time for an engine to load its model and be ready")
    object_store_mib: int = Field(96, ge=76, description="Ray's object store; Diptych moves no data through it")

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str | None) -> str | None:
        if address is not None and not re.fullmatch(r"[^:/\s]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
            raise ValueError(
                f"{address!r} is not host:port; a cluster is joined by its address, never because it happens to run"
            )
        return address


class EngineSettings(Settings):
    """How engines are reached, by routers and by each other."""

    host: str | None = Field(
        None, description="an address of this machine to listen on, at a free port; null: unix sockets in run_dir"
    )
    restart: bool = Field(True, description="start another engine in place of one that ended unasked")
    max_restarts: int = Field(5, ge=1, description="of an engine that dies as it starts, in ten minutes")
    restart_backoff_s: Seconds = Field(0.5, description="wait before the second restart; each further one doubles it")
    silence_s: Seconds = Field(1.5, description="an engine that does not answer its manager this long is killed")
    step_stall_s: Seconds = Field(60.0, description="an engine whose step takes longer ends itself")

    @field_validator("host")
    @classmethod
    def _an_address(cls, host: str | None) -> str | None:
        if host is not None:
            try:
                address = ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(f"{host!r} is not an IP address") from None
            if address.is_unspecified:
                raise ValueError(f"{host!r} is no address that a peer can reach; name one of this machine's")
        return host

    @property
    def leaves_host(self) -> bool:
        """Whether other machines can reach the engines."""
        return self.host is not None and not ipaddress.ip_address(self.host).is_loopback


class TelemetrySettings(Settings):
    """Traces."""

    trace_file: Path | None = Field(None, description="spans as JSON lines; every process adds its name to the file's")


class DiptychConfig(Settings):
    """The root of `diptych.yaml`."""

    models: dict[str, ModelSettings] = Field(default={DEFAULT_MODEL: ModelSettings()}, min_length=1)
    transfer: TransferSettings = TransferSettings()
    router: RouterSettings = RouterSettings()
    providers: NamedProviders = Field(default={}, description="outside providers: of the built-in table, and own ones")
    gateway: GatewaySettings = GatewaySettings()
    fetch: FetchSettings = FetchSettings()
    engines: EngineSettings = EngineSettings()
    security: SecuritySettings = Field(SecuritySettings(), validate_default=True)
    ray: RaySettings = RaySettings()
    store: StoreSettings = StoreSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    faults: FaultSettings = FaultSettings()
    cache_dir: Path = Field(default_factory=default_cache_dir, description="converted models")
    data_dir: Path = Field(
        default_factory=default_data_dir, description="what outlives a cluster: the store's file, contents of files"
    )
    run_dir: Path = Field(default_factory=default_run_dir, description="sockets, state and logs of running clusters")

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        for name in models:
            if not MODEL_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a model name: use letters, digits, '.', '_', '/' and '-'")
        return models

    @field_validator("security")
    @classmethod
    def _no_plaintext_outside(cls, security: SecuritySettings, info: ValidationInfo) -> SecuritySettings:
        engines = info.data.get("engines")
        if engines is not None and engines.leaves_host and security.tls is None and not security.allow_plaintext:
            raise ValueError(
                f"engines.host {engines.host} is reachable from other machines, and without TLS everybody on the way "
                "could read prompts and KV; set security.tls, or security.allow_plaintext: true where the network "
                "itself is trusted"
            )
        return security

    @field_validator("cache_dir", "data_dir", "run_dir")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return Path(os.path.abspath(folder.expanduser()))

    @field_validator("run_dir")
    @classmethod
    def _short(cls, folder: Path) -> Path:
        if len(str(folder)) > RUN_DIR_MAX_CHARS:
            raise ValueError(
                f"{str(folder)!r} has {len(str(folder))} characters, and the sockets below it leave room for "
                f"{RUN_DIR_MAX_CHARS}; choose a shorter folder"
            )
        return folder


def load_config(
    file: Path | None = None, overrides: Sequence[str] = (), model: str | None = None, *, kv_gib: float | None = None
) -> DiptychConfig:
    """The configuration from a YAML file, then `a.b=c` overrides, then `model` (a configured name, a built-in
    name, a folder or a GGUF file), which becomes the only one served; `kv_gib` is the size of each engine's arena,
    whatever they say. Raises StartupError with a sentence per mistake.
    """
    tree: dict[str, Any] = {} if file is None else _read_file(file)
    if not tree.get("models"):
        tree["models"] = {DEFAULT_MODEL: {}}
    if model is not None:
        tree["models"] = _only(tree["models"], model)
    for override in overrides:
        _apply(tree, override)
    if kv_gib is not None:
        _give_kv(tree["models"], max(1, round(kv_gib * 1024)))
    return check_config(tree, str(file) if file is not None else "configuration")


def check_config(tree: Mapping[str, Any], origin: str) -> DiptychConfig:
    """The configuration that a tree of plain values means. Raises StartupError with a sentence per mistake."""
    try:
        return DiptychConfig.model_validate(tree)
    except ValidationError as exc:
        raise StartupError(f"{origin}: " + "; ".join(map(_sentence, _mistakes(exc)))) from exc


def _mistakes(exc: ValidationError) -> Iterator[ErrorDetails]:
    """Without lists that are too short because of their wrong entries, which pydantic leaves out when it counts."""
    errors = exc.errors()
    for error in errors:
        place = error["loc"]
        has_wrong = any(other["loc"][: len(place)] == place and other is not error for other in errors)
        if error["type"] != "too_short" or not has_wrong:
            yield error


def _give_kv(models: Any, memory_mib: int) -> None:
    """To every model, and every pool that has an arena of its own. What is no group of keys is told by the check."""
    for name, model in models.items() if isinstance(models, dict) else ():
        if model is None:
            model = models[name] = {}
        for group in (model, *(model.get(role) for role in Role)) if isinstance(model, dict) else ():
            if isinstance(group, dict) and (group is model or group.get("kv")):
                kv = group.get("kv") or {}
                group["kv"] = {**kv, "memory_mib": memory_mib} if isinstance(kv, dict) else kv


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML's reader keeps the last of two equal keys and says nothing; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} appears twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except OSError as exc:
        raise StartupError(f"cannot read the configuration {file}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise StartupError(f"cannot read the configuration {file}: byte {exc.start} is not UTF-8 text") from exc
    except yaml.YAMLError as exc:
        raise StartupError(f"{file} is not valid YAML: {_fault(exc)}") from exc
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise StartupError(f"{file}: the top level must be a mapping of keys such as models and router")
    return tree


def _fault(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the excerpt, which needs lines of its own."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    words = ", ".join(words for words in (error.context, error.problem) if words)
    return f"{words} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def _only(models: Any, model: str) -> dict[str, Any]:
    if isinstance(models, dict) and model in models:
        return {model: models[model]}
    path = Path(model).expanduser()
    if not path.exists() and MODEL_NAME.fullmatch(model):
        return {model: {"source": model}}
    path = path.resolve()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.removesuffix(".gguf")).strip("-._").lower() or "model"
    return {name: {"source": str(path)}}


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|([^."]+)', path)]
    if not equals or not keys:
        raise StartupError(f"--set {override}: write a key path, '=' and a value, such as router.port=8001")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise StartupError(f"--set {path}: {text!r} is not a YAML value") from exc
    node = tree
    for depth, key in enumerate(keys[:-1], 1):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise StartupError(f"--set {path}: {'.'.join(keys[:depth])} is a value, not a group of keys")
        node = child
    node[keys[-1]] = value


def _sentence(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{where} is not a known key ({hint})"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = _WORDING.get(error["type"], message.removeprefix("Input ")).format(**error.get("ctx", {}))
    if error["type"] == "missing":
        return f"{where} is missing"
    if path[-1:] == ["[key]"]:
        return f"{'.'.join(path[:-2])}: the name {error['input']!r} is not a text; write it in quotes"
    if error["type"] == "value_error" or path[:1] == ["providers"]:  # where a key may have been written
        return f"{where}: {message}"
    return f"{where}: {message}, not {error['input']!r}"


def _known_keys(path: Sequence[str]) -> list[str]:
    """The keys of the group at `path`, read off the classes."""
    cls: type[BaseModel] = DiptychConfig
    parts = list(path)
    while parts:
        part = parts.pop(0)
        annotation = cls.model_fields[part].annotation
        if get_origin(annotation) is dict:
            parts = parts[1:]
            annotation = get_args(annotation)[1]
        elif get_origin(annotation) is tuple:
            parts = parts[1:]
            annotation = get_args(annotation)[0]
        elif not isinstance(annotation, type):  # a group or null
            annotation = get_args(annotation)[0]
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        cls = annotation
    return sorted(cls.model_fields)
